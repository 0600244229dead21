"""Decode attention on two memory levels: bytes from HBM to L2, bytes from L2 to the multiprocessors, and operations.

One query per sequence attends to n cached keys. Queries and outputs are left out: they are 1/n of the cache's bytes.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from llmbook.kit.hardware import gpu

WIDTH = 2  # bytes of an fp16 or bf16 element


@dataclass(frozen=True)
class Attention:
    """Who shares keys and values with whom.

    heads, kv_heads: query heads, and heads in the cache; the second divides the first.
    d, d_v: widths of a key and of a value; `shared`: the value is a part of the key, so only the key is cached.
    """

    heads: int
    kv_heads: int
    d: int = 128
    d_v: int = 128
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"the KV heads must divide the heads, but {self.kv_heads} do not divide {self.heads}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def token(self) -> int:
        """Bytes that one token has in the cache, all KV heads together."""
        return self.kv_heads * (self.d + (0 if self.shared else self.d_v)) * WIDTH


KINDS = {
    "MHA, 32 heads": Attention(32, 32), "GQA, groups of 4": Attention(32, 8), "MQA, 32 heads on 1": Attention(32, 1),
    "MLA, 128 heads on 1": Attention(128, 1, 576, 512, shared=True),  # DeepSeek-V2 and V3, absorbed
}


class Measured(NamedTuple):
    """Read bandwidths in GB/s, measured by others: out of L2, and out of memory in the same run (0: not told)."""

    l2: float
    memory: float
    source: str


_BENCHES = "https://github.com/RRZE-HPC/gpu-benches/blob/master/gpu-l2-cache"
# gpu-benches: L2 at a data set of 25,600 kB (H100 PCIe: 25,088), memory at the largest data set of the same run.
MEASURED = {
    "A100-80 SXM": Measured(5376.2, 1732.3, f"{_BENCHES}/a100_80.txt"),
    "H100 PCIe": Measured(6862.5, 1932.9, f"{_BENCHES}/h100_pcie.txt"),
    "H200 SXM": Measured(9675.0, 3888.2, f"{_BENCHES}/h200.txt"),
    "L40": Measured(5224.6, 796.4, f"{_BENCHES}/l40.txt"),
    # A constant of XLA's cost model, "measured H100 L2 bandwidth"; it does not say on which of the two H100s.
    "H100 SXM": Measured(
        6650, 0, "https://github.com/openxla/xla/blob/main/xla/service/gpu/model/gpu_dot_fusion_cost_model.cc"
    ),
}


class Chip(NamedTuple):
    """Bandwidths in bytes/s of HBM and L2, FLOP/s of tensor cores (fp16) and of the other units (fp32)."""

    name: str
    hbm: float
    l2: float
    tensor: float
    vector: float


def chip(name: str) -> Chip:
    """A GPU's datasheet with its measured L2 bandwidth.

    Raises:
        KeyError: nobody's measurement of its L2 is known here.
    """
    if name not in MEASURED:
        raise KeyError(f"no measured L2 bandwidth of {name!r} is known; there are: {', '.join(MEASURED)}")
    sheet = gpu(name)
    return Chip(name, sheet.bandwidth * 1e9, MEASURED[name].l2 * 1e9, sheet.half * 1e12, sheet.single * 1e12)


NOTES = chip("A100-80 SXM")._replace(name="A100, the notes' numbers", hbm=2.0e12, l2=4e12)
CHIPS = {c.name: c for c in (NOTES, *(chip(name) for name in ("A100-80 SXM", "H100 SXM", "H200 SXM")))}


class Cost(NamedTuple):
    """Seconds that each resource needs; they work at the same time, so the longest decides."""

    hbm: float
    l2: float
    compute: float

    @property
    def binds(self) -> str:
        """The resource that takes longest; HBM in a tie."""
        return ("HBM", "L2", "compute")[self.index(max(self))]


def traffic(
    a: Attention, keys: int, rows: int = 1, cached: bool = True
) -> tuple[int, int]:
    """Bytes out of HBM and bytes out of L2.

    Args:
        keys: cached tokens of all sequences together.
        rows: query heads per program; 1 is the per-head kernel.
        cached: whether every second read of a tile still finds it in L2.

    Raises:
        ValueError: keys is negative, or rows less than 1.
    """
    if keys < 0 or rows < 1:
        raise ValueError(
            f"keys must be 0 or more and rows 1 or more, but are {keys} and {rows}"
        )
    once = keys * a.token
    loads = once * ceil(a.group / rows)  # each program reads its KV head
    return (once if cached else loads), loads


def flops(a: Attention, keys: int, rows: int = 1) -> int:
    """Operations issued: a tile computes all its rows, also those without a head."""
    issued = ceil(a.group / rows) * rows * a.kv_heads
    return 2 * issued * keys * (a.d + a.d_v)


def cost(
    a: Attention, keys: int, on: Chip, rows: int = 1, cached: bool = True
) -> Cost:
    """Seconds by HBM, by L2 and by compute; one row has no use for tensor cores."""
    hbm, l2 = traffic(a, keys, rows, cached)
    rate = on.vector if rows == 1 else on.tensor
    return Cost(hbm / on.hbm, l2 / on.l2, flops(a, keys, rows) / rate)


def gain(group: int, on: Chip, rows: int = 1, cached: bool = True) -> float:
    """How many times as fast as MHA with as many query heads, 128 wide."""
    shared = Attention(group, 1)
    alone = cost(Attention(group, group), 1, on)
    return max(alone) / max(cost(shared, 1, on, rows, cached))


DEVICES = {
    "NVIDIA A100-SXM4-80GB": "A100-80 SXM", "NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA H200": "H200 SXM",
}


def predicted(run: dict[str, Any]) -> list[str]:
    """Beside every "per head" and "packed" case of a recorded run: what the model says, in milliseconds.

    Args:
        run: a record as `llmbook.bench` writes it; its cases' sizes hold batch, heads, group, N, d and rows.

    Returns:
        A line per case, or the one line that there is no measured L2 bandwidth of this device.
    """
    if run["device"] not in DEVICES:
        known = ", ".join(DEVICES)
        return [f"no measured L2 bandwidth of {run['device']!r} is known, so no prediction; known: {known}"]
    on, lines = chip(DEVICES[run["device"]]), []
    for row in run["cases"]:
        size = row["sizes"]
        a = Attention(size["heads"], size["heads"] // size["group"], size["d"], size["d"])
        seconds = cost(a, size["batch"] * size["N"], on, size["rows"])
        lines.append(
            f"{row['name']:8} group {size['group']:2}, N {size['N']:6,}: model {1e3 * max(seconds):8.4f} ms "
            f"({seconds.binds} binds), measured {row['ms']:8.4f} ms"
        )
    return lines
