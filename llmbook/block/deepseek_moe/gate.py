"""DeepSeek's router: group-limited selection, a bias that only selects, gates from the raw scores.

Shapes: T tokens, E routed experts, G groups of E/G neighbours, k active experts per token.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Rule(NamedTuple):
    """How a gate chooses: DeepSeek-V3's by default, V2's by other values.

    experts: E. groups: G, of which each token may enter `keep`. active: k.
    scale: what the gates are multiplied by. score: "sigmoid" or "softmax".
    best: a group's score is the sum of its `best` highest: 2 in V3, 1 in V2.
    normalise: whether the gates are first made to sum to 1.
    """

    experts: int = 256
    groups: int = 8
    keep: int = 4
    active: int = 8
    scale: float = 2.5
    score: str = "sigmoid"
    best: int = 2
    normalise: bool = True


V3 = Rule()
V2 = Rule(160, 8, 3, 6, 16.0, "softmax", 1, normalise=False)


class Routing(NamedTuple):
    """Where T tokens go.

    scores: [T, E], sigmoid or softmax of the logits, without the bias.
    open: [T, G], bool, the groups each token may enter.
    expert: [T, k], int64, the chosen ones, in no particular order.
    weight: [T, k], their gates; they sum to `scale` under V3's rule.
    """

    scores: Tensor
    open: Tensor
    expert: Tensor
    weight: Tensor


def check(rule: Rule) -> None:
    """Refuse a rule that cannot choose.

    Raises:
        ValueError: groups that do not divide the experts, more groups kept than
            there are, more active experts than the kept groups hold, groups
            smaller than `best`, or an unknown score.
    """
    size, rest = divmod(rule.experts, rule.groups) if rule.groups > 0 else (0, 1)
    if rest or size < 1:
        raise ValueError(
            f"{rule.groups} groups do not divide {rule.experts} experts evenly"
        )
    if not 1 <= rule.keep <= rule.groups:
        raise ValueError(f"keep must be 1 to {rule.groups} groups, not {rule.keep}")
    if not 1 <= rule.active <= rule.keep * size:
        raise ValueError(
            f"{rule.keep} kept groups of {size} hold {rule.keep * size} experts: "
            f"active must be 1 to that, not {rule.active}"
        )
    if not 1 <= rule.best <= size:
        raise ValueError(
            f"a group's score sums its best {rule.best}, but a group has {size}"
        )
    if rule.score not in ("sigmoid", "softmax"):
        raise ValueError(f"score must be sigmoid or softmax, not {rule.score!r}")


def score(logits: Tensor, rule: Rule) -> Tensor:
    """[T, E] → [T, E], in float32 or wider: half precision would make ties.

    Raises:
        ValueError: another shape than [T, experts], or a score that is NaN (the
            look makes a GPU wait; production code leaves it out).
    """
    if logits.dim() != 2 or logits.shape[1] != rule.experts:
        raise ValueError(
            f"the gate needs logits [T, {rule.experts}], not {list(logits.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if rule.score == "sigmoid" else wide.softmax(-1)
    bad = scores.detach().isnan().any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"token {row} has a NaN score: its logits are not finite")
    return scores


def select(choice: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The k best experts of the best groups, by scores that only choose.

    Args:
        choice: [T, E], biased scores, finite; T may be 0.

    Returns [T, G], bool, the groups kept, and [T, k], int64, the experts.
    """
    groups = choice.view(-1, rule.groups, rule.experts // rule.groups)
    group_score = groups.topk(rule.best, dim=-1).values.sum(-1)
    kept = group_score.topk(rule.keep, dim=-1, sorted=False).indices
    opened = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, kept, True)
    # −inf, not 0: a biased score may be negative, and 0 would then win.
    within = groups.masked_fill(~opened[..., None], float("-inf")).flatten(1)
    expert = within.topk(rule.active, dim=-1, sorted=False).indices
    return opened, expert


def route(logits: Tensor, rule: Rule, bias: Tensor | None = None) -> Routing:
    """From the router's logits to experts and gates.

    Args:
        logits: [T, E], float; T may be 0.
        bias: [E], finite, added for the choice alone; no gradient reaches it.

    If all chosen scores are exactly 0, so are the gates, as in DeepSeek's code.

    Raises:
        ValueError: see `check` and `score`; a bias of another shape or not finite.
    """
    check(rule)
    scores = score(logits, rule)
    choice = scores.detach()
    if bias is not None:
        if bias.shape != (rule.experts,) or not bool(bias.isfinite().all()):
            raise ValueError(
                f"the bias must be [{rule.experts}] and finite, "
                f"not {list(bias.shape)} with {int((~bias.isfinite()).sum())} others"
            )
        choice = choice + bias.detach()
    opened, expert = select(choice, rule)
    weight = scores.gather(1, expert)
    if rule.normalise:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return Routing(scores, opened, expert, weight * rule.scale)
