"""Measurements on a GPU: correct first, then timed, then written down with where they come from.

On a machine without a GPU nothing is timed: chapters show the recorded runs, or say that there are none yet.
"""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RECORDED = Path(__file__).parents[1] / "recorded"
FLUSH_BYTES = 256 * 2**20  # more than any L2, so that every repetition reads its inputs from HBM

Timer = Callable[[Callable[[], Any]], list[float]]


class MeasurementError(RuntimeError):
    """A case is wrong, so it is not timed."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: what runs ("forward", "rope").
        sizes: what a reader needs to compare with another run, {"N": 4096, "dtype": "bf16"}.
        run: calls ours; its result is checked before it is timed.
        error: given that result, returns (error, the most allowed).
        flops, bytes: what the formula says the run does and moves.
        peers: name → a call that does the same with somebody else's code.
    """

    name: str
    sizes: dict[str, Any]
    run: Callable[[], Any]
    error: Callable[[Any], tuple[float, float]]
    flops: int
    bytes: int
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; NaN stays NaN, and so fails every bound."""
    out, reference = out.detach().double(), reference.detach().double()
    difference = out - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-300))


def cuda_times(call: Callable[[], Any], budget_ms: float = 300) -> list[float]:
    """Milliseconds of each repetition by CUDA events, cold L2, after warm-up: as many as fit into the budget."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 100):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def measure(case: Case, timer: Timer = cuda_times) -> dict[str, Any]:
    """Check one case, time it and its peers, and return what a record keeps of it.

    Raises:
        MeasurementError: the result is further from the reference than allowed; nothing was timed.
    """
    error, allowed = case.error(case.run())
    if not error <= allowed:
        raise MeasurementError(f"{case.name} {case.sizes}: error {error:.3g}, allowed {allowed:.3g}; not timed")
    row: dict[str, Any] = {"name": case.name, "sizes": case.sizes, "flops": case.flops, "bytes": case.bytes}
    row |= {"error": error, "allowed": allowed, **_summary(timer(case.run), case)}
    row["peers"] = {}
    for name, call in case.peers.items():
        try:
            row["peers"][name] = _summary(timer(call), case)
        except (RuntimeError, NotImplementedError, ImportError) as why:  # a peer may not support this GPU: say so
            row["peers"][name] = {"unavailable": str(why).strip().splitlines()[0][:200]}
    return row


def _summary(times: list[float], case: Case) -> dict[str, float]:
    tenths, median = statistics.quantiles(times, n=10), statistics.median(times)
    return {
        "ms": median, "ms_p10": tenths[0], "ms_p90": tenths[8], "repetitions": len(times),
        "tflops": case.flops / median / 1e9, "gbs": case.bytes / median / 1e6,
    }


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


def record(chapter: str, cases: Iterable[Case], *, folder: Path = RECORDED, timer: Timer = cuda_times) -> Path:
    """Measure a chapter's cases and write `recorded/<device>/<chapter>.json`. Nothing is written if a case is wrong."""
    rows = [measure(case, timer) for case in cases]
    source = provenance()
    path = folder / source["device"].lower().replace(" ", "-") / f"{chapter.split('/')[-1]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"chapter": chapter, **source, "cases": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def recorded(chapter: str, folder: Path = RECORDED) -> list[dict[str, Any]]:
    """Every record of a chapter ("gpu/flash_attention"), one per device, newest first; empty if never measured."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{chapter.split('/')[-1]}.json"))]
    return sorted(found, key=lambda run: run["date"], reverse=True)


def report(chapter: str, cases: Callable[[], Iterable[Case]], *, folder: Path = RECORDED) -> None:
    """Print a chapter's measurements: made now where there is a GPU, else the recorded ones, else that there are none.

    Args:
        chapter: "gpu/flash_attention".
        cases: the chapter's `benchmark.cases`.
    """
    if torch.cuda.is_available():
        print(describe({**provenance(), "cases": [measure(case) for case in cases()]}))
        return
    runs = recorded(chapter, folder)
    if not runs:
        print("No GPU here, and not measured yet: no recorded run exists for this chapter.")
        print(f"On a machine with one:  python -m llmbook.bench {chapter}")
    for run in runs:
        print("No GPU here: this is a recorded run.")
        print(describe(run))


def describe(run: dict[str, Any]) -> str:
    """A record as a table in plain text."""
    lines = [
        f"{run['device']} ({run['capability']}), driver {run['driver']}, torch {run['torch']}, "
        f"triton {run['triton']}, {run['date']}, commit {run['commit']}"
    ]
    for row in run["cases"]:
        sizes = ", ".join(f"{key}={value}" for key, value in row["sizes"].items())
        lines.append(f"{row['name']} ({sizes})")
        for name, result in {"ours": row, **row["peers"]}.items():
            if "unavailable" in result:
                lines.append(f"  {name:24} unavailable: {result['unavailable']}")
            else:
                lines.append(
                    f"  {name:24} {result['ms']:9.4f} ms  [{result['ms_p10']:.4f}, {result['ms_p90']:.4f}]  "
                    f"{result['tflops']:8.1f} TFLOP/s  {result['gbs']:8.0f} GB/s"
                )
    return "\n".join(lines)
