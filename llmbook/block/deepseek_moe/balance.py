"""Even loads without a loss that pulls at the gates: a bias per expert, moved after each step (arXiv:2408.15664)."""

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def load_of(expert: Tensor, experts: int) -> Tensor:
    """How many tokens each expert got, [E], int64. expert: [T, k], int64."""
    return torch.bincount(expert.flatten(), minlength=experts)


def update_bias(bias: Tensor, load: Tensor, gamma: float = 0.001) -> Tensor:
    """The next step's bias, [E]: γ down where the load was above its mean, γ up
    where below, as it was where equal. By sign alone: how far off does not count.

    Args:
        bias, load: [E]; the load may be any count, over any number of steps.
        gamma: 0.001 for most of DeepSeek-V3's training.

    Raises:
        ValueError: shapes that differ, or a negative γ.
    """
    if bias.shape != load.shape or bias.dim() != 1 or not gamma >= 0:
        raise ValueError(
            "the update needs bias and load [E] and gamma 0 or more, not "
            f"{list(bias.shape)}, {list(load.shape)} and {gamma}"
        )
    # Counts are compared as E·load against their sum: exact, so equal is equal.
    excess = load * len(load) - load.sum()
    return bias - gamma * excess.sign().to(bias.dtype)


def sequence_balance_loss(scores: Tensor, active: int) -> Tensor:
    """DeepSeek-V3's small complementary loss, without its α (0.0001 there).

    Per sequence Σ f_i P_i: f_i is E/(k S) times how often i is among the k best
    raw scores, without a gradient; P_i is the mean of i's share of the scores.
    It is 1 for uniform scores. Equations 17 to 20 of arXiv:2412.19437.

    Args:
        scores: [B, S, E], raw; mean over the B sequences. None: 0.

    Raises:
        ValueError: another number of dimensions, or k not 1 to E.
    """
    if scores.dim() != 3 or not 1 <= active <= scores.shape[2]:
        raise ValueError(
            f"the loss needs scores [B, S, E] and k from 1 to E, not "
            f"{list(scores.shape)} and {active}"
        )
    batch, length, experts = scores.shape
    top = scores.detach().topk(active, dim=-1).indices
    chosen = F.one_hot(top, experts).sum(2).to(scores.dtype)
    f = chosen.sum(1) * (experts / (active * max(length, 1)))
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    mean = share.sum(1) / max(length, 1)
    return (f * mean).sum() / max(batch, 1)


def entropy(load: Tensor) -> Tensor:
    """Entropy of the loads in nats, [...]: ln E if even, 0 if one expert has all.

    load: [..., E], counts or shares; a row of zeros has entropy 0.
    """
    wide = load.double()
    share = wide / wide.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(share).sum(-1)


def peak(load: Tensor) -> Tensor:
    """The busiest expert's load over the mean, [...]: 1 if even. load: [..., E]."""
    wide = load.double()
    return wide.amax(-1) / wide.mean(-1).clamp(min=1e-300)
