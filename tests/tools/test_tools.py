"""The tools that write: one address everywhere, skeletons that work, pages equal to their data."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmbook.kit import ahead
from tools import chapters as book
from tools import maps, pages, skeleton, stamp
from tools.refresh import comparable
from tools.verbatim import verbatim

ROOT = book.ROOT


@pytest.fixture
def copy(tmp_path):
    """The repository's tracked files, to be changed freely."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_generated_pages_equal_their_data():
    assert pages.stale() == []


def test_every_part_has_a_map_with_a_place_for_each_chapter():
    for chapter in book.chapters():
        shapes, height, places = maps.MAPS[chapter.part]()
        assert shapes
        x, y = places[chapter.name]
        assert 0 < x < maps.WIDTH
        assert 0 < y < height


def test_a_chapter_without_a_place_stands_under_the_map():
    stray = book.Chapter("foundations", "dropout")
    _, height, _ = maps.MAPS["gpu"]()
    html = maps.picture("gpu", [stray], "a map")
    assert 'height="' + str(height + 36) in html.replace("'", '"')
    assert "../../notebooks/foundations/dropout.html" in html


def test_a_new_address_is_stamped_everywhere(copy):
    old = book.repository(copy).removeprefix("https://github.com/")
    for path, text in stamp.stamped(copy, "https://github.com/some-one/a.fork").items():
        path.write_text(text)
    assert book.repository(copy) == "https://github.com/some-one/a.fork"
    for path in [*copy.glob("*.*"), *copy.glob("notebooks/*/*.ipynb")]:
        if path.is_dir():
            continue
        assert old not in path.read_text(), path
    for chapter in book.chapters(copy):
        text = chapter.notebook.read_text()
        assert "git+https://github.com/some-one/a.fork" in text
        assert "colab.research.google.com/github/some-one/a.fork/blob" in text


@pytest.mark.parametrize(
    "address", ["", "github.com/a/b", "https://gitlab.com/a/b", "https://github.com/a", "https://github.com/a/b/c",
                "https://github.com/a/b.git", "https://github.com/a b/c", "https://github.com/a/b\nc"],
)
def test_a_bad_address_is_refused_and_nothing_is_stamped(copy, address):
    before = {path: path.read_text() for path in copy.glob("*.yml")}
    with pytest.raises(ValueError, match=r"must read https://github\.com/owner/name"):
        stamp.stamped(copy, address)
    assert before == {path: path.read_text() for path in copy.glob("*.yml")}


@given(st.lists(st.sampled_from(skeleton.PARTS), max_size=4))
def test_parts_keep_their_order_in_the_table_of_contents(parts):
    toc = (ROOT / "_toc.yml").read_text()
    for n, part in enumerate(parts):
        toc = skeleton._with_chapter(toc, part, f"new_{n}")
    captions = [entry["caption"] for entry in yaml.safe_load(toc)["parts"]]
    order = [*skeleton.CAPTIONS.values(), "Reference"]
    assert captions == sorted(captions, key=order.index)
    assert len(set(captions)) == len(captions)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("kitchen", "x", "the parts are"), ("gpu", "Flash", "lower-case"), ("gpu", "../x", "lower-case"),
        ("gpu", "flash_attention", "exists already"),
    ],
)
def test_a_skeleton_that_cannot_be_is_refused(copy, part, name, message):
    with pytest.raises(ValueError, match=message):
        skeleton.create(copy, part, name)


@pytest.mark.slow
def test_a_skeleton_builds_and_passes_the_tests_of_a_chapter(copy):
    """Written into a copy of the repository, refreshed, then held to the tests every chapter is held to."""
    skeleton.create(copy, "foundations", "means")

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=copy, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(copy)},
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    run("-m", "tools.refresh", "notebooks/foundations/means.ipynb")
    run("-m", "tools.refresh", "--check", "notebooks/foundations/means.ipynb")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/foundations", "tests/notebooks", "-k", "means")
    run("-m", "ruff", "check", "llmbook/foundations", "tests/foundations", "notebooks/foundations")
    assert "Foundations" in (copy / "_toc.yml").read_text()


