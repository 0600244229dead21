"""What a norm does to training, measured: the same small network with each norm, many rates and seeds at once."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .standardise import standardise

NORMS = ("none", "batch", "layer", "rms", "batch + shift")
SCALES = (0.5, 1.0, 2.0)
RATES = torch.logspace(-2.5, 0, 6, dtype=torch.float64)
LAYERS, WIDTH, POINTS, SEEDS = 6, 32, 48, 3


class Runs(NamedTuple):
    """Loss after training, and how far the last layer's inputs jump between two steps, [seeds, rates] each."""

    losses: Tensor
    shift: Tensor

    def best(self) -> Tensor:
        """Each seed's smallest loss, [seeds]."""
        return self.losses.min(1).values

    def shift_at_best(self) -> Tensor:
        """The shift of the runs that `best` names, [seeds]."""
        return self.shift.gather(1, self.losses.argmin(1, keepdim=True))[:, 0]


def normed(h: Tensor, norm: str, generator: torch.Generator | None = None) -> Tensor:
    """h, [runs, points, width], normed over points or features.

    "batch + shift" is Santurkar et al.'s counter-example: after the norm
    each feature is scaled and shifted at random, anew at every step, so
    later layers see inputs that jump about more than without a norm.
    """
    if norm == "none":
        return h
    axes = (1,) if norm.startswith("batch") else (-1,)
    h = standardise(h, axes, 1e-5, centre=norm != "rms")[0]
    if norm == "batch + shift":
        drawn = torch.rand(2, 1, 1, h.shape[-1], generator=generator, dtype=h.dtype)  # where the generator is
        scale, shift = drawn.to(h.device)
        h = h * (0.75 + scale / 2) + (shift - 0.5)
    return h


def forward(
    weights: Tensor, x: Tensor, norm: str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs, [runs, points, 1], and the last layer's inputs; weights are [runs, layers, width, width], x is [runs,
    points, width]."""
    h = x
    for layer in range(weights.shape[1] - 1):
        h = torch.relu(normed(h @ weights[:, layer], norm, generator))
    return h @ weights[:, -1, :, :1], h


def problems(seeds: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """One regression problem per seed: inputs, [seeds, points, width], targets of mean 0 and variance 1."""
    x = torch.randn(seeds, POINTS, WIDTH, generator=g, dtype=torch.float64)
    a, b = torch.randn(2, seeds, WIDTH, 1, generator=g, dtype=torch.float64) / WIDTH**0.5
    y = torch.sin(2 * x @ a) + (x @ b).abs()
    return x, (y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True)


def train(norm: str, rates: Tensor, steps: int = 50, scale: float = 1.0, seeds: int = SEEDS) -> Runs:
    """Plain gradient descent on all the data, every seed at every learning rate side by side.

    Args:
        norm: one of NORMS. rates: [rates]. scale: multiplies the initial weights (He initialisation).

    Returns:
        Mean losses of the last ten steps, relative to predicting the mean; infinite for a run that left the finite
        numbers. The shift is the mean change of a feature's mean from one step to the next, in units of its spread.

    Raises:
        ValueError: a norm that is none of NORMS.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
    g = torch.Generator().manual_seed(0)
    x, y = (t.repeat_interleave(len(rates), 0) for t in problems(seeds, g))
    start = torch.randn(seeds, LAYERS, WIDTH, WIDTH, generator=g, dtype=torch.float64) * scale * (2 / WIDTH) ** 0.5
    weights = start.repeat_interleave(len(rates), 0).requires_grad_()
    step_size = rates.repeat(seeds).view(-1, 1, 1, 1)
    losses, moved, before = [], [], None
    for _ in range(steps):
        out, h = forward(weights, x, norm, g)
        loss = (out - y).pow(2).mean((1, 2))
        (grad,) = torch.autograd.grad(loss.sum(), weights)
        with torch.no_grad():
            weights -= step_size * grad
            mean, spread = h.mean(1), h.std(1).mean(-1)
            if before is not None:
                moved.append((mean - before).abs().mean(-1) / spread)
            before = mean
        losses.append(loss.detach())
    final = torch.stack(losses[-10:]).mean(0).nan_to_num(float("inf"))
    return Runs(final.view(seeds, -1), torch.stack(moved).mean(0).view(seeds, -1))


@functools.cache
def runs(norm: str, scale: float) -> Runs:
    """Fifty steps at each of RATES, from weights `scale` times He's."""
    return train(norm, RATES, 50, scale)
