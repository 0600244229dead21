"""RMSNorm as models use it: Hugging Face's numerics, the module, the fused residual form, the backward by hand."""

import torch
from torch import Tensor, nn

from .standardise import check, standardise, standardise_backward


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last axis.

    Computed in float32, rounded to the dtype of x, then multiplied by
    weight: the order of Hugging Face's LlamaRMSNorm and of vLLM. Float64
    stays float64.

    Args:
        x: [..., D]; no rows at all is fine. A row of zeros gives zeros,
            a NaN makes its row NaN, an infinity makes itself NaN and the
            rest of its row 0.
        weight: [D] or None.

    Raises:
        ValueError: widths that differ, D = 0, an integer x, eps ≤ 0 or NaN.
    """
    check(x, eps, weight=weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    x_hat, _ = standardise(x.to(wide), (-1,), eps, centre=False)
    x_hat = x_hat.to(x.dtype)
    return x_hat if weight is None else weight * x_hat


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gradients for x, [..., D], and weight, [D], given that of the output."""
    check(x, eps, weight=weight)
    x_hat, r = standardise(x, (-1,), eps, centre=False)
    dx = standardise_backward(grad * weight, x_hat, r, (-1,), centre=False)
    return dx, (grad * x_hat).reshape(-1, x.shape[-1]).sum(0)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What stands between two sublayers: add to the stream, then norm it.

    The sum is rounded to the dtype of the stream before it is normalised,
    as in vLLM's `fused_add_rms_norm`; `kernel.add_rms_norm` does the same
    in one pass.

    Args:
        x, residual: [..., D], a sublayer's output and the stream.

    Returns:
        The normed sum for the next sublayer, and the sum: the new stream.

    Raises:
        ValueError: x and residual differ in shape; else as `rms_norm`.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"x is {list(x.shape)} but residual is {list(residual.shape)}: "
            "they are added, so their shapes must be equal"
        )
    stream = residual + x
    return rms_norm(stream, weight, eps), stream


class RMSNorm(nn.Module):
    """RMSNorm with a gain of ones to start from.

    Its one parameter is called `weight`, [D], as in LlamaRMSNorm, so that
    a checkpoint's names fit.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        check(self.weight, eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
