"""A classifier with two parameters, so that its whole loss surface can be drawn, and gradient descent on it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Binary(NamedTuple):
    """A loss of one output z and a label y of 0 or 1, and the z above which class 1 is said."""

    value: Callable[[Tensor, Tensor], Tensor]
    threshold: float


BINARY = {
    "cross-entropy": Binary(lambda z, y: torch.nn.functional.softplus(z) - y * z, 0.0),
    "MSE on probabilities": Binary(lambda z, y: (torch.sigmoid(z) - y).square(), 0.0),
    "MSE on logits": Binary(lambda z, y: (z - y).square(), 0.5),
}


def sample(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One feature, two overlapping classes: x [n], around −1 and +1; labels 0.0 and 1.0 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n, dtype=torch.float64) % 2
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return 2 * labels - 1 + noise, labels


def output(weights: Tensor, x: Tensor) -> Tensor:
    """z = w x + b. weights: (w, b) last, [..., 2]; x: [n]. Returns [..., n]."""
    return weights[..., :1] * x + weights[..., 1:]


def mean_loss(name: str, weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The loss BINARY[name] averaged over the sample. weights: [..., 2] → [...]."""
    return BINARY[name].value(output(weights, x), labels).mean(-1)


class Path(NamedTuple):
    """Where gradient descent went, for every rate: weights [steps + 1, R, 2], losses and accuracy [steps + 1, R]."""

    weights: Tensor
    losses: Tensor
    accuracy: Tensor


def descend(
    name: str, start: tuple[float, float], rates: Sequence[float], steps: int, x: Tensor, labels: Tensor
) -> Path:
    """Plain gradient descent on `mean_loss`, once for each of R rates, every step kept."""
    rate, path = x.new_tensor(rates)[:, None], []
    at = x.new_tensor(start).repeat(len(rates), 1)
    for _ in range(steps + 1):
        path.append(at)
        here = at.clone().requires_grad_()
        total = mean_loss(name, here, x, labels).sum()
        at = at - rate * torch.autograd.grad(total, here)[0]
    weights = torch.stack(path)
    said = output(weights, x) > BINARY[name].threshold
    accuracy = (said == (labels == 1)).to(x.dtype).mean(-1)
    return Path(weights, mean_loss(name, weights, x, labels), accuracy)


def quickest(
    name: str, start: tuple[float, float], rates: Sequence[float], steps: int, x: Tensor, labels: Tensor
) -> tuple[float, Path]:
    """Of these rates the one that first comes within 5% of the lowest loss any reaches, and its path alone."""
    swept = descend(name, start, rates, steps, x, labels)
    there = swept.losses <= 1.05 * swept.losses.nan_to_num(torch.inf).min()
    first = torch.where(there.any(0), there.int().argmax(0), steps + 1)
    best = int(first.argmin())
    return rates[best], Path(*(part[:, best] for part in swept))
