"""Write the pages and tables that are data: README's and the index's chapters, hardware, errata, glossary, reading.

`python -m tools.pages` rewrites them; with --check it only compares. They are committed, so that a reader of the
repository sees them too, and a test holds them equal to what this writes.
"""

import argparse
import base64
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import yaml

from llmbook.kit.erratum import MIME, VERDICTS
from llmbook.kit.hardware import GPUS, LINKS, SHARED_PER_BLOCK
from tools import maps
from tools.chapters import ROOT, Chapter, chapters, colab_link

NOTE = "% Written by `python -m tools.pages`; edit its data instead.\n\n"
MARKS = ("<!-- chapters: written by tools/pages.py -->", "<!-- end of chapters -->")


def readme() -> str:
    """README.md with its table of chapters."""
    rows = ["| chapter | the question | run it |", "|---|---|---|"]
    for chapter in chapters():
        badge = f"[![Open in Colab](book/_static/colab.svg)]({colab_link(chapter)})"
        rows.append(f"| [{chapter.title()}]({chapter.file}.ipynb) | {chapter.question()} | {badge} |")
    return _between((ROOT / "README.md").read_text(), rows)


def _between(text: str, lines: list[str]) -> str:
    """The text with these lines between its marks."""
    start, end = (text.index(mark) for mark in MARKS)
    return text[:start] + MARKS[0] + "\n\n" + "\n".join(lines) + "\n\n" + text[end:]


def index() -> str:
    """book/index.md with a heading for each part and a card for each chapter: its first picture, title and question."""
    lines = []
    for name in dict.fromkeys(chapter.part for chapter in chapters()):
        title = (ROOT / f"book/parts/{name}.md").read_text().splitlines()[0].removeprefix("# ")
        lines += [f"## [{title}](parts/{name}.md)", "", "::::{grid} 1 1 2 2", ":gutter: 3", ""]
        for chapter in chapters():
            if chapter.part == name:
                lines += [
                    f":::{{grid-item-card}} {chapter.title()}", f":link: ../{chapter.file}", ":link-type: doc",
                    f":img-top: _static/stills/{chapter.name}.png", f":img-alt: {chapter.title()}", "",
                    chapter.question(), ":::", "",
                ]
        lines += ["::::", ""]
    return _between((ROOT / "book/index.md").read_text(), lines)


def part(name: str) -> str:
    """book/parts/<name>.md with the part's map and its chapters' questions."""
    page = (ROOT / f"book/parts/{name}.md").read_text()
    mine = [chapter for chapter in chapters() if chapter.part == name]
    title = page.splitlines()[0].removeprefix("# ")
    lines = ["```{raw} html", maps.picture(name, mine, f"{title}: a map with a link to each chapter"), "```", ""]
    lines += [f"{n}. [{c.title()}](../../{c.file}.ipynb). {c.question()}" for n, c in enumerate(mine, 1)]
    return _between(page, lines)


def stills() -> dict[Path, bytes]:
    """Each chapter's first picture, as its stored notebook has it."""
    found = {}
    for chapter in chapters():
        outputs = [o for cell in nbformat.read(chapter.notebook, as_version=4).cells for o in cell.get("outputs", [])]
        first = next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {}))
        found[ROOT / f"book/_static/stills/{chapter.name}.png"] = base64.b64decode(first)
    return found


def hardware() -> str:
    lines = [
        NOTE + "# Hardware\n",
        "Peak rates as the vendors print them, dense: pages that show the 2:4-sparse figure show twice as much. GB is 10⁹ bytes,",
        "KiB and MiB are powers of two. The ridge is the arithmetic intensity above which half-precision work is compute-bound:",
        "rate ÷ bandwidth. Every chapter that needs one of these numbers takes it from `llmbook.kit.hardware`, the source of this page.\n",
        "## Rates\n",
        "| GPU | sm | fp16 TFLOP/s | bf16 too | fp32 TFLOP/s | memory GB | GB/s | ridge FLOP/B | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {g.name} | {g.sm} | {g.half:,g} | {'yes' if g.bf16 else 'no'} | {g.single:g} | {g.memory:g} | "
        f"{g.bandwidth:,} | {g.ridge:.0f} | [page]({g.source}) |"
        for g in GPUS
    ]
    lines += [
        "\n## Sizes\n", "| GPU | SMs | L2 MiB | shared memory per SM, KiB | per block at most, B | NVLink GB/s, both ways |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {g.name} | {g.sms} | {g.l2:g} | {g.shared} | {SHARED_PER_BLOCK[g.sm]:,} | {g.nvlink or '–'} |" for g in GPUS
    ]
    lines += [
        "\nShared memory per block: the CUDA programming guide's table of compute capabilities; the driver keeps 1 KiB of each SM's",
        "for itself from sm_80 on. The T4's datasheet prints 300 GB/s; 320 is memory clock × width, and what its product page",
        "prints. The H200's L2 is what the device reports; NVIDIA prints none.\n",
        "## Links\n", "One direction, before protocol overhead.\n", "| link | GB/s | source |", "|---|---|---|",
    ]
    lines += [f"| {link.name} | {link.bandwidth:.4g} | [page]({link.source}) |" for link in LINKS]
    return "\n".join(lines) + "\n"


