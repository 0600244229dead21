"""GPUs and links as data: dense peak rates, bandwidths and sizes, each with the page it was read from.

Units: TFLOP/s = 1e12 operations per second, GB/s = 1e9 bytes per second, GB = 1e9 bytes, L2 in MiB, shared memory
in KiB. Rates are dense: pages that print the 2:4-sparse figure print twice as much.
"""

from dataclasses import dataclass

# The most shared memory one thread block can have, in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_PER_BLOCK = {75: 64 * 1024, 80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class GPU:
    """One GPU's datasheet.

    Attributes:
        sm: compute capability × 10.
        half: dense fp16 tensor-core TFLOP/s with fp32 accumulation.
        bf16: whether bf16 runs at that rate too (Turing has none).
        single: fp32 TFLOP/s on CUDA cores, a different roof.
        memory, bandwidth: GB and GB/s of HBM or GDDR.
        l2, shared: MiB of L2, KiB of shared memory per SM.
        sms: streaming multiprocessors.
        nvlink: GB/s, both directions together; 0 if it has none.
        source: where the numbers stand.
    """

    name: str
    sm: int
    half: float
    bf16: bool
    single: float
    memory: float
    bandwidth: float
    l2: float
    shared: int
    sms: int
    nvlink: float
    source: str

    @property
    def ridge(self) -> float:
        """Arithmetic intensity (FLOP per byte of device memory) above which half-precision work is compute-bound."""
        return self.half * 1e12 / (self.bandwidth * 1e9)


@dataclass(frozen=True)
class Link:
    """A link between devices: GB/s in one direction, and where the number stands."""

    name: str
    bandwidth: float
    source: str


def gpu(name: str) -> GPU:
    """The GPU of that name.

    Raises:
        KeyError: there is none; the message lists those there are.
    """
    for candidate in GPUS:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no GPU called {name!r}; there are: {', '.join(g.name for g in GPUS)}")
