"""One DeepSeek MoE layer, trained three ways on the same tokens: no balancing, a balance loss, the bias alone.

The task is the switch_routing chapter's: clusters of tokens that share a large common part, each with a map to learn.
"""

from typing import NamedTuple

import torch

from llmbook.block.switch_routing.training import task, tokens

from .balance import sequence_balance_loss
from .gate import Rule
from .layer import DeepSeekMoE

Tensor = torch.Tensor

SMALL = Rule(experts=16, groups=4, keep=2, active=2, scale=1.0)


class Run(NamedTuple):
    """Per step: load [steps, E], counts; task's loss [steps]; the bias after the step [steps, E]."""

    load: Tensor
    loss: Tensor
    bias: Tensor


def train(
    alpha: float = 0.0, gamma: float = 0.0, steps: int = 400, *, rule: Rule = SMALL,
    batch: int = 256, seed: int = 0,
) -> Run:
    """Adam on the mean squared error, plus α times the balance loss; the bias moves by γ after each step.

    Args:
        alpha: weight of `sequence_balance_loss`, over the batch as one sequence.
        gamma: the bias's update speed. Both 0: no balancing.
    """
    of, g = task(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = DeepSeekMoE(of.centres.shape[1], 16, rule, router_dtype=torch.float64).double()
    optimizer = torch.optim.Adam(layer.parameters(), 5e-3)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        x, y = tokens(of, batch, g)
        out, routing = layer(x)
        loss = (x + out - y).square().mean()
        extra = sequence_balance_loss(routing.scores[None], rule.active) if alpha else 0.0
        optimizer.zero_grad()
        (loss + alpha * extra).backward()
        optimizer.step()
        load = layer.load(routing)
        layer.rebalance(load, gamma)
        kept.append((load, loss.detach(), layer.bias.clone()))
    return Run(*(torch.stack(part) for part in zip(*kept, strict=True)))
