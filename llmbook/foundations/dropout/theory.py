"""What theory says of a mask: the binomial band of what is kept, and the moments of what comes out."""

from math import sqrt

import torch

Tensor = torch.Tensor


def kept_band(n: int, p: float, z: float = 4.0) -> tuple[float, float]:
    """Between which shares of n elements are kept: 1-p ± z standard errors.

    The count is binomial, so its share has standard error √(p(1-p)/n). With
    z = 4 one honest experiment in 16,000 falls outside.
    """
    half = z * sqrt(p * (1 - p) / n)
    return max(0.0, 1 - p - half), min(1.0, 1 - p + half)


def sum_variance(w: Tensor, x: Tensor, p: float) -> Tensor:
    """Var[w · dropout(x)] = p/(1-p) Σ w²x² for given w, x: [n], p < 1."""
    return p / (1 - p) * (w * x).square().sum()
