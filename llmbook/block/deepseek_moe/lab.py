"""Routers on the same tokens: what each choice does to loads, groups and gates."""

import functools

import torch

from .balance import load_of, update_bias
from .gate import V3, Routing, Rule, route

Tensor = torch.Tensor

EXPERTS, GROUPS, KEEP, ACTIVE = 64, 8, 3, 6
RULES = {
    "softmax": Rule(EXPERTS, 1, 1, ACTIVE, 1.0, "softmax", 1, normalise=False),
    "sigmoid": Rule(EXPERTS, 1, 1, ACTIVE, 1.0),
    "sigmoid, 3 of 8 groups": Rule(EXPERTS, GROUPS, KEEP, ACTIVE, 1.0),
    "groups and bias": Rule(EXPERTS, GROUPS, KEEP, ACTIVE, 1.0),
}


def lab_logits(tokens: int, skew: float, experts: int = EXPERTS, seed: int = 0) -> Tensor:
    """Logits [tokens, experts], float64, of a router that likes some experts by about e^(± skew)."""
    g = torch.Generator().manual_seed(seed)
    popular = skew * torch.randn(experts, generator=g, dtype=torch.float64)
    return torch.randn(tokens, experts, generator=g, dtype=torch.float64) + popular


@functools.cache
def fitted_bias(skew: float, rule: Rule = V3, steps: int = 100, gamma: float = 0.01) -> Tensor:
    """The bias after so many updates on other tokens of the same router, [E]."""
    bias = torch.zeros(rule.experts, dtype=torch.float64)
    every = lab_logits(128 * (steps + 8), skew, rule.experts)[8 * 128 :]
    for logits in every.split(128):
        load = load_of(route(logits, rule, bias).expert, rule.experts)
        bias = update_bias(bias, load, gamma)
    return bias


def lab_route(router: str, skew: float, tokens: int = 1024) -> Routing:
    """Route the same tokens by one of `RULES`; the last one with its fitted bias."""
    rule = RULES[router]
    bias = fitted_bias(skew, rule, 500, 0.005) if router == "groups and bias" else None
    return route(lab_logits(tokens, skew), rule, bias)


def groups_touched(expert: Tensor) -> Tensor:
    """In how many of the 8 groups each token's experts lie, [T]. expert: [T, k]."""
    inside = torch.zeros(len(expert), GROUPS, dtype=torch.bool, device=expert.device)
    return inside.scatter_(1, expert // (EXPERTS // GROUPS), True).sum(1)
