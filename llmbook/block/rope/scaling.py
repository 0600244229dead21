"""Longer contexts than the model was trained on: which frequencies to slow down, and by how much.

s is the extension factor: a model trained on L tokens is to read s·L. Frequencies are [d/2], float64.
"""

import math

import torch
from torch import Tensor

from .rotation import frequencies


def interpolated(theta: Tensor, factor: float) -> Tensor:
    """Position interpolation (Chen et al. 2023): every pair s times slower.

    Dividing θ or the positions by s is the same thing.
    """
    need_factor(factor)
    return theta / factor


def ntk_base(head_dim: int, base: float, factor: float) -> float:
    """NTK-aware scaling (bloc97 2023): the base that makes the last pair
    exactly s times slower and leaves the first as it is: b·s^(d/(d−2)).

    Raises:
        ValueError: d below 4 (the first pair is the last), or s below 1.
    """
    need_factor(factor)
    if head_dim < 4:
        raise ValueError(f"NTK-aware scaling needs d ≥ 4, not {head_dim}")
    return base * factor ** (head_dim / (head_dim - 2))


def dynamic_ntk_base(
    head_dim: int, base: float, factor: float, length: int, trained: int
) -> float:
    """NTK-aware scaling that grows with the sequence: nothing up to the
    trained length L, then s' = s·length/L − (s − 1)."""
    need_factor(factor)
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return ntk_base(head_dim, base, stretch)


def by_parts(
    theta: Tensor, factor: float, trained: int,
    slow: float = 1.0, fast: float = 32.0,
) -> Tensor:
    """NTK-by-parts interpolation as the YaRN paper (Peng et al. 2023) has it.

    A pair that makes r = L·θ/2π turns in training is left alone if r is
    above `fast`, interpolated if below `slow`, blended linearly in r
    between. With slow=1, fast=4 this is Llama 3.1's scaling.
    """
    need_factor(factor)
    turns = trained * theta / (2 * math.pi)
    keep = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def yarn(
    head_dim: int, base: float, factor: float, trained: int,
    slow: float = 1.0, fast: float = 32.0,
) -> Tensor:
    """YaRN's frequencies as its authors' code and Hugging Face have them.

    The same idea as `by_parts`, but the blend is linear in the pair's
    index i, between the pairs (rounded outwards) that make `fast` and
    `slow` turns. Use with `yarn_attention_factor`.
    """
    need_factor(factor)

    def pair(turns: float) -> float:
        """The index i at which L·θ_i/2π equals `turns`."""
        wave = trained / turns / (2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(base))

    low = max(math.floor(pair(fast)), 0)
    high = min(math.ceil(pair(slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    blend = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    theta = frequencies(head_dim, base)
    return (1 - blend) * theta + blend * theta / factor


def yarn_attention_factor(factor: float) -> float:
    """0.1·ln(s) + 1: both tables are multiplied by it, so scores by its
    square, which sharpens a softmax over s times more tokens."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


METHODS = ("none", "position interpolation", "NTK-aware", "by parts (Llama 3.1)", "YaRN")


def extended(method: str, head_dim: int, base: float, factor: float, trained: int) -> Tensor:
    """The frequencies [d/2] that one of `METHODS` gives for factor × trained tokens.

    Raises:
        ValueError: a method that is none of them.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    theta = frequencies(head_dim, base)
    if method == "position interpolation":
        return interpolated(theta, factor)
    if method == "NTK-aware":
        return frequencies(head_dim, ntk_base(head_dim, base, factor))
    if method == "by parts (Llama 3.1)":
        return by_parts(theta, factor, trained, fast=4.0)
    return yarn(head_dim, base, factor, trained) if method == "YaRN" else theta


def unseen(theta: Tensor, new: Tensor, trained: int, length: int) -> Tensor:
    """Pairs that reach angles at `length` which training never showed.

    A pair that completed a turn in training has seen every angle; one
    that did not has seen L·θ radians and no more. Returns [d/2], bool.
    """
    partial = trained * theta < 2 * math.pi
    return partial & (length * new > trained * theta * (1 + 1e-9))


def need_factor(factor: float) -> None:
    """Refuse to shrink a context."""
    if not factor >= 1:
        raise ValueError(f"extension factor must be at least 1, not {factor}")
