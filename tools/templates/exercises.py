"""Checkers for the NAME chapter's exercises."""

from collections.abc import Callable

import torch

from llmbook.kit.exercise import exercise, expect


@exercise
def update_a_mean(answer: Callable[[float, int, float], float]) -> str:
    """answer(mean, n, value) → the mean of n + 1 values, given that of the first n and the next value."""
    values = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    mean = 0.0
    for n, value in enumerate(values.tolist()):
        mean = answer(mean, n, value)
        wanted = float(values[: n + 1].mean())
        told = f"after {n + 1} values the mean is {wanted:.3f}, but you gave {mean:.3f}"
        expect(abs(mean - wanted) < 1e-12, told)
    return "right at every step."