def errata() -> str:
    """The ledger: every erratum cell that a chapter's stored run holds."""
    lines = [
        NOTE + "# Errata\n",
        "The notes that this book mirrors, claim by claim where a chapter tested one. Each row is the output of a cell: the",
        "verdict stands only because the condition next to it held when the cell ran, and it runs again on every replay.\n",
    ]
    found = 0
    for chapter in chapters():
        rows = _errata_of(chapter)
        if rows:
            lines += [f"## [{chapter.title()}](../{chapter.file}.ipynb)\n"]
            lines += ["| notes | claim | verdict | this run | what holds |", "|---|---|---|---|---|"]
            lines += [
                "| " + " | ".join(_cell(row[key]) for key in ("section", "claim", "verdict", "shown", "holds")) + " |"
                for row in rows
            ]
            lines.append("")
        found += len(rows)
    lines.append(f"{found} claims tested so far.")
    return "\n".join(lines) + "\n"


def _errata_of(chapter: Chapter) -> list[dict[str, str]]:
    notebook = nbformat.read(chapter.notebook, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    rows = [dict(output["data"][MIME]) for output in outputs if MIME in output.get("data", {})]
    for row in rows:
        row["verdict"] = f"**{VERDICTS[row['verdict']]}**"
    return rows


def _cell(words: str) -> str:
    """Text for a table: no pipes, and nothing that MyST would read as maths or emphasis."""
    return words.replace("|", "\\|").replace("$", "\\$").replace("~", "\\~")


def glossary() -> str:
    entries = _data("glossary")
    known = {chapter.name: chapter for chapter in chapters()}
    lines = [
        NOTE + "# Glossary\n", "English, 中文, and the chapter that introduces the term; a chapter without a link is still to come.\n",
        "| term | 中文 | meaning | chapter |", "|---|---|---|---|",
    ]
    for entry in entries:
        where = _where(entry["chapter"], known)
        lines.append(f"| {entry['term']} | {entry['zh']} | {_cell(entry['definition'])} | {where} |")
    return "\n".join(lines) + "\n"


def reading() -> str:
    known = {chapter.name: chapter for chapter in chapters()}
    lines = [
        NOTE + "# Reading\n", "## The notes' links\n", "In the notes' own order, most of them in Chinese, each with the chapter that covers it.\n",
        "| notes | what it is | chapter |", "|---|---|---|",
    ]
    for entry in _data("reading"):
        name = entry["chapter"]
        where = _where(name, known) if name in known else f"{name}: coming"
        lines.append(f"| {entry['section']} | [{_cell(entry['title'])}]({entry['url']}) | {where} |")
    lines += ["\n## Papers\n", "```{bibliography}\n:all:\n:style: unsrt\n```"]
    return "\n".join(lines) + "\n"


def _data(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load((ROOT / f"book/data/{name}.yml").read_text())
    return entries


def _where(name: str, known: dict[str, Chapter]) -> str:
    chapter = known.get(name)
    return f"[{name}](../{chapter.file}.ipynb)" if chapter else name


PAGES: dict[str, Callable[[], str]] = {
    "README.md": readme, "book/index.md": index, "book/hardware.md": hardware, "book/errata.md": errata, "book/glossary.md": glossary,
    "book/reading.md": reading, **{f"book/parts/{name}.md": partial(part, name) for name in maps.MAPS},
}


def stale() -> list[Path]:
    """The pages that differ from what their data says."""
    paths = [(ROOT / name, write) for name, write in PAGES.items()]
    pages = [path for path, write in paths if not path.exists() or path.read_text() != _tidy(write())]
    return pages + [path for path, png in stills().items() if not path.exists() or path.read_bytes() != png]


def _tidy(text: str) -> str:
    """At most one empty line in a row."""
    return re.sub(r"\n{3,}", "\n\n", text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from its data")
    chosen = parser.parse_args()
    if chosen.check:
        for path in stale():
            print(f"{path.relative_to(ROOT)} differs from its data; run `make pages`", file=sys.stderr)
        return 1 if stale() else 0
    for name, write in PAGES.items():
        (ROOT / name).write_text(_tidy(write()))
    for path, png in stills().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
