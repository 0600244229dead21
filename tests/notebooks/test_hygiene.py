"""Every notebook follows the anatomy, ran from top to bottom, and shows the library's own source."""

import ast
import json
import re

import nbformat
import pytest

from tools.chapters import ROOT, chapters, colab_link, repository
from tools.refresh import SETUP, STATE
from tools.verbatim import verbatim

TAGS = {"setup", "badge", "hide-input", "hide-cell", "solution", "proof", "nbval-ignore-output", "compiler"}
SECTIONS = [
    "The picture", "Is it right?", "What does it cost?", "In production", "Exercises", "From the notes",
    "Going further",
]
CHAPTERS = chapters()
chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: f"{c.part}/{c.name}")


def cells(chapter, kind="code"):
    notebook = nbformat.read(chapter.notebook, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_every_notebook_is_a_chapter_of_the_book():
    listed = {c.notebook for c in CHAPTERS}
    assert set((ROOT / "notebooks").glob("*/*.ipynb")) == listed


@chapter
def test_it_ran_from_top_to_bottom_without_an_error(chapter):
    code = cells(chapter)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]


@chapter
def test_it_is_small_enough_and_valid(chapter):
    assert chapter.notebook.stat().st_size < 3_000_000
    nbformat.validate(nbformat.read(chapter.notebook, as_version=4))


@chapter
def test_its_tags_are_known(chapter):
    notebook = nbformat.read(chapter.notebook, as_version=4)
    assert {tag for cell in notebook.cells for tag in tags(cell)} <= TAGS


@chapter
def test_what_a_compiler_made_is_marked_as_such(chapter):
    for cell in cells(chapter):
        if re.search(r"^[^#]*\bahead\.report\(", cell.source, flags=re.M):
            assert "compiler" in tags(cell), "a cell that calls ahead.report needs the tag `compiler`"


@chapter
def test_no_print_takes_the_interpreter_for_the_world(chapter):
    # On a GPU the same line would be wrong.
    for cell in cells(chapter):
        printed = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
                   and isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not any("interpret" in ast.unparse(node).lower() for node in printed)


@chapter
def test_it_has_the_sections_of_the_anatomy_in_order(chapter):
    titles = re.findall(r"^## (.+)$", "\n".join(cell.source for cell in cells(chapter, "markdown")), flags=re.M)
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    assert titles[0] == "The picture"
    first = cells(chapter, "markdown")[0].source
    assert re.match(r"# .+\n\n[^\n]*[\s\S]*\?", first), "the first sentence is the question"
    for promise in ("**You will be able to**", "**You need**", "**Minutes to read:**"):
        assert promise in first


@chapter
def test_setup_and_badge_hold_the_repositorys_address(chapter):
    notebook = nbformat.read(chapter.notebook, as_version=4)
    setup = [cell for cell in notebook.cells if "setup" in tags(cell)]
    badge = [cell for cell in notebook.cells if "badge" in tags(cell)]
    assert [cell.source for cell in setup] == [SETUP.format(address=repository())]
    assert len(badge) == 1
    assert colab_link(chapter) in badge[0].source


@chapter
def test_cells_that_show_the_library_show_its_source(chapter):
    shown = 0
    for cell in cells(chapter):
        wanted = verbatim(cell.source)
        if wanted is not None:
            assert cell.source == wanted
            shown += 1
    assert shown, "a chapter shows its mechanism"


@chapter
def test_proofs_really_assert(chapter):
    """A proof cell compares something computed, and prints one line that says what held."""
    proofs = [cell for cell in cells(chapter) if "proof" in tags(cell)]
    assert len(proofs) >= 3
    for cell in proofs:
        tree = ast.parse(cell.source)
        asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "assert" in ast.unparse(node.func)]
        assert asserts or checks, cell.source
        for node in asserts:
            names = [part for part in ast.walk(node.test) if isinstance(part, ast.Name)]
            assert names, f"an assertion about constants cannot fail: {ast.unparse(node)}"
        assert any(output.get("text", "").strip() for output in cell.outputs), f"prints nothing:\n{cell.source}"


@chapter
def test_exercises_come_with_solutions_that_pass(chapter):
    open_, solved = [], []
    for cell in cells(chapter):
        text = "".join(output.get("text", "") for output in cell.outputs)
        if "not attempted yet" in text:
            open_.append(text)
        elif "solution" in tags(cell):
            assert "hide-cell" in tags(cell)
            assert text.startswith("✓"), text
            solved.append(text)
    assert len(open_) == len(solved) >= (3 if len(cells(chapter)) > 12 else 1)


@chapter
def test_questions_come_before_their_answers(chapter):
    for cell in cells(chapter):
        if re.search(r"^(quiz|explore|erratum)\(", cell.source, flags=re.M):
            assert {"hide-input", "proof"} & set(tags(cell)), cell.source[:200]
    assert any(re.search(r"^explore\(", cell.source, flags=re.M) for cell in cells(chapter))
    assert any(re.search(r"^quiz\(", cell.source, flags=re.M) for cell in cells(chapter))


@chapter
def test_lines_fit_the_page(chapter):
    for cell in cells(chapter):
        for line in cell.source.splitlines():
            assert len(line) <= 88, line


@chapter
def test_explorers_are_saved_with_a_still_picture(chapter):
    notebook = json.loads(chapter.notebook.read_text())
    state = notebook["metadata"]["widgets"][STATE]["state"]
    views = [
        output["data"] for cell in notebook["cells"] for output in cell.get("outputs", [])
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]
    for data in views:
        assert data["application/vnd.jupyter.widget-view+json"]["model_id"] in state
        assert len(data["text/plain"]) < 300
        assert "image/png" in data or "Quiz" in "".join(data["text/plain"])


@chapter
def test_no_cell_is_a_wall_of_code(chapter):
    for cell in cells(chapter):
        assert len(cell.source.splitlines()) <= 60, cell.source[:80]
