"""Run all: `python -m tools.run [--pretend 90] [--compare] [notebook …]`, every chapter if none is named.

Every cell of every notebook runs, in a clean kernel, with whatever versions and GPU are here; nothing is written. All
failures are listed, not the first one only. With --pretend the kernel is told that it has a GPU (tests/pretend);
with --compare what is printed has to be what is stored.
"""

import argparse
import asyncio
import difflib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tools.chapters import ROOT, Chapter, chapters

START = "from tests.pretend import start\nstart({sm})"
COMPARED = ("text/plain", "text/html", "text/latex", "image/svg+xml")
UNSTABLE = {"nbval-ignore-output", "compiler"}  # tags: never the same; the same with the same compiler only


@dataclass(frozen=True)
class Failure:
    """A cell that raised, or whose output is not the stored one."""

    chapter: str
    cell: int
    what: str

    def __str__(self) -> str:
        return f"{self.chapter}, cell {self.cell}: {self.what}"


def execute(notebook: Any, folder: Path, *, pretend: int | None = None, timeout: float = 600) -> None:
    """Run a notebook's cells in a clean kernel, every one, also after one has failed; outputs are written into it.

    Args:
        folder: where the kernel works.
        pretend: compute capability × 10 of a GPU to pretend; None for what is here.
        timeout: seconds a cell may take.
    """
    if pretend is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(START.format(sm=pretend)))
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", allow_errors=True, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=40"],
    )
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if pretend is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.pop("TRITON_INTERPRET", None)
    asyncio.run(client.async_execute(env=environment))  # closes its loop, as execute() does not
    if pretend is not None:
        started = error_of(notebook.cells.pop(0))
        if started:
            raise RuntimeError(f"the pretended GPU did not start: {started}")


def error_of(cell: Any) -> str:
    """What a cell raised, or ""."""
    errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
    return f"{errors[0].ename}: {errors[0].evalue}" if errors else ""


def run(chapter: Chapter, *, pretend: int | None = None, compare: bool = False) -> list[Failure]:
    """Execute a chapter; the cells that raised, and with `compare` those whose outputs are not the stored ones."""
    stored, notebook = (nbformat.read(chapter.notebook, as_version=4) for _ in range(2))
    execute(notebook, chapter.notebook.parent, pretend=pretend)
    failures = []
    for i, (cell, before) in enumerate(zip(notebook.cells, stored.cells, strict=True)):
        compared = compare and not UNSTABLE & set(cell.metadata.get("tags", []))
        if what := error_of(cell) or (difference(before, cell) if compared else ""):
            failures.append(Failure(chapter.file, i, what))
    return failures


def difference(before: Any, after: Any) -> str:
    """What a cell's outputs print now and did not, as a diff; "" where they agree."""
    stored, now = (_printed(cell).splitlines() for cell in (before, after))
    lines = difflib.unified_diff(stored, now, "stored", "now", lineterm="", n=0)
    return "\n".join(line[:300] for line in lines)


def _printed(cell: Any) -> str:
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            parts.append(output.text)
        else:
            data = output.get("data", {})
            parts += ["".join(data[kind]) for kind in COMPARED if kind in data]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.run", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--pretend", type=int, metavar="SM", help="compute capability × 10 of a GPU to pretend")
    parser.add_argument("--compare", action="store_true", help="outputs must equal the stored ones")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    chosen = parser.parse_args(arguments)
    wanted = [Chapter(path.resolve().parent.name, path.stem) for path in chosen.notebooks] or chapters()

    def one(chapter: Chapter) -> list[Failure]:
        began = time.perf_counter()
        found = run(chapter, pretend=chosen.pretend, compare=chosen.compare)
        print(f"{chapter.file}: {len(found)} failures, {time.perf_counter() - began:.0f} s", flush=True)
        print(*found, sep="\n", end="\n" if found else "", flush=True)
        return found

    with ThreadPoolExecutor(chosen.jobs) as pool:
        failures = [failure for found in pool.map(one, wanted) for failure in found]
    print(f"{len(wanted)} notebooks, {len(failures)} failing cells")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
