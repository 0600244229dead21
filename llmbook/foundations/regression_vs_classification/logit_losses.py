"""Three losses of the same logits: value, gradient and Hessian written down. y is a distribution, [..., V]."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmbook.foundations.matrix_calculus.closed_forms import softmax_jacobian

from .likelihoods import categorical_nll, squared_error

Tensor = torch.Tensor


def brier(z: Tensor, y: Tensor) -> Tensor:
    """MSE on probabilities: mean over V of (softmax(z) − y)². [..., V] → [...]."""
    return squared_error(z.softmax(-1), y).mean(-1)


def logit_mse(z: Tensor, y: Tensor) -> Tensor:
    """MSE on raw logits, no softmax: mean over V of (z − y)². [..., V] → [...]."""
    return squared_error(z, y).mean(-1)


def cross_entropy_gradient(z: Tensor, y: Tensor) -> Tensor:
    """p − y. z, y: [..., V]; returns ∂L/∂z, [..., V]."""
    return z.softmax(-1) - y


def brier_gradient(z: Tensor, y: Tensor) -> Tensor:
    """2 (diag(p) − ppᵀ)(p − y) / V, without building the V × V matrix."""
    p = z.softmax(-1)
    e = p - y
    return 2 * p * (e - (p * e).sum(-1, keepdim=True)) / z.shape[-1]


def logit_mse_gradient(z: Tensor, y: Tensor) -> Tensor:
    """2 (z − y) / V: no softmax, so nothing to saturate."""
    return 2 * (z - y) / z.shape[-1]


def cross_entropy_hessian(z: Tensor, y: Tensor) -> Tensor:
    """diag(p) − ppᵀ, whatever the label is. z, y: [V]; returns [V, V]."""
    return softmax_jacobian(z.softmax(-1))


def brier_hessian(z: Tensor, y: Tensor) -> Tensor:
    """The derivative of 2 p ∘ (e − ⟨p, e⟩) / V, with e = p − y, J = diag(p) − ppᵀ.

    z, y: [V]; returns [V, V].
    """
    p = z.softmax(-1)
    e, jacobian = p - y, softmax_jacobian(p)
    direct = (e - p @ e + p)[:, None] * jacobian
    return 2 * (direct - torch.outer(p, jacobian @ (e + p))) / len(z)


def logit_mse_hessian(z: Tensor, y: Tensor) -> Tensor:
    """2/V times the identity. z, y: [V]; returns [V, V]."""
    return 2 * torch.eye(len(z), dtype=z.dtype, device=z.device) / len(z)


class Loss(NamedTuple):
    """value and gradient take z, y [..., V]; hessian takes [V]."""

    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor], Tensor]


LOSSES = {
    "cross-entropy": Loss(categorical_nll, cross_entropy_gradient, cross_entropy_hessian),
    "MSE on probabilities": Loss(brier, brier_gradient, brier_hessian),
    "MSE on logits": Loss(logit_mse, logit_mse_gradient, logit_mse_hessian),
}


def at_margin(classes: int, margin: float) -> tuple[Tensor, Tensor]:
    """Logits of a true class (margin), one rival (0) and silent others (−12), and the one-hot label: [V] each."""
    z = torch.full((classes,), -12.0, dtype=torch.float64)
    z[0], z[1] = margin, 0
    return z, torch.eye(classes, dtype=torch.float64)[0]


@functools.cache
def by_margin(name: str, classes: int, margins: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """A loss, and log₁₀ of the size of its slope at the true logit, for every margin; a slope of 0 gives −12."""
    pairs = [at_margin(classes, margin) for margin in margins]
    values = [float(LOSSES[name].value(*pair)) for pair in pairs]
    slopes = [float(LOSSES[name].gradient(*pair)[0].abs().clamp(min=1e-12).log10()) for pair in pairs]
    return values, slopes
