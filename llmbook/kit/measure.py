"""Measurements on a GPU: correct first, then timed, then written down with where they come from.

On a machine without a GPU nothing is timed: chapters show the recorded runs, or say that there are none yet.
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .compare import relative_error
from .stopwatch import Call, Stopwatch, Timer, in_turn, reason
from .table import LATE, describe, describe_case, headline, verdict

__all__ = ["Case", "MeasurementError", "Work", "describe", "measure", "record", "recorded", "relative_error", "report"]

RECORDED = Path(__file__).parents[1] / "recorded"
ROOM = 2**30  # bytes beside a case's own: the buffer that flushes L2, the libraries' workspaces, gaps
PEERS_MAY = 4  # times as much error as ours: a library may round in between where ours keeps fp32


class MeasurementError(RuntimeError):
    """A case is wrong, so it is not timed; or a chapter has nothing to write down."""


@dataclass(frozen=True)
class Work:
    """A case with its tensors made.

    Attributes:
        run: calls ours; its result is checked before it is timed.
        error: given a result, returns (error, the most allowed); it looks at every number.
        peers: name → a call that gives the same result by somebody else's code; checked by `error` too.
        yardsticks: name → a call that computes something else, to compare times with: a copy of as many bytes.
        notes: what else a GPU has to say about this case, asked after the check.
    """

    run: Call
    error: Callable[[Any], tuple[float, float]]
    peers: dict[str, Call] = field(default_factory=dict)
    yardsticks: dict[str, Call] = field(default_factory=dict)
    notes: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Case:
    """One thing to measure, without its tensors.

    Attributes:
        name: what runs ("forward", "rope").
        sizes: what a reader needs to compare with another run, {"N": 4096, "dtype": "bf16"}.
        make: makes the tensors; what it returns is all that holds them.
        flops, bytes: what the formula says the run does and moves.
        memory: bytes that have to be free: inputs, results, and what the check needs. A peer that needs more and does
            not get it is unavailable.
    """

    name: str
    sizes: dict[str, Any]
    make: Callable[[], Work]
    flops: int
    bytes: int
    memory: int


def measure(case: Case, timer: Timer | None = None, until: float = math.inf) -> dict[str, Any]:
    """Check one case, time it and its peers in turn, and return what a record keeps of it.

    Args:
        timer: milliseconds of one call; a `Stopwatch` if not given.
        until: `time.monotonic()` from when on no more peers are begun.

    Raises:
        MeasurementError: the result is further from the reference than allowed; nothing was timed.
    """
    work = case.make()
    error, allowed = work.error(work.run())
    if not error <= allowed:
        raise MeasurementError(f"error {error:.3g}, allowed {allowed:.3g}; not timed")
    notes = work.notes()
    calls: dict[str, Call] = {"ours": work.run}
    peers: dict[str, dict[str, Any]] = {}
    for name, call in {**work.peers, **work.yardsticks}.items():
        check = work.error if name in work.peers else None
        if problem := _problem(call, check) if time.monotonic() < until else {"unavailable": LATE}:
            peers[name] = problem
        else:
            calls[name] = call
    times, broken = in_turn(calls, timer or Stopwatch(), must="ours")
    peers |= {name: {"unavailable": why} for name, why in broken.items()}
    found: dict[str, dict[str, Any]] = peers | {name: _summary(taken, case) for name, taken in times.items()}
    return {
        "name": case.name, "sizes": case.sizes, "flops": case.flops, "bytes": case.bytes, "error": error,
        "allowed": allowed, **found["ours"], "notes": notes,
        "peers": {name: found[name] for name in (*work.peers, *work.yardsticks)},
    }


def _problem(call: Call, check: Callable[[Any], tuple[float, float]] | None) -> dict[str, str]:
    """Why a peer is not timed; empty if it is. Any of its exceptions is one: it may not support this GPU."""
    try:
        result = call()
        error, allowed = check(result) if check else (0.0, 0.0)
    except Exception as why:
        return {"unavailable": reason(why)}
    if not error <= PEERS_MAY * allowed:
        return {"wrong": f"error {error:.3g}, allowed {PEERS_MAY * allowed:.3g}; not timed"}
    return {}


def _summary(times: list[float], case: Case) -> dict[str, float]:
    tenths, median = statistics.quantiles(times, n=10), statistics.median(times)
    return {
        "ms": median, "ms_p10": tenths[0], "ms_p90": tenths[8], "repetitions": len(times),
        "tflops": case.flops / median / 1e9, "gbs": case.bytes / median / 1e6,
    }


def free_memory() -> float:
    """Bytes that a case may take on the GPU; without one there is no limit."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf


