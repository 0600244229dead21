"""FLOPs: PyTorch's formula for an operation, and the closed forms for a whole Llama."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .llama import Config

aten = torch.ops.aten
Shape = tuple[int, ...]


def attention_flop(
    q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """Two products, Q·Kᵀ and P·V, over all S × S pairs: no mask saves any.

    q: [B, H, S, d_h]; k, v: [B, H_kv, S_k, d_h], as many heads as q or fewer.
    """
    return int(sdpa_flop_count(q.shape, widened(k, q), widened(v, q)))


def attention_backward_flop(g: Any, q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Five products: the scores once more, then one each for dV, dP, dQ and dK."""
    return int(sdpa_backward_flop_count(g.shape, q.shape, widened(k, q), widened(v, q)))


def widened(k: Any, q: Any) -> Shape:
    return (k.shape[0], q.shape[1], *k.shape[2:])


# PyTorch's table has no entry for its own attention on a CPU, so FlopCounterMode counts that as nothing.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


def flop_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one call by its formula; 0 for an operation that has none."""
    formula = FORMULAS.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def block_flop(c: Config, B: int, S: int) -> dict[str, int]:
    """Forward FLOPs of one block on B sequences of S tokens, by where they go."""
    tokens = B * S
    return {
        "Q, K, V, O": 2 * tokens * c.dim * 2 * (c.heads + c.kv_heads) * c.head_dim,
        "scores, values": 4 * B * c.heads * S * S * c.head_dim,
        "feed-forward": 2 * tokens * 3 * c.dim * c.ffn,
    }


def forward_flop(c: Config, B: int, S: int) -> dict[str, int]:
    """Forward FLOPs of the whole model, by where they go."""
    blocks = {name: c.layers * flop for name, flop in block_flop(c, B, S).items()}
    return {**blocks, "LM head": 2 * B * S * c.dim * c.vocab}
