"""Refresh notebooks: `python -m tools.refresh [--check] [notebook …]`, every chapter if none is named.

Rewrites the cells that show library source, the setup cell and the badge; executes from top to bottom in a clean
kernel; renumbers widget ids; adds still pictures; normalises metadata. Unchanged code gives an unchanged file.
With --check nothing is written, and a notebook that would change is an error (bytes of PNGs aside, which fonts decide).
"""

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools.chapters import Chapter, chapters, colab_link, repository
from tools.stills import add_stills
from tools.verbatim import verbatim

STATE = "application/vnd.jupyter.widget-state+json"
SETUP = """\
# Does nothing where llmbook is installed; on Colab it installs it,
# and touches none of the packages that Colab brings.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("llmbook") is None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet",
         "git+{address}"],
        check=True,
    )"""


def refresh(chapter: Chapter) -> str:
    """The notebook's text after a refresh.

    Raises:
        CellExecutionError: a cell raised.
        ValueError: a cell header names what does not exist, or the setup or badge cell is missing.
    """
    notebook = nbformat.read(chapter.notebook, as_version=4)
    tagged = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    if missing := {"setup", "badge"} - tagged:
        raise ValueError(f"{chapter.file}: no cell has the tag {sorted(missing)}")
    for cell in notebook.cells:
        _write(cell, chapter)
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(environment)  # the stored run is the one every machine can repeat: without a GPU
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", coalesce_streams=True, store_widget_state=True,
        resources={"metadata": {"path": str(chapter.notebook.parent)}}, extra_arguments=["--log-level=40"],
    )
    client.execute()
    add_stills(notebook)
    _normalise(notebook)
    return nbformat.writes(_renumber(notebook), version=4) + "\n"


def _write(cell: Any, chapter: Chapter) -> None:
    """The parts of a cell that this tool owns."""
    tags = cell.metadata.get("tags", [])
    if "setup" in tags:
        cell.source = SETUP.format(address=repository(chapter.root))
    if "badge" in tags:
        cell.source = f"[![Open in Colab](../../book/_static/colab.svg)]({colab_link(chapter)})"
    if "solution" in tags:  # folded in JupyterLab and on Colab, as the page folds it by `hide-cell`
        cell.metadata["jupyter"] = {"source_hidden": True}
        cell.metadata["cellView"] = "form"
    if cell.cell_type == "code" and (text := verbatim(cell.source)) is not None:
        cell.source = text


def _normalise(notebook: Any) -> None:
    widgets = notebook.metadata.get("widgets")
    for model in widgets[STATE]["state"].values() if widgets else ():
        # None and [] are every widget's own defaults, a third of the file; but "nothing selected" is not one of them.
        model["state"] = {
            key: value for key, value in model["state"].items()
            if key in {"index", "selected_index"} or (value is not None and value != [])
        }
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **({"widgets": widgets} if widgets else {}),
    })
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({
            key: value for key, value in sorted(cell.metadata.items())
            if key in {"tags", "mystnb", "jupyter", "cellView"}
        })


def _renumber(notebook: Any) -> Any:
    """Widget ids are random; number them in order of creation, so that the same run is the same file."""
    saved = notebook.metadata.get("widgets", {}).get(STATE, {})
    numbers = {model: f"{i:032x}" for i, model in enumerate(saved.get("state", {}))}
    if not numbers:
        return notebook
    text = re.sub("|".join(numbers), lambda found: numbers[found.group()], json.dumps(notebook))
    return nbformat.reads(text, as_version=4)


def comparable(text: str) -> str:
    """A notebook's text without the bytes of its PNGs, which differ with fonts, and without what nbval ignores."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if "nbval-ignore-output" in cell["metadata"].get("tags", []):
            cell["outputs"] = []
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = "present"
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.refresh", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is stale")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time, each in a process of its own")
    chosen = parser.parse_args(arguments)
    # A notebook may be refreshed before `_toc.yml` lists it.
    wanted = [Chapter(path.resolve().parent.name, path.stem) for path in chosen.notebooks] or chapters()
    if chosen.jobs > 1 and len(wanted) > 1:
        return _side_by_side(wanted, chosen.check, chosen.jobs)
    failed = 0
    for chapter in wanted:
        before = chapter.notebook.read_text()
        try:
            after = refresh(chapter)
        except (CellExecutionError, ValueError) as error:
            print(f"{chapter.file}: {error}", file=sys.stderr)
            failed += 1
            continue
        if comparable(before) == comparable(after):
            after = before  # what may differ (fonts in PNGs, logged times) is no reason for a diff
        if not chosen.check:
            chapter.notebook.write_text(after)
            print(f"{chapter.file}: {'unchanged' if before == after else 'refreshed'}")
        elif before != after:
            stored, now = (comparable(text).splitlines() for text in (before, after))
            lines = list(difflib.unified_diff(stored, now, "stored", "now", lineterm="", n=0))[:40]
            print(f"{chapter.file}: stale; run `make notebooks`", file=sys.stderr)
            print(*[line[:300] for line in lines], sep="\n", file=sys.stderr)
            failed += 1
        else:
            print(f"{chapter.file}: fresh")
    return 1 if failed else 0


def _side_by_side(wanted: list[Chapter], check: bool, jobs: int) -> int:
    def one(chapter: Chapter) -> int:
        command = [sys.executable, "-m", "tools.refresh", *["--check"] * check, str(chapter.notebook)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        return done.returncode

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(one, wanted))


if __name__ == "__main__":
    sys.exit(main())
