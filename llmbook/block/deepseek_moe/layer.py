"""A DeepSeek MoE layer: shared experts for every token, routed ones by the gate, a bias that keeps loads even."""

import torch
from torch import nn
from torch.nn import functional as F

from .balance import load_of, update_bias
from .dispatch import Product, by_slices, swiglu_experts
from .gate import V3, Routing, Rule, check, route

Tensor = torch.Tensor


class DeepSeekMoE(nn.Module):
    """Shared(x) + Σ over the k chosen experts of gate · FFN(x), all SwiGLU.

    Args:
        dim, hidden: D and one expert's inner width H.
        rule: the gate's rule. shared: how many shared experts, as one of width
            shared · H; 0 for none.
        product: the grouped product that computes the routed experts.
        router_dtype: what the gate computes in, whatever the experts run in.
    """

    def __init__(
        self, dim: int, hidden: int, rule: Rule = V3, shared: int = 1,
        product: Product = by_slices, router_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check(rule)
        self.rule, self.product, wide = rule, product, shared * hidden
        self.router_dtype = router_dtype
        experts, near = rule.experts, dim**0.5
        self.router = nn.Parameter(torch.randn(experts, dim) / near)
        self.gate_up = nn.Parameter(torch.randn(experts, dim, 2 * hidden) / near)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) / hidden**0.5)
        self.shared_gate_up = nn.Parameter(torch.randn(dim, 2 * wide) / near)
        self.shared_down = nn.Parameter(torch.randn(wide, dim) / max(wide, 1) ** 0.5)
        self.bias = nn.Buffer(torch.zeros(rule.experts))  # not a parameter

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: [T, D]. Returns [T, D], without the residual, and the routing."""
        logits = F.linear(x.to(self.router_dtype), self.router.to(self.router_dtype))
        routing = route(logits, self.rule, self.bias)
        gate, up = (x @ self.shared_gate_up).chunk(2, dim=-1)
        shared = (F.silu(gate) * up) @ self.shared_down
        routed = swiglu_experts(
            x, self.gate_up, self.down, routing.expert, routing.weight, self.product
        )
        return shared + routed, routing

    @torch.no_grad()
    def rebalance(self, load: Tensor, gamma: float = 0.001) -> None:
        """After the optimizer's step: move the bias against the load, [E]."""
        self.bias.copy_(update_bias(self.bias, load, gamma))

    def load(self, routing: Routing) -> Tensor:
        """Tokens per expert in this batch, [E]."""
        return load_of(routing.expert, self.rule.experts)
