"""Start a chapter: `python -m tools.skeleton PART NAME` writes one that already builds, tests and renders.

It is a whole small chapter about nothing (the running mean), with every section of the anatomy; replace it piece by
piece.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.chapters import PARTS, ROOT

CAPTIONS = {
    "foundations": "Foundations", "block": "Inside the block", "gpu": "The GPU's view", "parallel": "Many GPUs",
    "serving": "Serving",
}
TEMPLATES = Path(__file__).parent / "templates"


def create(root: Path, part: str, name: str) -> list[Path]:
    """Write the chapter's files and its line in `_toc.yml`; return what was written.

    Raises:
        ValueError: an unknown part, a name that is no Python identifier, or a chapter that exists.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}; the parts are {', '.join(PARTS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is no chapter name: use lower-case words joined by _, as in flash_attention")
    files = {
        root / f"llmbook/{part}/{name}/__init__.py": f'"""{_title(name)}."""\n',
        root / f"llmbook/{part}/{name}/mechanism.py": _template("mechanism.py", part, name),
        root / f"llmbook/{part}/{name}/figures.py": _template("figures.py", part, name),
        root / f"llmbook/{part}/{name}/exercises.py": _template("exercises.py", part, name),
        root / f"tests/{part}/test_{name}.py": _template("test_chapter.py", part, name),
        root / f"notebooks/{part}/{name}.ipynb": nbformat.writes(_notebook(part, name)) + "\n",
    }
    if taken := [str(path.relative_to(root)) for path in files if path.exists()]:
        raise ValueError(f"{part}/{name} exists already: {', '.join(taken)}")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    toc = root / "_toc.yml"
    toc.write_text(_with_chapter(toc.read_text(), part, name))
    return [*files, toc]


def _with_chapter(text: str, part: str, name: str) -> str:
    """`_toc.yml` with the chapter at the end of its part, and the part in its place if it is new."""
    toc = yaml.safe_load(text)
    order = [CAPTIONS[known] for known in PARTS] + ["Reference"]
    mine = next((entry for entry in toc["parts"] if entry["caption"] == CAPTIONS[part]), None)
    if mine is None:
        mine = {"caption": CAPTIONS[part], "chapters": []}
        toc["parts"] = sorted([*toc["parts"], mine], key=lambda entry: order.index(entry["caption"]))
    mine["chapters"].append({"file": f"notebooks/{part}/{name}"})
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _template(file: str, part: str, name: str) -> str:
    text = (TEMPLATES / file).read_text()
    return text.replace("PART", part).replace("NAME", name).replace("TITLE", _title(name))


def _notebook(part: str, name: str) -> nbformat.NotebookNode:
    """`templates/chapter.md` as cells: each begins at a line `%% [tags]` (code) or `%% md [tags]`."""
    cells = []
    for block in re.split(r"^%% ?", _template("chapter.md", part, name), flags=re.M)[1:]:
        head, _, body = block.partition("\n")
        kind, tags = (new_markdown_cell, head.split()[1:]) if head.startswith("md") else (new_code_cell, head.split())
        cells.append(kind(body.strip(), metadata={"tags": tags} if tags else {}))
    return new_notebook(cells=cells)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or not all(arguments):
        print("say which chapter: make chapter PART=gpu NAME=roofline", file=sys.stderr)
        return 2
    part, name = arguments
    try:
        written = create(ROOT, part, name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written:
        print(path.relative_to(ROOT))
    refresh = [sys.executable, "-m", "tools.refresh", f"notebooks/{part}/{name}.ipynb"]
    return subprocess.run(refresh, cwd=ROOT, check=False).returncode or subprocess.run(
        [sys.executable, "-m", "tools.pages"], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
