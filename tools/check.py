"""Every test of the book, one stage after another, and a summary: `make test`."""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from tools.chapters import ROOT, chapters

BIN = Path(sys.executable).parent
WORKERS = str(min(os.cpu_count() or 1, 8))


@dataclass
class Stage:
    """One command; `junit` stages count their own tests, others count as one."""

    name: str
    command: list[str]
    junit: bool = False


@dataclass
class Outcome:
    passed: int
    failed: int
    skipped: int
    seconds: float


def stages() -> list[Stage]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "--dist", "loadscope"]
    spread = [*pytest[:-1], "worksteal"]  # one test, one notebook: no module's tests belong together
    notebooks = [str(chapter.notebook) for chapter in chapters()]
    units = ["-m", "not site", "--ignore", "tests/pretend", "tests"]
    nbval = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "-W", "default"]
    return [
        Stage("lint (ruff)", [str(BIN / "ruff"), "check", "."]),
        Stage("types (mypy)", [str(BIN / "mypy")]),
        Stage("import contracts", [str(BIN / "lint-imports")]),
        Stage("unit, property, reference, hygiene, kernels", [*pytest, *units], junit=True),
        Stage("notebooks replayed (nbval)", [*pytest, *nbval, *notebooks], junit=True),
        Stage("notebooks and benchmarks on a pretended GPU", [*spread, "tests/pretend"], junit=True),
        Stage("notebooks fresh", [sys.executable, "-m", "tools.refresh", "--check", "--jobs", WORKERS]),
        Stage("the book builds", ["make", "book"]),
        Stage("the site in a browser", [*pytest, "-m", "site", "tests/book"], junit=True),
    ]


def run(stage: Stage, folder: Path) -> Outcome:
    print(f"\n=== {stage.name}", flush=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [*stage.command, f"--junitxml={report}"] if stage.junit else stage.command
    began = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    took = time.perf_counter() - began
    if not stage.junit or not report.exists():
        return Outcome(int(code == 0), int(code != 0), 0, took)
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, skipped, broken = (
        sum(int(suite.get(key, 0)) for suite in suites for key in keys)
        for keys in (("tests",), ("skipped",), ("failures", "errors"))
    )
    # A runner that dies after its tests, or that ran none, has failed whatever it counted.
    failed = broken or int(code != 0 or total == 0)
    return Outcome(total - skipped - broken, failed, skipped, took)


def main() -> int:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [(stage, run(stage, Path(folder))) for stage in stages()]
    print(f"\n{'stage':46}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for stage, outcome in outcomes:
        print(f"{stage.name:46}{outcome.passed:8}{outcome.failed:8}{outcome.skipped:9}{outcome.seconds:9.0f}")
    passed, failed, skipped = (
        sum(getattr(outcome, key) for _, outcome in outcomes) for key in ("passed", "failed", "skipped")
    )
    print(f"all of it in {time.perf_counter() - began:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
