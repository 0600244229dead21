"""FlashAttention's own rule for a correct kernel, and the plain attention it compares with."""

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor


def standard(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention as three operations with S and P in memory, in the inputs' dtype; [batch, heads, N, d] throughout."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        n = q.shape[-2]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return scores.softmax(dim=-1) @ v


def error_by_the_rule(
    results: Sequence[Tensor], inputs: Sequence[Tensor], plain: Callable[..., Sequence[Tensor]], times: float
) -> tuple[float, float]:
    """The kernel's largest error against fp32, and the most allowed: `times` what `plain` makes in the same dtype.

    Args:
        results: the kernel's, each [batch, heads, …].
        inputs: what it got, each [batch, heads, …].
        plain: the same function by standard operations, called on one head at a time: N × N in fp32 has to fit.
    """
    worst, allowed = 0.0, 0.0
    for head in range(min(inputs[0].shape[1], 2)):  # two heads of the first sequence
        mine = [t[:1, head : head + 1] for t in inputs]
        exact, same = plain(*(t.float() for t in mine)), plain(*mine)
        for result, right, rounded in zip(results, exact, same, strict=True):
            error = (result[:1, head : head + 1].float() - right).abs().max()
            worst = float("nan") if error.isnan() else max(worst, float(error))
            allowed = max(allowed, times * float((rounded.float() - right).abs().max()) + 1e-5)
    return worst, allowed
