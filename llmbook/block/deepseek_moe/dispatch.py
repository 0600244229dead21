"""Tokens sorted by expert, so that all experts run as one grouped product; answers weighted and added back.

Shapes: T tokens, k experts each, so R = T·k rows; E experts, D features, H an expert's inner width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Plan(NamedTuple):
    """Which row goes where.

    order: [R], int64: row r of the sorted batch is choice order[r] of the T·k.
    token: [R], int64: the token it came from, order // k.
    ends: [E], int32: expert e owns rows ends[e − 1] (or 0) up to ends[e].
    """

    order: Tensor
    token: Tensor
    ends: Tensor


def plan(expert: Tensor, experts: int) -> Plan:
    """Sort the T·k choices by expert, stable: an expert sees tokens in their order.

    Args:
        expert: [T, k], int64, from 0 to E − 1; T may be 0.

    Raises:
        ValueError: another shape, or, on a CPU, an index outside: on a GPU the
            look would wait for it.
    """
    if expert.dim() != 2 or not expert.shape[1]:
        raise ValueError(f"the plan needs experts [T, k], not {list(expert.shape)}")
    flat = expert.flatten()
    if flat.is_cpu and len(flat):
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= experts:
            raise ValueError(f"experts are 0 to {experts - 1}, not {low} to {high}")
    order = flat.argsort(stable=True)
    every = torch.arange(experts, device=flat.device)
    # Where each expert's run ends. `bincount` would make a GPU wait.
    ends = torch.searchsorted(flat[order], every, right=True).int()
    return Plan(order, order // expert.shape[1], ends)


def by_slices(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """A grouped product in plain PyTorch: one GEMM per expert's slice of rows.

    x: [R, K], sorted by expert; w: [E, K, N]; ends: [E]. Returns [R, N].
    """
    first = [0, *ends.tolist()]
    slices = [x[a:b] @ m for a, b, m in zip(first, first[1:], w, strict=False)]
    return torch.cat(slices)


def swiglu_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor, weight: Tensor,
    product: Product = by_slices,
) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate) · up), [T, D].

    Args:
        x: [T, D]. gate_up: [E, D, 2H]. down: [E, H, D].
        expert, weight: [T, k], from the gate.
        product: the grouped product; the kernel's on a GPU.
    """
    rows = plan(expert, len(gate_up))
    gate, up = product(x[rows.token], gate_up, rows.ends).chunk(2, dim=-1)
    answer = product(F.silu(gate) * up, down, rows.ends)
    answer = answer * weight.flatten()[rows.order, None]
    return torch.zeros_like(x).index_add(0, rows.token, answer.to(x.dtype))


def loop_over_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor, weight: Tensor
) -> Tensor:
    """The same in the obvious way: each expert looks for its tokens, [T, D]."""
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, choice = (expert == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e]).chunk(2, dim=-1)
        answer = (F.silu(gate) * up) @ down[e] * weight[token, choice, None]
        out = out.index_add(0, token, answer.to(x.dtype))
    return out
