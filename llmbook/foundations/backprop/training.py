"""A small classifier trained twice from the same weights: by the engine and by PyTorch."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .engine import Var, cross_entropy, relu

Tensor = torch.Tensor


def spirals(points: int = 40, arms: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points on spiral arms, no line separates them. Returns x [arms·points, 2], labels [arms·points]."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.linspace(0.1, 1, points, dtype=torch.float64).repeat(arms)
    labels = torch.arange(arms).repeat_interleave(points)
    noise = 0.12 * torch.randn(arms * points, generator=generator, dtype=torch.float64)
    angle = 3.5 * radius + 2 * math.pi * labels / arms + noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def starting_weights(hidden: int = 32, classes: int = 3, seed: int = 0) -> list[Tensor]:
    """W₁ [2, hidden], b₁, W₂ [hidden, classes], b₂."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])
        for shape in ((2, hidden), (hidden, classes))
    )
    return [first, first.new_zeros(hidden), second, second.new_zeros(classes)]


def network(x: Var, w1: Var, b1: Var, w2: Var, b2: Var) -> Var:
    """Two layers. x: [n, 2]. Returns logits [n, classes]."""
    return relu(x @ w1 + b1) @ w2 + b2


def train(
    x: Tensor, labels: Tensor, start: Sequence[Tensor], steps: int, lr: float,
    each: Callable[[int, list[Tensor]], None] = lambda step, weights: None,
) -> list[float]:
    """Gradient descent by the engine. Returns the loss before every step.

    each(step, weights) is called before every step.
    """
    weights, losses = [Var(p.clone(), True) for p in start], []
    for step in range(steps):
        each(step, [p.value for p in weights])
        loss = cross_entropy(network(Var(x), *weights), labels)
        loss.backward()
        losses.append(loss.value.item())
        for p in weights:
            if p.grad is not None:
                p.value -= lr * p.grad
            p.grad = None
    return losses


def train_torch(x: Tensor, labels: Tensor, start: Sequence[Tensor], steps: int, lr: float) -> list[float]:
    """The same by PyTorch's autograd and torch.optim.SGD."""
    w1, b1, w2, b2 = weights = [p.clone().requires_grad_() for p in start]
    optimizer, losses = torch.optim.SGD(weights, lr), []
    for _ in range(steps):
        loss = F.cross_entropy(torch.relu(x @ w1 + b1) @ w2 + b2, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def recorded(at: Sequence[int], lr: float) -> tuple[list[float], dict[int, list[Tensor]]]:
    """The spirals' classifier: the losses up to the last step of `at`, and the weights before each step of `at`."""
    saved: dict[int, list[Tensor]] = {}

    def keep(step: int, weights: list[Tensor]) -> None:
        if step in at:
            saved[step] = [w.clone() for w in weights]

    return train(*spirals(), starting_weights(), max(at) + 1, lr, keep), saved
