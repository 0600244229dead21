"""A mixture-of-experts layer in the seven functions, and the plain loop that it must equal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor
Expert = Callable[[Tensor], Tensor]


class Routing(NamedTuple):
    """Where T tokens go among E experts, k each.

    Attributes:
        chosen: [T, k], int64: each token's experts, best first.
        gates: [T, k]: their weights, each row sums to 1.
        mask: [T, E], bool: whether token t goes to expert e.
        load: [E], int64: tokens per expert; the sum is T·k.
        expert, token: [T·k], int64: the pairs, sorted by expert.
    """

    chosen: Tensor
    gates: Tensor
    mask: Tensor
    load: Tensor
    expert: Tensor
    token: Tensor


def route(logits: Tensor, k: int) -> Routing:
    """Choose k experts per token. logits: [T, E], a floating dtype.

    Raises:
        ValueError: logits are not [T, E], or k is not in [1, E].
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} experts from logits {list(logits.shape)}")
    experts = logits.shape[1]
    chosen = logits.topk(k, dim=1).indices
    gates = logits.gather(1, chosen).softmax(1)
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    load = chosen.flatten().bincount(minlength=experts)
    expert, token = mask.transpose(0, 1).nonzero(as_tuple=True)
    return Routing(chosen, gates, mask, load, expert, token)


def mixture(
    x: Tensor, logits: Tensor, experts: Sequence[Expert], k: int
) -> Tensor:
    """Each token through its k experts: sort, compute, add back.

    Args:
        x: [T, D]; logits: [T, E]; experts: E functions, [n, D] → [n, D].

    Returns: [T, D]; row t is Σ gate · expert(x[t]) over its experts.

    Raises:
        ValueError: as route, or the number of experts is not E.
    """
    if len(experts) != logits.shape[1]:
        raise ValueError(f"{len(experts)} experts, logits for {logits.shape[1]}")
    plan = route(logits, k)
    rows = plan.token.unsqueeze(1).expand(-1, x.shape[1])
    parts = x.gather(0, rows).split(plan.load.tolist())
    done = torch.cat([f(part) for f, part in zip(experts, parts, strict=True)])
    weights = torch.zeros_like(logits).scatter(1, plan.chosen, plan.gates)
    weight = weights[plan.token, plan.expert].unsqueeze(1)
    return torch.zeros_like(x).scatter_add(0, rows, done * weight)


def dense_mixture(
    x: Tensor, logits: Tensor, experts: Sequence[Expert], k: int
) -> Tensor:
    """The same by a loop: every expert sees every token, and most of what
    it computes is multiplied by 0. Arguments as for `mixture`, without ties."""
    best = logits.topk(k, dim=1).values[:, -1:]
    gates = logits.masked_fill(logits < best, -torch.inf).softmax(1)
    return sum(
        (gates[:, e : e + 1] * f(x) for e, f in enumerate(experts)),
        start=torch.zeros_like(x),
    )
