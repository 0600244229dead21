"""Stamp the repository's address: `python -m tools.stamp https://github.com/owner/name`.

Everything that names it changes together: `_config.yml`, `pyproject.toml`, `README.md`, and in every notebook the
badge and the setup cell. All new texts are made before the first is written, so nothing is ever half-stamped.
"""

import re
import sys
from pathlib import Path

from tools.chapters import ROOT, repository

ADDRESS = re.compile(r"https://github\.com/[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}")


def stamped(root: Path, address: str) -> dict[Path, str]:
    """The files that name the repository, with the new address in them.

    Raises:
        ValueError: the address is not https://github.com/owner/name.
    """
    if not ADDRESS.fullmatch(address) or address.endswith((".git", ".")):
        raise ValueError(f"{address!r} is not a repository's address: it must read https://github.com/owner/name")
    before, after = (url.removeprefix("https://") for url in (repository(root), address))
    # github.com/owner/name in links and pip's git+https, github/owner/name in Colab's links.
    swaps = ((before, after), (before.replace(".com", ""), after.replace(".com", "")))
    paths = [root / name for name in ("_config.yml", "pyproject.toml", "README.md")]
    texts = {}
    for path in (*paths, *sorted((root / "notebooks").glob("*/*.ipynb"))):
        text = path.read_text()
        for old, new in swaps:
            text = re.sub(re.escape(old) + r"(?![\w.-])", new, text)
        texts[path] = text
    return texts


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("say which address: make repository URL=https://github.com/owner/name", file=sys.stderr)
        return 2
    try:
        texts = stamped(ROOT, arguments[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, text in texts.items():
        path.write_text(text)
    print(f"stamped {arguments[0]} into {len(texts)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
