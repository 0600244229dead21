"""FlashAttention's own rule for a correct kernel, and the plain attention it compares with."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from llmbook.kit.compare import PIECE, exact_float32, need_same_shape, worst

Tensor = torch.Tensor
Plain = Callable[..., Sequence[Tensor]]


def standard(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention as three operations with S and P in memory, in the inputs' dtype; [batch, heads, N, d] throughout."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        n = q.shape[-2]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return scores.softmax(dim=-1) @ v


def error_by_the_rule(
    results: Sequence[Tensor], inputs: Sequence[Tensor], plain: Plain, times: float
) -> tuple[float, float]:
    """The kernel's largest error against fp32, and the most allowed: `times` what `plain` makes in the same dtype.

    Args:
        results: the kernel's, each [batch, heads, …]; every number is looked at, NaN stays NaN.
        inputs: what it got, each [batch, heads, N, d].
        plain: the same function by standard operations, called on a few heads at a time: N × N in fp32 has to fit.

    Raises:
        ValueError: results of another number or shape.
    """
    return by_the_rule(inputs, plain, times)(results)


def by_the_rule(
    inputs: Sequence[Tensor], plain: Plain, times: float
) -> Callable[[Sequence[Tensor]], tuple[float, float]]:
    """`error_by_the_rule` for several results of the same inputs: the reference is made once and kept."""

    @functools.cache
    def reference() -> tuple[list[Tensor], float]:
        """What `plain` gives in fp32, on all heads, and the most allowed."""
        right: list[Tensor] = []
        allowed = 0.0
        for part in _few_heads(inputs[0]):
            mine = [t[part] for t in inputs]
            exact, same = plain(*(t.to(exact_float32()) for t in mine)), plain(*mine)
            right = right or [t.new_empty(*inputs[0].shape[:2], *t.shape[2:]) for t in exact]
            for whole, one, rounded in zip(right, exact, same, strict=True):
                whole[part] = one
                allowed = max(allowed, times * float((rounded.float() - one).abs().max()) + 1e-5)
        return right, allowed

    def error(results: Sequence[Tensor]) -> tuple[float, float]:
        right, allowed = reference()
        if len(results) != len(right):
            raise ValueError(f"there are {len(results)} results, but {len(right)} references")
        for result, exact in zip(results, right, strict=True):
            need_same_shape(result, exact)
        return worst(
            float((result[part].float() - exact[part]).abs().max())
            for result, exact in zip(results, right, strict=True) for part in _few_heads(inputs[0])
        ), allowed

    return error


def _few_heads(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which (sequence, heads) to look at next: so many heads of one sequence that their N × N are `PIECE` numbers."""
    batch, heads, n = q.shape[:3]
    step = max(1, PIECE // n**2)
    for b in range(batch):
        for first in range(0, heads, step):
            yield slice(b, b + 1), slice(first, min(first + step, heads))
