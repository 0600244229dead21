"""What a capacity costs: tokens that find no place, and places that find no token."""

from typing import NamedTuple

import torch

from .routing import capacity, route

Tensor = torch.Tensor


class Waste(NamedTuple):
    """dropped: share of the tokens. empty: share of the places, all of which are computed."""

    dropped: float
    empty: float


def waste(counts: Tensor, places: int) -> Waste:
    """From the tokens that chose each expert, [E], and the places per expert."""
    kept = counts.clamp(max=places).sum().item()
    total, room = counts.sum().item(), places * len(counts)
    return Waste(
        1 - kept / total if total else 0.0, 1 - kept / room if room else 0.0
    )


def skewed_logits(tokens: int, experts: int, skew: float, seed: int = 0) -> Tensor:
    """Logits [tokens, experts] of a router whose experts differ in popularity by e^(± skew)."""
    g = torch.Generator().manual_seed(seed)
    popular = torch.linspace(skew, -skew, experts)
    return torch.randn(tokens, experts, generator=g) + popular


def waste_of(tokens: int, experts: int, factor: float, skew: float, seed: int = 0) -> Waste:
    """Route one batch of such a router, and count."""
    places = capacity(tokens, experts, factor)
    routing = route(skewed_logits(tokens, experts, skew, seed), places)
    return waste(torch.bincount(routing.expert, minlength=experts), places)
