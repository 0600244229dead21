"""A Switch feed-forward layer: a router, E experts in one batched product, a residual that carries what was dropped."""

import torch
from torch import nn

from .routing import Routing, capacity, load_balance_loss, route, z_loss

Tensor = torch.Tensor


class SwitchFFN(nn.Module):
    """x + gate · FFN_expert(x) for kept tokens, x for dropped ones.

    Args:
        dim, hidden: D and the experts' inner width.
        experts: E.
        factor: capacity factor; None keeps every token.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, factor: float | None = 1.25
    ) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) / dim**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) / hidden**0.5)
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, Routing, Tensor]:
        """x: [T, D]. Returns [T, D], the routing, and the router's logits [T, E]."""
        logits = self.router(x)
        tokens, experts = logits.shape
        factor = experts if self.factor is None else self.factor
        places = capacity(tokens, experts, factor)
        routing = route(logits, places)
        buffers = dispatch(x, routing, experts, places)
        answers = torch.relu(buffers @ self.up) @ self.down
        return x + combine(answers, routing), routing, logits


def dispatch(x: Tensor, routing: Routing, experts: int, places: int) -> Tensor:
    """Kept tokens in their experts' buffers, [E, C, D]; empty places are zeros."""
    buffers = x.new_zeros(experts, places, x.shape[1])
    kept = routing.kept
    return buffers.index_put(
        (routing.expert[kept], routing.place[kept]), x[kept]
    )


def combine(answers: Tensor, routing: Routing) -> Tensor:
    """Each kept token's answer times its gate, [T, D]; exactly zero if dropped."""
    tokens, kept = len(routing.expert), routing.kept
    mine = answers[routing.expert[kept], routing.place[kept]]
    out = answers.new_zeros(tokens, answers.shape[2])
    gate = routing.gate[kept, None].to(answers.dtype)
    return out.index_put((kept.nonzero()[:, 0],), gate * mine)


def auxiliary(routing: Routing, logits: Tensor, alpha: float, beta: float = 0.0) -> Tensor:
    """What is added to the model's loss: α · balance + β · z."""
    return alpha * load_balance_loss(routing.p, routing.expert) + beta * z_loss(logits)
