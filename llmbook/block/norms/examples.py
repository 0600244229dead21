"""The few numbers that the chapter's pictures show: one small batch, and vectors of three features."""

import functools
import math

import torch
from torch import Tensor

from .standardise import standardise, standardise_backward

B, S, D = 3, 4, 6
BATCH_AXES = (0, 1)


@functools.cache
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x, [B, S, D], gain and bias, [D]."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(B, S, D, generator=g, dtype=torch.float64) * torch.tensor([1, 0.6, 1.2, 0.8, 1, 0.7]) + 0.6
    gain = torch.tensor([1.0, 0.5, 1.6, 1.0, 0.7, 1.3], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.4, -0.3, 0.2, 0.0, 0.5], dtype=torch.float64)
    return x, gain, bias


def stages(norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, x̂ and y of the whole batch."""
    x, gain, bias = batch()
    axes = BATCH_AXES if norm == "BatchNorm" else (-1,)
    x_hat, _ = standardise(x, axes, 1e-6, centre=norm != "RMSNorm")
    return x, x_hat, x_hat * gain + (0 if norm == "RMSNorm" else bias)


# A camera: (1,1,1) points up and 25° towards the reader, who sees the plane of mean 0 from above.
ALL = torch.ones(3, dtype=torch.float64) / 3**0.5
RIGHT = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / 2**0.5
FRONT = torch.linalg.cross(RIGHT, ALL)
UP = math.cos(math.radians(25)) * ALL - math.sin(math.radians(25)) * FRONT
DIRECTION = 3**0.5 * torch.nn.functional.normalize(RIGHT + 0.9 * ALL + 0.5 * FRONT, dim=0)
UPSTREAM = 0.9 * RIGHT + 1.1 * ALL - 0.9 * FRONT
ONES = torch.ones(3, dtype=torch.float64)


@functools.cache
def vectors(norm: str, length: float) -> dict[str, Tensor]:
    """x, x̂, r, a gradient for x̂, its parts, and dx, [3] each, for x at `length` times RMS 1."""
    x = DIRECTION * length
    centre = norm == "LayerNorm"
    x_hat, r = standardise(x, (-1,), 1e-12, centre)
    g = UPSTREAM
    along = x_hat * (g * x_hat).mean()
    mean = g.mean() * ONES if centre else 0 * ONES
    dx = standardise_backward(g, x_hat, r, (-1,), centre)
    return {"x": x, "x̂": x_hat, "ĝ": g, "along": along, "mean": mean, "rest": g - along - mean, "dx": dx, "r": r[0]}
