"""What the deepseek_moe chapter times: the grouped GEMM, forward and backward, under even and skewed loads.

Target: at least 0.9 of `torch._grouped_mm`'s speed.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from llmbook.kit.compare import half, need_same_shape, wide, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .dispatch import by_slices
from .grouped import grouped_product

Tensor = torch.Tensor
Call = Callable[[], Any]

# (name, tokens, experts, k, K, N): DeepSeek-V3's gate and up, then down: a whole layer in training, as many experts as
# one of 8 GPUs holds; then a decode batch, with few rows per expert.
SIZES = (
    ("V3 gate and up", 4096, 32, 8, 7168, 4096), ("V3 down", 4096, 32, 8, 2048, 7168),
    ("V3 gate and up, decode", 128, 32, 8, 7168, 4096),
)
SMALL: dict[str, Any] = {"sizes": (("small", 32, 4, 2, 32, 16),)}


def cases(
    device: torch.device = DEVICE, sizes: Iterable[tuple[str, int, int, int, int, int]] = SIZES,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A forward and a backward case per size and load; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    for name, tokens, experts, k, dim, out in sizes:
        for load, (times, direction) in itertools.product(("uniform", "skewed"), ((1, "forward"), (2, "backward"))):
            rows = tokens * k
            what = {
                "what": name, "rows": rows, "experts": experts, "K": dim, "N": out, "load": load,
                "dtype": str(dtype)[6:],
            }
            moved = (rows * (dim + out) + experts * dim * out) * dtype.itemsize
            yield Case(
                direction, what, functools.partial(_make, direction, load, (rows, experts, dim, out), dtype, device),
                times * 2 * rows * dim * out, times * moved,
                # Inputs and results, in backward the output too; the busiest expert in float64.
                times * moved + 2 * rows * out * dtype.itemsize
                + 8 * (3 * dim * out + 3 * (round(rows * _busiest(experts)) + 1) * (dim + out)),
            )


def _ends(rows: int, experts: int, load: str, device: torch.device) -> Tensor:
    """Where each expert's rows end: equal shares, or the j-th busiest with a share ∝ 1/j, in random order."""
    share = torch.ones(experts, dtype=torch.float64, device=device)
    if load == "skewed":
        places = 1 + torch.randperm(experts, device=device)
        share = 1 / places.double()
    return (share.cumsum(0) / share.sum() * rows).round().int()


def _busiest(experts: int) -> float:
    """The largest share of a skewed load."""
    return 1 / sum(1 / place for place in range(1, experts + 1))


def _torch_grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = torch._grouped_mm(x, w, offs=ends)
    return result


def _make(
    direction: str, load: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Work:
    """The backward is timed alone: its graph is built once, on first use."""
    rows, experts, dim, out = sizes
    torch.manual_seed(dim)
    x = torch.randn(rows, dim, device=device, dtype=dtype)
    w = torch.randn(experts, dim, out, device=device, dtype=dtype).mul_(dim**-0.5)
    dy = torch.randn(rows, out, device=device, dtype=dtype)
    ends = _ends(rows, experts, load, device)

    def call_of(product: Callable[..., Tensor], w: Tensor, *ends: Tensor) -> Call:
        if direction == "forward":
            return functools.partial(product, x, w, *ends)

        @functools.cache
        def graph() -> tuple[Tensor, list[Tensor]]:
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            return product(*leaves, *ends), leaves

        def call() -> tuple[Tensor, ...]:
            result, leaves = graph()
            return torch.autograd.grad(result, leaves, dy, retain_graph=True)

        return call

    def error(result: Any) -> tuple[float, float]:
        found = (result,) if direction == "forward" else result
        for t, like in zip(found, (dy,) if direction == "forward" else (x, w), strict=True):
            need_same_shape(t, like)
        return worst_error(_pairs(found, x, w, dy, ends)), torch.finfo(dtype).eps

    peers = {"torch._grouped_mm": _torch_grouped, "a loop over experts": by_slices}
    return Work(
        call_of(grouped_product, w, ends), error, {name: call_of(peer, w, ends) for name, peer in peers.items()},
        {"one dense GEMM of as many FLOPs": call_of(torch.matmul, w[0])},
    )


def _pairs(
    found: tuple[Tensor, ...], x: Tensor, w: Tensor, dy: Tensor, ends: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, exact), expert by expert: the output, or both gradients."""
    for e, (first, last) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        rows = slice(first, last)
        if len(found) == 1:
            yield found[0][rows], wide(x[rows]) @ wide(w[e])
        else:
            yield found[0][rows], wide(dy[rows]) @ wide(w[e]).T
            yield found[1][e], wide(x[rows]).T @ wide(dy[rows])
