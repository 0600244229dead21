"""The book's own text as a corpus: the markdown of its chapters, frozen in a file so that results stay as they are.

`python -m llmbook.block.llama.corpus` gathers it anew from a checkout of the book.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
SNAPSHOT = HERE / "corpus.txt"
HELD_OUT = 6  # every sixth chapter is for validation
BEGIN = 0  # the byte before each chapter; no text contains it


class Split(NamedTuple):
    """Bytes as token ids, uint8, [N] each, and the chapters they are from."""

    train: Tensor
    held_out: Tensor
    train_chapters: list[str]
    held_out_chapters: list[str]


def gather(book: Path) -> dict[str, str]:
    """Chapter → its markdown cells, in the order of `_toc.yml`.

    Without this chapter: what is written about the model must not change it.
    """
    chapters = {}
    for line in (book / "_toc.yml").read_text().splitlines():
        name = line.partition("file: ")[2].strip()
        if name.startswith("notebooks/") and not name.endswith("/llama"):
            cells = json.loads((book / f"{name}.ipynb").read_text())["cells"]
            words = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
            chapters[name.removeprefix("notebooks/")] = "\n\n".join(words)
    return chapters


def read(path: Path = SNAPSHOT) -> dict[str, str]:
    """Chapter → text, from the snapshot: a form feed and a name before each."""
    parts = path.read_text(encoding="utf-8").split("\f")[1:]
    return dict(part.split("\n", 1) for part in parts)


def write(chapters: dict[str, str], path: Path = SNAPSHOT) -> None:
    """Freeze chapters in a file that `read` reads."""
    for name, words in chapters.items():
        if "\f" in words or "\0" in words:
            raise ValueError(f"{name} contains a form feed or a zero byte, which mark chapters here")
    text = "".join(f"\f{name}\n{words}" for name, words in chapters.items())
    path.write_text(text, encoding="utf-8")


def encode(text: str) -> Tensor:
    """UTF-8 bytes as ids, [N], uint8; any text, no vocabulary to learn."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(ids: Tensor) -> str:
    """Text of ids, [N]; � where bytes are no UTF-8."""
    return bytes(ids.tolist()).decode(errors="replace").replace("\0", "")


def split(chapters: dict[str, str]) -> Split:
    """Whole chapters for training, whole others held out.

    A split inside a chapter would let a model quote what it was trained on.
    """
    parts: dict[bool, list[str]] = {False: [], True: []}
    for i, name in enumerate(chapters):
        parts[i % HELD_OUT == HELD_OUT - 1].append(name)
    train, held_out = (
        torch.cat([encode("\0" + chapters[name]) for name in names] or [encode("")])
        for names in parts.values()
    )
    return Split(train, held_out, parts[False], parts[True])


if __name__ == "__main__":
    found = gather(Path.cwd())
    write(found)
    print(f"{len(found)} chapters, {SNAPSHOT.stat().st_size:,} bytes in {SNAPSHOT.relative_to(Path.cwd())}")
