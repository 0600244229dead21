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
failed = 0
for name in sys.argv[2:]:
    module = importlib.import_module(f"llmbook.{name.replace('/', '.')}.benchmark")
    timed, without = measure.run(module.cases(**module.SMALL), lambda call: call() is None or 1.0)
    peers = {(row["name"], peer): result for row in timed for peer, result in row["peers"].items()}
    wrong = [(key, result) for key, result in peers.items() if "wrong" in result]
    print("CHAPTER", name, len(timed), without, wrong)
    failed += len(without) + len(wrong) + (not timed)
sys.exit(failed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sm", [75, 90, 120])  # no bf16; descriptors; little shared memory
def test_every_chapter_is_measured(sm):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sm), *chapters()], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("CHAPTER") == len(chapters())
