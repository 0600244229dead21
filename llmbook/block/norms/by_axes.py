"""LayerNorm and BatchNorm: the same operation as RMSNorm's with a mean, over a token's axis or over all tokens."""

import torch
from torch import Tensor

from .standardise import check, standardise, standardise_backward


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Each token by its own mean and variance, then gain and bias.

    Args:
        x: [..., D], floating. weight, bias: [D].

    Raises:
        ValueError: widths that differ, D = 0, an integer x, eps ≤ 0 or NaN.
    """
    check(x, eps, weight=weight, bias=bias)
    x_hat, _ = standardise(x, (-1,), eps)
    y = x_hat * weight
    return y if bias is None else y + bias


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, [..., D], weight and bias, [D]."""
    check(x, eps, weight=weight)
    x_hat, r = standardise(x, (-1,), eps)
    dx = standardise_backward(grad * weight, x_hat, r, (-1,))
    return dx, *_sums(grad, x_hat)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    running: tuple[Tensor, Tensor] | None = None, momentum: float = 0.1,
    training: bool = True,
) -> Tensor:
    """Each feature by its mean and variance over all other axes.

    Args:
        x: [..., D] with the features last; torch wants them second.
        weight, bias: [D].
        running: mean and variance, [D] each. Training moves them, in
            place, by `momentum` towards the batch's; otherwise they are
            used instead of the batch's. The running variance is the
            unbiased one, Σ/(n−1); the batch is divided by Σ/n.

    Raises:
        ValueError: as `layer_norm`; also training on fewer than two
            values per feature, and no running statistics outside training.
    """
    check(x, eps, weight=weight, bias=bias)
    if not training:
        if running is None:
            raise ValueError(
                "outside training, running must hold a mean and a variance, "
                "but it is None"
            )
        r = torch.rsqrt(running[1] + eps)
        return (x - running[0]) * r * weight + bias
    axes = batch_axes(x)
    if running is not None:
        with torch.no_grad():
            running[0].lerp_(x.mean(axes), momentum)
            running[1].lerp_(x.var(axes, correction=1), momentum)
    return standardise(x, axes, eps)[0] * weight + bias


def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, [..., D], weight and bias, [D], in training."""
    check(x, eps, weight=weight)
    axes = batch_axes(x)
    x_hat, r = standardise(x, axes, eps)
    dx = standardise_backward(grad * weight, x_hat, r, axes)
    return dx, *_sums(grad, x_hat)


def batch_axes(x: Tensor) -> tuple[int, ...]:
    """All axes but the last, which must hold two values per feature.

    Raises:
        ValueError: fewer: the variance of one value is 0, of none NaN.
    """
    values = x.numel() // x.shape[-1]
    if x.dim() < 2 or values < 2:
        raise ValueError(
            "BatchNorm in training needs two values per feature or more, "
            f"but x is {list(x.shape)}"
        )
    return tuple(range(x.dim() - 1))


def _sums(grad: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and bias serve all tokens: their gradients sum over tokens."""
    width = grad.shape[-1]
    gain = (grad * x_hat).reshape(-1, width).sum(0)
    return gain, grad.reshape(-1, width).sum(0)
