"""Every notebook that can meet a GPU runs on a pretended one, cell by cell; and cells broken on purpose are caught."""

import ast
import functools
import re

import grimp
import nbformat
import pytest

from tools.chapters import ROOT, chapters
from tools.run import error_of, execute

MEETING = {"llmbook.kit.kernels", "llmbook.kit.ranks", "llmbook.kit.measure"}
# chapter → (a line of one of its cells, the same line with a mistake, what CUDA says to it)
MISTAKES = {
    "online_softmax": [("x.double().softmax(-1)", "x.cpu().double().softmax(-1)", "Expected all tensors")],
    "rope": [("up = [torch.randn_like(t) for", "up = [torch.randn_like(t).cpu() for", "invalid gradient")],
    "attention_and_kv_cache": [
        ("torch.equal(o, paged)", "torch.equal(o.cpu(), paged)", "Expected all tensors"),
        ("pages.page_table().int()", "pages.page_table().int().cpu()", "kernels run on cuda here"),
    ],
    "deepseek_moe": [("ours(x.to(DEVICE))[0].cpu()", "ours(x.to(DEVICE))[0]", "Expected all tensors")],
}


def code(chapter):
    notebook = nbformat.read(chapter.notebook, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@functools.cache
def graph():
    return grimp.build_graph("llmbook")


def meets_a_gpu(chapter):
    """Whether a notebook names cuda, or imports, through whatever modules, kernels, processes or measurements."""
    source, modules = code(chapter), graph().modules
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    reached = set().union(*(graph().find_upstream_modules(name) | {name} for name in imported & modules))
    return bool(reached & MEETING) or "cuda" in source


CHAPTERS = [chapter for chapter in chapters() if meets_a_gpu(chapter)]
# Large notebooks first, as a rule the slow ones: so that no worker is left alone with one at the end.
CHAPTERS.sort(key=lambda chapter: -chapter.notebook.stat().st_size)
# The two ends of what the book tells apart: no bf16 and little shared memory; and copies by descriptors.
RUNS = [(chapter, sm) for sm in (75, 90) for chapter in CHAPTERS if sm == 75 or "kit.kernels" in code(chapter)]


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "sm"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_it_runs_on_a_gpu(chapter, sm):
    notebook = nbformat.read(chapter.notebook, as_version=4)
    expected = {}
    for right, wrong, says in MISTAKES.get(chapter.name, []):
        at, cell = next((i, cell) for i, cell in enumerate(notebook.cells) if right in cell.source)
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(cell.source.replace(right, wrong)))
        expected[notebook.cells[at + 1].id] = says
    execute(notebook, chapter.notebook.parent, pretend=sm)
    found = {cell.id: error_of(cell) for cell in notebook.cells}
    unexpected = [f"{error}\nin:\n{cell.source}" for cell in notebook.cells
                  if (error := found[cell.id]) and cell.id not in expected]
    assert not unexpected, "\n\n".join(unexpected)
    for cell, says in expected.items():
        assert says in found[cell], f"a mistake was not caught: {found[cell]!r}"


def test_the_rule_leaves_out_only_what_meets_no_gpu():
    # By the files of a chapter and the words of its notebook, not by imports.
    for chapter in set(chapters()) - set(CHAPTERS):
        library = ROOT / "llmbook" / chapter.part / chapter.name
        assert not [*library.glob("kernel*.py"), *library.glob("benchmark.py")]
        assert not re.search(r"kit\.kernels|measure\.report|ranks\.run|DEVICE", code(chapter))


def test_every_mistake_is_made_in_a_notebook_that_runs():
    assert set(MISTAKES) <= {chapter.name for chapter in CHAPTERS}
