"""Chains of small operations, as one would write them, and what each kernel moves when the first few are fused."""

import functools
from collections.abc import Callable

import torch

from .counting import Counted, Work, count, traffic

Tensor = torch.Tensor
SIZE = 4096  # rows and columns of the matrix that goes through a chain


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), five operations."""
    return x * 0.5 * (torch.erf(x * 0.5**0.5) + 1)


def rms_norm(x: Tensor) -> Tensor:
    """Each row divided by its root mean square. x: [rows, n]."""
    return x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt()


def softmax(x: Tensor) -> Tensor:
    """Over rows. x: [rows, n]."""
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {"GELU": gelu, "RMSNorm": rms_norm, "softmax": softmax}


@functools.cache
def counted(name: str, rows: int = SIZE, columns: int = SIZE, dtype: torch.dtype = torch.float16) -> Counted:
    """A chain on a matrix that exists on paper only."""
    return count(CHAINS[name], torch.empty(rows, columns, dtype=dtype, device="meta"))


def partly_fused(whole: Counted, first: int) -> list[tuple[list[Work], int, int]]:
    """Kernels when the first `first` operations are one and the others stay alone.

    Returns per kernel its operations, the bytes it reads and the bytes it writes.

    Raises:
        ValueError: `first` is not between 1 and the number of operations.
    """
    if not 1 <= first <= len(whole.ops):
        raise ValueError(f"between 1 and {len(whole.ops)} operations can be fused, not {first}")
    groups = [list(whole.ops[:first]), *([op] for op in whole.ops[first:])]
    found = []
    for group in groups:
        reads, writes = whole.crossing(group)
        found.append((group, traffic(reads), traffic(writes)))
    return found
