"""`python -m llmbook.bench`: all chapters whatever happens, an exit code that says how, and on a bare machine."""

import subprocess
import sys

import pytest
import torch

from llmbook import bench
from llmbook.kit import measure
from tests.kit.test_measure import case, clock, raising


def test_bench_without_a_gpu_or_with_a_wrong_name_says_so(capsys):
    assert bench.main([]) == 2
    assert "No GPU here: nothing was measured" in capsys.readouterr().err
    assert bench.main(["gpu/no_such"]) == 2
    assert "no benchmark for gpu/no_such; there are:" in capsys.readouterr().err
    assert bench.main(["--list"]) == 0
    assert "gpu/flash_attention" in capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    source = dict.fromkeys(("capability", "driver", "torch", "triton", "date", "commit"), "1")
    monkeypatch.setattr(measure, "provenance", lambda: {"device": "NVIDIA Test 1", **source})
    monkeypatch.setattr(measure, "gpu_here", lambda: True)
    monkeypatch.setattr(measure, "RECORDED", tmp_path)
    monkeypatch.setattr(measure, "Stopwatch", lambda: clock)


@pytest.mark.parametrize(("broken", "code"), [("", 0), ("wrong", 1), ("none", 1), ("raises", 1), ("skipped", 0)])
def test_bench_goes_through_all_chapters_and_its_exit_code_says_how(gpu, broken, code, tmp_path, capsys, monkeypatch):
    """The first of two chapters is broken: the second is measured and written all the same."""
    first = {
        "": [case()], "wrong": [case(), case(1.0)], "none": [case(1.0)], "raises": None,
        "skipped": [case(), case(run=raising(torch.OutOfMemoryError("out of memory")))],
    }[broken]

    class Module:
        def __init__(self, made):
            self.cases = lambda: made if made is not None else raising(OSError("no such thing"))()

    modules = {"flash_attention": Module(first), "roofline": Module([case()])}
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: modules[name.split(".")[2]])
    assert bench.main(["gpu/flash_attention", "gpu/roofline"]) == code
    said = capsys.readouterr()
    assert (tmp_path / "nvidia-test-1/roofline.json").exists()
    assert (tmp_path / "nvidia-test-1/flash_attention.json").exists() == (broken not in ("none", "raises"))
    assert ("gpu/flash_attention: " in said.err) == (code == 1)


BARE = """
import sys
for name in ("tqdm", "tqdm.auto", "transformers", "ipywidgets", "IPython", "svg", "safetensors"):
    sys.modules[name] = None
import importlib, torch
from llmbook import bench
from llmbook.kit import measure, stopwatch
stopwatch.ROUNDS = (2, 2)
torch.compile = lambda function, **options: function
sys.stdout.isatty = lambda: True
for chapter in bench.chapters():
    module = importlib.import_module(f"llmbook.{chapter.replace('/', '.')}.benchmark")
    if chapter in ("block/llama", "gpu/online_softmax"):
        timed, without = measure.run(module.cases(**module.SMALL), lambda call: call() is None or 1.0)
        assert timed and not without, without
print("all there")
"""


def test_a_bare_gpu_machine_needs_neither_tqdm_nor_transformers():
    ran = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("all there\n")
    assert "Hugging Face, eager      unavailable: import of transformers halted" in ran.stdout
