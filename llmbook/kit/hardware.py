"""GPUs and links as data: dense peak rates, bandwidths and sizes, each with the page it was read from.

Units: TFLOP/s = 1e12 operations per second, GB/s = 1e9 bytes per second, GB = 1e9 bytes, L2 in MiB, shared memory
in KiB. Rates are dense: pages that print the 2:4-sparse figure print twice as much.
"""

from dataclasses import dataclass

# The most shared memory one thread block can have, in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_PER_BLOCK = {
    75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024,
    103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024,
}


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


_NV = "https://www.nvidia.com/en-us/data-center"
_BLOG = "https://developer.nvidia.com/blog/nvidia-ampere-architecture-in-depth/"

GPUS = (
    GPU("T4", 75, 65, False, 8.1, 16, 320, 4, 64, 40, 0, f"{_NV}/tesla-t4/"),
    GPU("L4", 89, 121, True, 30.3, 24, 300, 48, 100, 58, 0, f"{_NV}/l4/"),
    GPU(
        "RTX 4090", 89, 165.2, True, 82.58, 24, 1008, 72, 100, 128, 0,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    GPU("A100-40 SXM", 80, 312, True, 19.5, 40, 1555, 40, 164, 108, 600, _BLOG),
    GPU("A100-80 SXM", 80, 312, True, 19.5, 80, 2039, 40, 164, 108, 600, f"{_NV}/a100/"),
    GPU("H100 SXM", 90, 989, True, 67, 80, 3350, 50, 228, 132, 900, f"{_NV}/h100/"),
    # NVIDIA prints no L2 size for the H200; 60 MiB is what the device itself reports to CUDA.
    GPU("H200 SXM", 90, 989, True, 67, 141, 4800, 60, 228, 132, 900, f"{_NV}/h200/"),
    # The HGX datasheet's B200. Early briefs print 8 TB/s, 80 TFLOP/s fp32 and 192 GB.
    GPU("B200 HGX", 100, 2250, True, 75, 180, 7700, 126, 228, 148, 1800, f"{_NV}/hgx/"),
)

# PCIe: transfers per second × 16 lanes × 128/130 (the line code) ÷ 8 bits, before protocol overhead.
LINKS = (
    Link("PCIe 4.0 x16", 16 * 16 * 128 / 130 / 8, "https://pcisig.com/specifications"),
    Link("PCIe 5.0 x16", 32 * 16 * 128 / 130 / 8, "https://pcisig.com/specifications"),
    Link("NVLink 3 (A100)", 300, "https://docs.nvidia.com/cuda/ampere-tuning-guide/"),
    Link("NVLink 4 (H100, H200)", 450, "https://docs.nvidia.com/cuda/hopper-tuning-guide/"),
    Link("NVLink 5 (B200)", 900, "https://www.nvidia.com/en-us/data-center/nvlink/"),
    Link("InfiniBand HDR", 25, "https://www.infinibandta.org/infiniband-roadmap/"),
    Link("InfiniBand NDR", 50, "https://www.infinibandta.org/infiniband-roadmap/"),
    Link("InfiniBand XDR", 100, "https://www.infinibandta.org/infiniband-roadmap/"),
)
