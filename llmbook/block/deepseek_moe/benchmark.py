"""What the deepseek_moe chapter times: the grouped GEMM, forward and backward, under even and skewed loads.

Target: at least 0.9 of `torch._grouped_mm`'s speed.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

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


def cases(
    device: torch.device = DEVICE, sizes: Iterable[tuple[str, int, int, int, int, int]] = SIZES,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A forward and a backward case per size and load; bf16 where the GPU has it."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for name, tokens, experts, k, dim, out in sizes:
        for load in ("uniform", "skewed"):
            torch.manual_seed(dim)
            rows = tokens * k
            x = torch.randn(rows, dim, device=device, dtype=dtype)
            w = torch.randn(experts, dim, out, device=device, dtype=dtype) / dim**0.5
            dy = torch.randn(rows, out, device=device, dtype=dtype)
            ends = _ends(rows, experts, load).to(device)
            what = {
                "what": name, "rows": rows, "experts": experts, "K": dim, "N": out, "load": load,
                "dtype": str(dtype)[6:],
            }
            yield _case("forward", what, x, w, ends, None)
            yield _case("backward", what, x, w, ends, dy)


def _ends(rows: int, experts: int, load: str) -> Tensor:
    """Where each expert's rows end: equal shares, or the j-th busiest with a share ∝ 1/j, in random order."""
    share = torch.ones(experts, dtype=torch.float64)
    if load == "skewed":
        share = (1 / torch.arange(1, experts + 1, dtype=torch.float64))[torch.randperm(experts)]
    return (share.cumsum(0) / share.sum() * rows).round().int()


def _torch_grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = torch._grouped_mm(x, w, offs=ends)
    return result


def _dense(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x @ w[0]


def _case(name: str, what: dict[str, Any], x: Tensor, w: Tensor, ends: Tensor, dy: Tensor | None) -> Case:
    """Forward if there is no dy, else the backward alone: its graph is built once, on first use."""

    def call_of(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        if dy is None:
            return functools.partial(product, x, w, ends)

        @functools.cache
        def graph() -> tuple[Tensor, list[Tensor]]:
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            return product(leaves[0], leaves[1], ends), leaves

        def call() -> tuple[Tensor, ...]:
            out, leaves = graph()
            return torch.autograd.grad(out, leaves, dy, retain_graph=True)

        return call

    def error(result: Any) -> tuple[float, float]:
        """Against float64 of the busiest expert and of the last one; all of them would not fit."""
        first = [0, *ends.tolist()]
        loads = [b - a for a, b in itertools.pairwise(first)]
        worst = 0.0
        for e in {max(range(len(loads)), key=loads.__getitem__), len(loads) - 1}:
            rows = slice(first[e], first[e + 1])
            pairs = [(result[rows], x[rows].double() @ w[e].double())] if dy is None else [
                (result[0][rows], dy[rows].double() @ w[e].double().T),
                (result[1][e], x[rows].double().T @ dy[rows].double()),
            ]
            for ours, right in pairs:
                off = relative_error(ours, right)
                worst = off if off != off else max(worst, off)  # NaN stays NaN
        return worst, torch.finfo(x.dtype).eps

    times = 1 if dy is None else 2
    rows, dim, out = len(x), x.shape[1], w.shape[2]
    peers = {
        "torch._grouped_mm": _torch_grouped, "a loop over experts": by_slices,
        "one dense GEMM of as many FLOPs": _dense,
    }
    moved = x.nbytes + w.nbytes + rows * out * x.element_size()
    return Case(
        name, what, call_of(grouped_product), error, times * 2 * rows * dim * out, times * moved,
        {peer: call_of(product) for peer, product in peers.items()},
    )
