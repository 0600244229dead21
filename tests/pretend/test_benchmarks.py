"""Every chapter's benchmark cases, small, on every generation of GPU that the book knows, pretended."""

import os
import subprocess
import sys

import pytest

from llmbook.bench import chapters
from tools.chapters import ROOT

SCRIPT = """
import importlib, sys
from tests.pretend import start
start(int(sys.argv[1]))
from llmbook.kit import measure
for name in sys.argv[2:]:
    module = importlib.import_module(f"llmbook.{name.replace('/', '.')}.benchmark")
    timed, _ = measure.run(module.cases(**module.SMALL), lambda call: call() is None or 1.0)
    print("CHAPTER", name, len(timed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sm", [90, 120])  # notebooks, which check their cases too, run on a T4
def test_every_chapter_is_measured(sm):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sm), *chapters()], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("CHAPTER") == len(chapters())
