"""Inverted dropout, and three ways to have its backward: by autograd, by a stored mask, by a replayed one."""

from typing import Any

import torch

from .philox import Stream

Tensor = torch.Tensor


def check(x: Tensor, p: float) -> None:
    """Refuse what dropout cannot mean.

    Raises:
        ValueError: p is not in [0, 1] (NaN is not either).
        TypeError: x is not floating point, so it cannot be scaled.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is the probability of a zero, between 0 and 1, not {p}")
    if not x.is_floating_point():
        raise TypeError(f"dropout scales what it keeps, so x must be floating point, not {x.dtype}")


def scaled_mask(x: Tensor, p: float, stream: Stream) -> Tensor:
    """0 with probability p, else 1/(1-p); shape, dtype and device of x."""
    keep = (stream.uniform(x.shape) >= p).to(x)
    return keep / (1 - p) if p < 1 else keep  # p = 1 keeps nothing to scale


def dropout(
    x: Tensor, p: float, stream: Stream, training: bool = True
) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014, section 10).

    Args:
        x: any shape, floating point.
        p: probability of a zero, in [0, 1].
        stream: where the mask comes from; advances by x.numel().
        training: if false, x itself comes back and nothing is drawn.

    Raises:
        ValueError: p outside [0, 1].
        TypeError: x is not floating point.
    """
    check(x, p)
    if not training or p == 0:
        return x
    return x * scaled_mask(x, p, stream)


class StoredMask(torch.autograd.Function):
    """dropout(x, p, stream) that keeps one byte per element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, stream: Stream) -> Tensor:
        check(x, p)
        mask = scaled_mask(x, p, stream)
        ctx.save_for_backward(mask != 0)
        ctx.p = p
        return x * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        mask = keep.to(grads[0])
        return grads[0] * (mask / (1 - ctx.p) if ctx.p < 1 else mask), None, None


class ReplayedMask(torch.autograd.Function):
    """dropout(x, p, stream) that keeps two integers and draws again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, stream: Stream) -> Tensor:
        check(x, p)
        ctx.save_for_backward(torch.tensor([stream.seed, stream.offset]))
        ctx.p = p
        return x * scaled_mask(x, p, stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        seed, offset = ctx.saved_tensors[0].tolist()
        mask = scaled_mask(grads[0], ctx.p, Stream(seed, offset))
        return grads[0] * mask, None, None
