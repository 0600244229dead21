"""Predicted against measured: for every case of a recorded run, both times and their ratio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmbook.kit.measure import RECORDED, recorded

from .roofs import chip, peak

# Part of what CUDA calls the device, and which row of the table that is. The order matters: "L4" is in "L40" too.
DEVICES = (
    ("H100 80GB HBM3", "H100 SXM"), ("H200", "H200 SXM"), ("B200", "B200 HGX"), ("A100-SXM4-80GB", "A100-80 SXM"),
    ("A100-SXM4-40GB", "A100-40 SXM"), ("RTX 4090", "RTX 4090"), ("Tesla T4", "T4"), ("NVIDIA L4", "L4"),
)


def table_name(device: str) -> str:
    """The table's name of a device as CUDA calls it.

    Raises:
        ValueError: the table has no such device; an H100 PCIe is not an H100 SXM.
    """
    for part, name in DEVICES:
        if device == part or device.endswith(part):
            return name
    raise ValueError(f"{device!r} is not in the table of GPUs, so its roofs are unknown: add its datasheet first")


@dataclass(frozen=True)
class Compared:
    """One case: seconds predicted by the datasheet's roofs and by the run's own, and seconds measured."""

    name: str
    sizes: dict[str, Any]
    predicted: float
    calibrated: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured ÷ predicted; below 1 the prediction was not a bound."""
        return self.measured / self.predicted


def compare(run: dict[str, Any]) -> list[Compared]:
    """max(T_cal, T_mem) of every case against its measured median.

    run: a record of `kit.measure`. The run's own roofs are its fastest bytes and
    its fastest products of the same dtype, whichever case reached them.

    Raises:
        ValueError: a device that is not in the table.
    """
    name = table_name(run["device"])
    bandwidth = chip(name).bandwidth * 1e9
    reached = max((row["gbs"] * 1e9 for row in run["cases"]), default=bandwidth)
    found = []
    for row in run["cases"]:
        rate = _rate(row, name)
        best = max(r["tflops"] * 1e12 for r in run["cases"] if _rate(r, name) == rate)
        found.append(Compared(
            row["name"], row["sizes"], max(row["flops"] / rate, row["bytes"] / bandwidth),
            max(row["flops"] / best if row["flops"] else 0, row["bytes"] / reached), row["ms"] / 1e3,
        ))
    return found


def _rate(row: dict[str, Any], name: str) -> float:
    """The roof over a case: products have that of their dtype, all else runs on CUDA cores."""
    if row["name"].startswith("GEMM"):
        return peak(name, row["sizes"]["dtype"])
    return peak(name, "fp32")


def report(chapter: str, folder: Path = RECORDED) -> None:
    """Print predicted and measured time of every recorded case, or that nothing was measured yet."""
    runs = recorded(chapter, folder)
    if not runs:
        print("Not measured yet: no recorded run to compare the predictions with.")
    for run in runs:
        print(f"{run['device']}, {run['date']}: predicted by the datasheet, by the run's own roofs, measured")
        for row in compare(run):
            sizes = ", ".join(f"{key}={value}" for key, value in row.sizes.items())
            print(
                f"  {row.name} ({sizes}): {row.predicted * 1e6:.1f} µs, {row.calibrated * 1e6:.1f} µs, "
                f"{row.measured * 1e6:.1f} µs; measured ÷ predicted {row.ratio:.2f}"
            )
