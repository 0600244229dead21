"""Does a probability of 0.9 come true nine times in ten? Reliability, its error, and one temperature to mend it."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from .likelihoods import categorical_nll

Tensor = torch.Tensor


class Reliability(NamedTuple):
    """Per bin of confidence: [bins] each; an empty bin has zeros."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: |accuracy − confidence|, by count."""
        gap = (self.accuracy - self.confidence).abs()
        return float((self.counts * gap).sum() / self.counts.sum())


def reliability(p: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """Confidence against accuracy, in equally wide bins of confidence.

    Args:
        p: predicted probabilities, [n, V], n ≥ 1.
        labels: ids, [n].

    Raises:
        ValueError: no example, or shapes that do not match.
    """
    if p.ndim != 2 or labels.shape != p.shape[:1] or not len(p):
        raise ValueError(
            f"probabilities {list(p.shape)} and labels {list(labels.shape)} "
            "should be [n, V] and [n], with n at least 1"
        )
    confidence, choice = p.max(-1)
    at = (confidence * bins).long().clamp(max=bins - 1)

    def total(weight: Tensor) -> Tensor:
        return p.new_zeros(bins).index_add(0, at, weight.to(p))

    count = total(torch.ones_like(confidence))
    filled = count.clamp(min=1)
    right = total(choice == labels)
    return Reliability(count, total(confidence) / filled, right / filled)


def best_temperature(logits: Tensor, labels: Tensor, steps: int = 60) -> float:
    """The T that minimises the cross-entropy of logits / T, by bisection.

    The loss is convex in 1/T, and its slope there is the mean of
    ⟨softmax(z/T), z⟩ − z_label. logits: [n, V]; labels: [n].
    Raises ValueError if the best 1/T is not between 1e-3 and 1e3.
    """
    def slope(inverse: float) -> float:
        b = logits.new_tensor(inverse, requires_grad=True)
        loss = categorical_nll(b * logits, labels).mean()
        return float(torch.autograd.grad(loss, b)[0])

    low, high = 1e-3, 1e3
    if slope(low) > 0 or slope(high) <= 0:
        raise ValueError(
            "no temperature between 0.001 and 1000 is best: the logits never "
            "err, or know nothing"
        )
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low * high) ** -0.5


def overlapping(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes that overlap, round a circle: x [n, 2], labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    angle = 2 * torch.pi * labels.double() / 3
    centre = 1.3 * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + torch.randn(n, 2, generator=generator, dtype=torch.float64), labels


class Judged(NamedTuple):
    """Logits [n, 3] of data not trained on, after some steps: to fit a temperature on, and to test with."""

    held_out: Tensor
    test: Tensor


@functools.cache
def overfit(keep: tuple[int, ...]) -> dict[int, Judged]:
    """A network far too large for its 90 examples, judged after each of `keep`'s Adam steps.

    The held-out data are overlapping(3000, seed=2), the test data overlapping(6000, seed=1).
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (x, labels), judged = overlapping(90, seed=0), {}
    for step in range(max(keep) + 1):
        if step in keep:
            with torch.no_grad():
                judged[step] = Judged(model(overlapping(3000, seed=2)[0]), model(overlapping(6000, seed=1)[0]))
        optimizer.zero_grad()
        categorical_nll(model(x), labels).mean().backward()
        optimizer.step()
    return judged


def judge(logits: Judged, fitted: bool) -> tuple[float, float, Reliability]:
    """Temperature (1, or the best on the held-out data), accuracy and reliability on the test data."""
    t = best_temperature(logits.held_out, overlapping(3000, seed=2)[1]) if fitted else 1.0
    labels = overlapping(6000, seed=1)[1]
    right = float((logits.test.argmax(-1) == labels).double().mean())
    return t, right, reliability((logits.test / t).softmax(-1), labels)
