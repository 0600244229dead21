"""How long things take on this machine: `make numbers`. Printed, not asserted: a busy machine is not a bug."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmbook.kit import ranks
from llmbook.parallel.pipeline_parallel import schedules, simulate
from tools.chapters import ROOT, chapters


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def say(what: str, took: float, bound: float) -> None:
    print(f"{what:58} {took:7.2f} s   target {bound:g} s   {'' if took <= bound else 'over'}", flush=True)


def shell(command: str, cwd: Path = ROOT) -> float:
    return seconds(lambda: subprocess.run(command, shell=True, cwd=cwd, check=True, capture_output=True))


def main() -> int:
    run = lambda n: seconds(lambda: ranks.run(lambda comm: comm.rank, n))  # noqa: E731
    run(1)
    say("ranks.run, 4 processes", run(4), 0.5)
    say("ranks.run, 8 processes", run(8), 1)
    big = schedules.one_f_one_b(64, 1024)
    say("simulate 64 stages × 1,024 micro-batches", seconds(lambda: simulate.simulate(big, simulate.Cost(1, 2))), 1)
    for chapter in chapters():
        took = shell(f"{sys.executable} -m tools.refresh --check {chapter.file}.ipynb")
        say(f"replay {chapter.file}", took, 30)
    say("build the book", shell("rm -rf _build && make book"), 60)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        say("fresh clone to built book", shell("make book", clone), 180)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
