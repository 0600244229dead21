"""A Llama layer's kernels, counted on the `meta` device: prefill, and decode against a KV cache."""

import functools
from collections.abc import Iterable
from math import log10

import torch
from torch import nn

from llmbook.foundations.tokens_to_logits.llama import PUBLISHED, Block, every_tensor

from .counting import Cost, Counted, count

Tensor = torch.Tensor

# Which modules' operations one kernel does in a serving engine: the name, then the end of the module's path.
KERNELS = (
    ("norm 1", ("input_layernorm",)), ("QKV", ("q_proj", "k_proj", "v_proj")), ("RoPE", ("self_attn",)),
    ("attention", ("attend",)), ("output", ("o_proj",)), ("norm 2", ("post_attention_layernorm",)),
    ("gate, up", ("gate_proj", "up_proj")), ("SiLU · up", ("mlp", "act_fn")), ("down", ("down_proj",)),
    ("residual", ("Block",)),
)


class Cached(nn.Module):
    """Attention of one new token per sequence over a cache of `context` tokens.

    q: [B, H, 1, d_h]; k, v: [B, H_kv, 1, d_h], written to the cache's last row.
    """

    def __init__(self, batch: int, kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (batch, kv_heads, context, head_dim)
        self.keys, self.values = (nn.Buffer(torch.empty(shape, dtype=dtype, device="meta")) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[:, :, -1:].copy_(k)
        self.values[:, :, -1:].copy_(v)
        B, H, _, d = q.shape
        grouped = q.reshape(B, self.keys.shape[1], -1, d)  # heads that share keys
        p = (grouped @ self.keys.mT / d**0.5).softmax(-1)
        return (p @ self.values).view(B, H, 1, d)


class Causal(nn.Module):
    """`every_tensor` attention as a module, its output in memory token by token."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = every_tensor(q, k, v)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


@functools.cache
def layer(model: str, phase: str, batch: int, context: int, dtype: torch.dtype = torch.float16) -> Counted:
    """Every operation of one layer of a published Llama.

    Args:
        model: a name of `PUBLISHED`.
        phase: "prefill" (all tokens of `batch` sequences of `context` tokens)
            or "decode" (one token of each, with `context` tokens in the cache).

    Raises:
        ValueError: an unknown model or phase, or a size below 1.
    """
    if model not in PUBLISHED:
        raise ValueError(f"no model called {model!r}: choose one of {', '.join(PUBLISHED)}")
    if phase not in ("prefill", "decode"):
        raise ValueError(f"a phase is 'prefill' or 'decode', not {phase!r}")
    if batch < 1 or context < 1:
        raise ValueError(f"batch and context must be at least 1, not {batch} and {context}")
    c = PUBLISHED[model]
    queries = context if phase == "prefill" else 1
    attend = Causal() if phase == "prefill" else Cached(batch, c.kv_heads, context, c.head_dim, dtype)
    with torch.device("meta"):
        block = Block(c, attend).to(dtype)
        x = torch.empty(batch, queries, c.dim, dtype=dtype)
        cos, sin = torch.empty(2, queries, c.head_dim, dtype=dtype)
    with torch.no_grad():
        return count(block, x, cos, sin)


def kernels(counted: Counted) -> dict[str, Cost]:
    """A layer as fused kernels, in the order of `KERNELS`.

    Each reads what it did not make and writes what another needs. QKV share one
    read of their input, attention stores no scores, RMSNorm is one pass.
    """
    found: dict[str, Cost] = {}
    for name, modules in KERNELS:
        mine = [op for op in counted.ops if op.module.split(".")[-1] in modules]
        # The two additions lie far apart: each goes through memory alone.
        cost = counted.unfused if name == "residual" else counted.fused
        found[name] = cost(mine)
    return found


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of several kernels' costs, each through memory on its own."""
    found = list(costs)
    if not found:
        raise ValueError("there is no cost to add up")
    products, others, moved = (sum(column) for column in zip(*(cost[:3] for cost in found), strict=True))
    return Cost(products, others, moved, max(found, key=lambda cost: cost.products).dtype)


def together(costs: dict[str, Cost], decades: float = 0.28) -> list[tuple[list[str], Cost]]:
    """Kernels by rising intensity, neighbours closer than that many decades as one."""
    groups: list[tuple[list[str], float]] = []
    for name, cost in sorted(costs.items(), key=lambda pair: pair[1].intensity):
        if groups and log10(cost.intensity / groups[-1][1]) < decades:
            groups[-1][0].append(name)
        else:
            groups.append(([name], cost.intensity))
    return [(names, total(costs[name] for name in names)) for names, _ in groups]


def layers(model: str) -> int:
    return PUBLISHED[model].layers


def cache_gb(model: str, batch: int, context: int, itemsize: int = 2) -> float:
    """GB of keys and values of all layers."""
    c = PUBLISHED[model]
    return 2 * c.layers * batch * context * c.kv_heads * c.head_dim * itemsize / 1e9
