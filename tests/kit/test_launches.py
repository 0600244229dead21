"""Every kernel that a chapter's benchmark or notebook starts fits each GPU generation, found by starting them there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmbook.kit import ahead
from llmbook.kit.generations import generation

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("sm", ahead.TARGETS)
def test_what_chapters_launch_fits_shared_memory_and_what_they_time_does_not_spill(sm):
    script = ROOT / "tests/launches.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, script, str(sm)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    # Every chapter with a kernel has started some, from its benchmark and from its notebook.
    sources = {source for row in rows for source in row["sources"]}
    chapters = {name.split(".")[2] for name in ahead.kernel_modules()}
    assert sources == {f"{chapter}'s {walk}" for chapter in chapters for walk in ("benchmarks", "notebooks")}
    for row in rows:
        assert row["shared"] <= generation(sm).shared == row["limit"], row
        if any(source.endswith("benchmarks") for source in row["sources"]):
            assert row["spills"] == 0, row
