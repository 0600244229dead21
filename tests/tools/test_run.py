"""Run all, and as on Colab: every failure is listed, what changed is shown, and what may change is not compared."""

import re

import nbformat
import pytest
import yaml

from tools import colab, run
from tools.chapters import ROOT, Chapter

V4 = nbformat.v4


def notebook(tmp_path, *cells):
    """A chapter of these code cells: (source, stored text, tags)."""
    made = []
    for source, stored, tags in cells:
        cell = V4.new_code_cell(source, metadata={"tags": tags})
        cell.outputs = [V4.new_output("stream", name="stdout", text=stored)] if stored else []
        made.append(cell)
    chapter = Chapter("gpu", "tried", tmp_path)
    chapter.notebook.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(V4.new_notebook(cells=[V4.new_markdown_cell("# Tried"), *made]), chapter.notebook)
    return chapter


def test_all_failures_are_listed_and_nothing_is_written(tmp_path):
    chapter = notebook(
        tmp_path, ("1 / 0", "", []), ("print('same')", "same\n", []), ("print('now')", "then\n", []),
        ("print('any')", "other\n", ["nbval-ignore-output"]), ("print(88)", "96\n", ["compiler"]), ("x", "", []),
    )
    before = chapter.notebook.read_bytes()
    found = run.run(chapter, compare=True)
    assert [failure.cell for failure in found] == [1, 3, 6]
    assert found[0].what == "ZeroDivisionError: division by zero"
    assert "-then" in found[1].what
    assert "+now" in found[1].what
    assert str(found[2]) == "notebooks/gpu/tried, cell 6: NameError: name 'x' is not defined"
    assert [failure.cell for failure in run.run(chapter)] == [1, 6]
    assert chapter.notebook.read_bytes() == before


def test_a_pretended_gpu_starts_before_the_first_cell(tmp_path):
    chapter = notebook(
        tmp_path, ("import torch; print(torch.cuda.get_device_capability())", "(7, 5)\n", []),
        ("torch.ones(1, device='cuda').numpy()", "", []),
    )
    (failure,) = run.run(chapter, pretend=75, compare=True)
    assert failure.cell == 2
    assert "can't convert cuda" in failure.what
    with pytest.raises(RuntimeError, match="did not start: KeyError: 70"):
        run.run(chapter, pretend=70)


def test_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    chapter = notebook(tmp_path, ("print(1)", "2\n", []))
    monkeypatch.setattr(run, "chapters", lambda: [chapter])
    assert run.main([]) == 0
    assert run.main(["--compare"]) == 1
    assert "1 notebooks, 1 failing cells" in capsys.readouterr().out


def test_colabs_list_is_whole_and_read():
    title, listed = colab.read(colab.LIST)
    assert re.search("2026-.*Python 3.13", title)
    assert len(listed) > 600
    assert listed["torch"] == "2.11.0"
    assert {colab._canonical(name) for name in (*colab.BOOK, *colab.RUN)} <= listed.keys()
    assert not any(name.startswith(("cuda-", "nvidia-")) for name in listed)


def test_what_differs_from_colab_is_said():
    title, listed = "# GPU image, 2026-08-19, Python 3.13.15; packages".removeprefix("# "), {"numpy": "2.1.3", "a": "1"}
    assert colab.differences(title, listed, {"numpy": "2.1.3", "other": "5"}, "3.13.15") == []
    assert colab.differences(title, listed, {"numpy": "2.2.0+cpu", "a": "1"}, "3.12.1") == [
        "Python 3.12.1 here, 3.13.15 there", "numpy 2.2.0+cpu here, 2.1.3 there",
    ]


def test_the_weekly_run_is_make_colab_on_the_gpu_list():
    workflow = (ROOT / ".github/workflows/colab.yml").read_text(encoding="utf-8")
    assert "pip-freeze.gpu.txt" in workflow
    assert "make colab LIST=" in workflow
    assert "-m tools.colab" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_book_is_not_built_from_what_git_ignores():
    # Sphinx would read every page of every package in there.
    folders = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    ours = [folder for folder in folders if not re.search(r"[*/]|__pycache__", folder)]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert {".venv", ".colab", "_build"} <= set(ours) <= set(config["exclude_patterns"])