def attempt(case: Case, timer: Timer | None = None, until: float = math.inf) -> dict[str, Any]:
    """`measure`, or why there are no times: a row with a status ("skipped", "wrong", "failed") and a sentence.

    Begins with the memory that the case before has left; only an interrupt goes through.
    """
    try:
        release()
        needed = case.memory + ROOM
        if (free := free_memory()) >= needed:
            return measure(case, timer, until)
        status, why = "skipped", f"needs {needed / 1e9:.1f} GB of GPU memory, and {free / 1e9:.1f} GB are free"
    except MeasurementError as error:
        status, why = "wrong", str(error)
    except Exception as error:
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        status, why = "skipped" if full else "failed", reason(error)
    return {"name": case.name, "sizes": case.sizes, "status": status, "why": why}


def release() -> None:
    """Give memory back: cycles first, then what `torch.compile` holds for these shapes, then the allocator's cache."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # else the ninth shape of a function would run uncompiled
    torch.cuda.empty_cache()


def run(
    cases: Iterable[Case], timer: Timer | None = None, budget_s: float = math.inf
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure cases one after the other, and print each as it ends.

    Returns:
        Rows with times; rows without, each with its status and why.
    """
    timed: list[dict[str, Any]] = []
    without: list[dict[str, Any]] = []
    waiting, until = list(cases), time.monotonic() + budget_s
    bar = _bar(len(waiting))
    for case in waiting:
        if timed and time.monotonic() > until:
            row = {"name": case.name, "sizes": case.sizes, "status": "left out", "why": LATE}
        else:
            row = attempt(case, timer, until)
            bar.write(describe_case(row)) if bar else print(describe_case(row), flush=True)
        (without if "status" in row else timed).append(row)
        if bar:
            bar.update()
    if bar:
        bar.close()
    return timed, without


def _bar(total: int) -> Any:
    """tqdm's bar in a terminal or a notebook; None elsewhere, and where there is no tqdm."""
    if not sys.stdout.isatty() and not type(sys.stdout).__module__.startswith("ipykernel"):
        return None
    try:
        from tqdm.auto import tqdm

        return tqdm(total=total, unit="case", leave=False)
    except ImportError:
        return None


def provenance() -> dict[str, Any]:
    """Where a measurement comes from: device, driver, versions, date, commit."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    return {
        "device": properties.name, "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1), "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": datetime.now(UTC).date().isoformat(),
        "commit": _output("git", "-C", str(RECORDED), "rev-parse", "--short=12", "HEAD") or "unknown",
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def record(
    chapter: str, cases: Iterable[Case], *, folder: Path = RECORDED, timer: Timer | None = None
) -> tuple[Path, int]:
    """Measure a chapter's cases and write `recorded/<device>/<chapter>.json`.

    "cases" has those with times; "without" has those that were skipped, wrong or failed, and why: no time of a wrong
    result is ever written.

    Returns:
        The file, and how many cases were wrong or failed.

    Raises:
        MeasurementError: no case has times, so nothing was written.
    """
    source = provenance()
    print(headline(source))
    timed, without = run(cases, timer)
    print(verdict(timed, without))
    if not timed:
        raise MeasurementError("no case was timed, so nothing was written")
    path = folder / source["device"].lower().replace(" ", "-") / f"{chapter.split('/')[-1]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"chapter": chapter, **source, "cases": timed, "without": without}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path, sum(row["status"] in ("wrong", "failed") for row in without)


def recorded(chapter: str, folder: Path = RECORDED) -> list[dict[str, Any]]:
    """Every record of a chapter ("gpu/flash_attention"), one per device, newest first; empty if never measured."""
    paths = sorted(folder.glob(f"*/{chapter.split('/')[-1]}.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda run: run["date"], reverse=True)


def gpu_here() -> bool:
    """Whether kernels run on a GPU: there is one, and Triton is not set to interpret."""
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"


def report(
    chapter: str, cases: Callable[[], Iterable[Case]], *, folder: Path = RECORDED, budget_s: float = 60,
    timer: Timer | None = None,
) -> None:
    """Print a chapter's measurements: made now where there is a GPU, else the recorded ones, else that there are none.

    Args:
        chapter: "gpu/flash_attention".
        cases: the chapter's `benchmark.cases`.
        budget_s: seconds after which no more cases and peers are begun; `python -m llmbook.bench` runs all of them.
    """
    if gpu_here():
        print(headline(provenance()))
        timed, without = run(cases(), timer, budget_s)
        print(verdict(timed, without))
        release()
        if LATE in json.dumps([timed, without]):
            print(f"What did not fit into {budget_s:g} s was left out; all of it:  python -m llmbook.bench {chapter}")
        return
    runs = recorded(chapter, folder)
    if not runs:
        print("No GPU here, and not measured yet: no recorded run exists for this chapter.")
        print(f"On a machine with one:  python -m llmbook.bench {chapter}")
    for found in runs:
        print("No GPU here: this is a recorded run.")
        print(describe(found))