def test_verbatim_cells():
    source = "# llmbook.kit.exercise: expect\nstale = 1"
    text = verbatim(source)
    assert text.startswith("# llmbook.kit.exercise: expect\ndef expect(")
    assert "stale" not in text
    assert verbatim("x = 1") is None
    assert verbatim("# a comment: with words\nx") is None
    with pytest.raises(ValueError, match="names what is not there"):
        verbatim("# llmbook.kit.exercise: nothing_here")
    with pytest.raises(ValueError, match="TARGETS, which is neither"):
        verbatim("# llmbook.kit.ahead: TARGETS")


def test_staleness_ignores_fonts_but_not_pictures():
    notebook = json.loads((book.chapters()[0].notebook).read_text())
    text = json.dumps(notebook)
    bigger = json.loads(text)
    changed = None
    for cell in bigger["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"], changed = "AAAA", output
    assert changed
    assert comparable(text) == comparable(json.dumps(bigger))
    del changed["data"]["image/png"]
    assert comparable(text) != comparable(json.dumps(bigger))


def test_every_link_of_the_reading_list_names_a_planned_chapter_once_per_section():
    entries = yaml.safe_load((ROOT / "book/data/reading.yml").read_text())
    keys = [(entry["section"], entry["url"]) for entry in entries]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"§[\w.]+", entry["section"]) and entry["url"].startswith("https://") for entry in entries)


def test_the_glossary_is_sorted_and_complete():
    entries = yaml.safe_load((ROOT / "book/data/glossary.yml").read_text())
    terms = [entry["term"].casefold() for entry in entries]
    assert terms == sorted(set(terms))
    assert all(entry["zh"] and entry["definition"] and entry["chapter"] for entry in entries)
    named = {entry["chapter"] for entry in entries}
    assert {chapter.name for chapter in book.chapters()} <= named


def test_the_environment_satisfies_both_the_lock_and_the_ranges():
    """requirements.txt names exact versions, each within pyproject.toml's range for Colab."""
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    locked = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    assert all(str(requirement.specifier).startswith("==") for requirement in locked.values())
    colab = {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.1.3", "matplotlib": "3.10.0", "ipywidgets": "7.7.1"}
    for needed in map(Requirement, requires("llmbook")):
        name = canonicalize_name(needed.name)
        exact = str(locked[name].specifier).removeprefix("==")
        assert needed.specifier.contains(exact)
        assert version(name).split("+")[0] == exact
        if name in colab:
            assert needed.specifier.contains(colab[name]), f"installing llmbook would change Colab's {name}"


def test_files_stay_short_and_speak_of_the_project_alone():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        path = ROOT / name
        if path.suffix == ".py" and path.exists() and not name.startswith("tests/"):
            assert len(path.read_text().splitlines()) <= 300, name


# --- kernels ahead of time, in a process that does not interpret


@pytest.mark.slow
@pytest.mark.parametrize("module", ahead.kernel_modules())
def test_kernels_compile_for_five_generations_within_shared_memory(module):
    rows = ahead.report(module)
    builds = importlib.import_module(module).BUILDS
    wanted = Counter(sm for build in builds for sm in build.targets or ahead.TARGETS)
    assert Counter(row["sm"] for row in rows) == wanted
    for row in rows:
        assert row["shared"] <= row["limit"], row
        assert row["registers"] <= 255, row
        assert row["spills"] == 0, row


def test_a_kernel_that_does_not_compile_is_reported(tmp_path, monkeypatch):
    (tmp_path / "bad_kernel.py").write_text(
        "from llmbook.kit.kernels import Build, tl, triton\n\n@triton.jit\ndef bad(x):\n    tl.store(x, y)\n\n"
        "BUILDS = [Build(bad, {'x': '*fp32'}, lambda sm: {})]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)compiling bad_kernel ahead of time failed.*y is not defined"):
        ahead.report("bad_kernel")


def test_notebooks_are_valid_json_with_one_trailing_newline():
    for chapter in book.chapters():
        text = chapter.notebook.read_text()
        assert text.endswith("}\n")
        assert nbformat.reads(text, as_version=4).nbformat == 4
