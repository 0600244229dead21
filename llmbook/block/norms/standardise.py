"""The one operation behind every norm: subtract a mean or not, divide by a root mean square, over chosen axes."""

import math

import torch
from torch import Tensor


def standardise(
    x: Tensor, axes: tuple[int, ...], eps: float, centre: bool = True
) -> tuple[Tensor, Tensor]:
    """x̂ = (x − μ)·r with r = 1/√(mean((x − μ)²) + eps) over `axes`.

    Args:
        x: any shape, floating.
        axes: which axes share one μ and one r.
        centre: False leaves μ at 0: RMSNorm.

    Returns:
        x̂ in the shape of x, and r with size 1 along `axes`.
    """
    if centre:
        x = x - x.mean(axes, keepdim=True)
    r = torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + eps)
    return x * r, r


def standardise_backward(
    grad: Tensor, x_hat: Tensor, r: Tensor, axes: tuple[int, ...],
    centre: bool = True,
) -> Tensor:
    """The gradient for x, given the one for x̂.

    r·(ĝ − mean(ĝ) − x̂·mean(ĝ∘x̂)), without mean(ĝ) if the forward did
    not centre. Exact for every eps > 0.
    """
    along = x_hat * (grad * x_hat).mean(axes, keepdim=True)
    if centre:
        along = along + grad.mean(axes, keepdim=True)
    return r * (grad - along)


def check(x: Tensor, eps: float, **vectors: Tensor | None) -> None:
    """Refuse what has no defined norm, in one sentence.

    Args:
        x: [..., D], floating, D ≥ 1.
        eps: above 0 and finite: with 0, a row of zeros becomes NaN.
        **vectors: name → weight or bias, [D], or None.

    Raises:
        ValueError: anything else.
    """
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., D] with D of at least 1, but is {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating type, not {x.dtype}: a norm's results are fractions")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0 and finite, not {eps}: it keeps a row of zeros from becoming NaN")
    for name, vector in vectors.items():
        if vector is not None and list(vector.shape) != [x.shape[-1]]:
            raise ValueError(
                f"{name} must be [{x.shape[-1]}], one number per feature of x, but is {list(vector.shape)}"
            )
