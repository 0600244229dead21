"""Switch routing (arXiv:2101.03961): one expert per token, a capacity per expert, and the losses that keep loads even.

Shapes: T tokens, E experts, C places per expert, D features.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Routing(NamedTuple):
    """Where T tokens go.

    p: [T, E], router probabilities, float32 or wider.
    expert: [T], int64, the chosen one. gate: [T], its probability.
    place: [T], int64, the token's place in its expert's queue, from 0.
    kept: [T], bool; a token whose place is C or more is dropped.
    """

    p: Tensor
    expert: Tensor
    gate: Tensor
    place: Tensor
    kept: Tensor


def capacity(tokens: int, experts: int, factor: float) -> int:
    """Places per expert: ⌊factor · tokens / experts⌋, at most one per token.

    Raises:
        ValueError: no experts, or a negative factor or token count.
    """
    if experts < 1 or tokens < 0 or not factor >= 0:
        raise ValueError(
            "capacity needs one expert or more, and tokens and a factor of 0 or "
            f"more, not {experts} experts, {tokens} tokens, factor {factor}"
        )
    return min(int(factor * tokens / experts), tokens)


def route(logits: Tensor, places: int, order: Tensor | None = None) -> Routing:
    """The top-1 expert of every token, first come, first served.

    Args:
        logits: [T, E], float; T may be 0.
        places: C per expert; 0 drops every token.
        order: [T], a permutation, who comes first; by position if not given.

    Raises:
        ValueError: logits of another shape or with NaN, or a negative C.
    """
    if logits.dim() != 2 or not logits.shape[1] or places < 0:
        raise ValueError(
            "routing needs logits [T, E] with one expert or more, and 0 places "
            f"or more, not {list(logits.shape)} and {places}"
        )
    if bool(logits.isnan().any()):
        row = int(logits.isnan().any(1).nonzero()[0])
        raise ValueError(f"the router's logits of token {row} contain NaN")
    # Softmax in float32: half-precision logits would make ties of near-equals.
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    gate, expert = p.max(-1)
    order = torch.arange(len(p), device=p.device) if order is None else order
    chosen = torch.nn.functional.one_hot(expert[order], p.shape[1])
    queue = (chosen.cumsum(0) * chosen).sum(1) - 1
    place = torch.empty_like(expert).scatter_(0, order, queue)
    return Routing(p, expert, gate, place, place < places)


def load_balance_loss(p: Tensor, expert: Tensor) -> Tensor:
    """E Σ f_i P_i: 1 if uniform, E if one expert gets all (equations 4 to 6).

    f_i, the share of tokens sent to i, has no gradient; P_i, the mean
    probability of i, has. p: [T, E]; expert: [T]. No tokens: 0.
    """
    tokens, experts = p.shape
    share = torch.bincount(expert, minlength=experts).to(p) / max(tokens, 1)
    mean = p.sum(0) / max(tokens, 1)
    return experts * (share * mean).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp², which keeps logits small (ST-MoE,
    arXiv:2202.08906). logits: [T, E]. No tokens: 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1).square().sum() / max(len(logits), 1)


def expert_choice(logits: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """The other way round: each expert takes its C best tokens (arXiv:2202.09368).

    Returns [E, C] token indices and [E, C] gates. Every expert is full; a token
    may be taken by several experts or by none.

    Raises:
        ValueError: more places than tokens.
    """
    if not 0 <= places <= len(logits):
        raise ValueError(
            f"an expert can choose 0 to {len(logits)} tokens, not {places}"
        )
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    gate, token = p.topk(places, dim=0)
    return token.T, gate.T
