"""A GPU's roofs, and the time they predict: rates by dtype and unit, bandwidths of HBM and L2, ridge points."""

from dataclasses import dataclass

import torch

from llmbook.kit.hardware import GPU, GPUS

from .counting import Cost

BYTES = {"fp8": 1, "fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}
NAMES = {
    torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float32: "fp32",
}

# NVIDIA prints 5120 bytes per clock for the A100's L2 (A100 whitepaper, table 3, at 1,410 MHz), and nothing for the
# others of the table. What is not printed is not drawn.
L2_READ = {name: 5120 * 1.41e9 for name in ("A100-40 SXM", "A100-80 SXM")}


def chip(name: str) -> GPU:
    """The GPU of that name in the book's table.

    Raises:
        ValueError: there is none.
    """
    for candidate in GPUS:
        if candidate.name == name:
            return candidate
    raise ValueError(
        f"no GPU called {name!r} in the table: choose one of {', '.join(g.name for g in GPUS)}"
    )


def dtypes(name: str) -> tuple[str, ...]:
    """What a GPU computes products in, by the names of `BYTES`."""
    g = chip(name)
    return tuple(d for d, least in (
        ("fp8", 89), ("fp16", 75), ("bf16", 80), ("tf32", 80), ("fp32", 0),
    ) if g.sm >= least)


def peak(name: str, dtype: str) -> float:
    """FLOP/s of products in a dtype, dense.

    Tensor cores, at the datasheets' own ratios: fp8 twice fp16, tf32 half of it.
    fp32 that is not rounded to tf32 runs on CUDA cores: another, lower roof.

    Raises:
        ValueError: an unknown GPU, or a dtype that it does not have.
    """
    g = chip(name)
    if dtype not in BYTES:
        raise ValueError(
            f"dtype {dtype!r} has no roof here: choose one of {', '.join(BYTES)}"
        )
    if dtype not in dtypes(name):
        raise ValueError(
            f"the {name} (sm_{g.sm}) has no {dtype} tensor cores: choose one of "
            f"{', '.join(dtypes(name))}"
        )
    if dtype == "fp32":
        return g.single * 1e12
    return g.half * 1e12 * {"fp8": 2.0, "tf32": 0.5}.get(dtype, 1.0)


def ridge(name: str, dtype: str = "fp16", bandwidth: float | None = None) -> float:
    """FLOP per byte where the roof turns flat.

    bandwidth: byte/s of the slope; default the GPU's device memory.
    """
    return peak(name, dtype) / (bandwidth or chip(name).bandwidth * 1e9)


@dataclass(frozen=True)
class Prediction:
    """Seconds that each roof allows at best; the longest is the prediction.

    products: on tensor cores (fp32: on CUDA cores); others: on CUDA cores;
    memory: through HBM.
    """

    products: float
    others: float
    memory: float

    @property
    def time(self) -> float:
        return max(self.products, self.others, self.memory)

    @property
    def binds(self) -> str:
        """Which roof it is: "memory", "products" (tensor cores) or "CUDA cores"."""
        if self.memory >= max(self.products, self.others):
            return "memory"
        return "products" if self.products >= self.others else "CUDA cores"


def predict(cost: Cost, name: str) -> Prediction:
    """T_cal and T_mem of counted work, as if each unit ran at its peak.

    Products and other FLOPs run on different units at the same time, except in
    fp32, where CUDA cores do both.

    Raises:
        ValueError: an unknown GPU, or a dtype that it does not have.
    """
    g = chip(name)
    dtype = NAMES.get(cost.dtype, str(cost.dtype).removeprefix("torch."))
    vector = g.single * 1e12
    rate = peak(name, dtype) if cost.products else vector
    shared = cost.products if dtype == "fp32" else 0
    return Prediction(
        cost.products / rate,
        (cost.others + shared) / vector,
        cost.bytes / (g.bandwidth * 1e9),
    )


def attainable(intensity: float, rate: float, bandwidth: float) -> float:
    """FLOP/s under a roof of that rate whose slope is that bandwidth."""
    return min(rate, intensity * bandwidth)


def mac_array(rows: int, columns: int, clock: float, arrays: int = 1) -> float:
    """Operations per second of arrays of multiply-accumulators.

    rows × columns × 2 × clock (Hz) × how many arrays there are.

    Raises:
        ValueError: a size or a clock that is not positive.
    """
    if min(rows, columns, clock, arrays) <= 0:
        raise ValueError(
            f"an array of {rows} × {columns} at {clock:g} Hz, {arrays} times, "
            "computes nothing: all four must be positive"
        )
    return 2.0 * rows * columns * clock * arrays


def short(value: float) -> str:
    """Three digits, or all those before the point; no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(t: float) -> str:
    """A time in words, three digits."""
    return f"{t * 1e6:.3g} µs" if t < 1e-3 else f"{t * 1e3:.3g} ms"
