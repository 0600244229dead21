"""From MHA to MLA in four rungs, each equal to the one before (DeepSeek-V2, arXiv 2405.04434, §2.1 and appendix C).

One causal sequence, weights as [heads, out, in]. Scores are divided by √(width of a head's query).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmbook.block.rope.rotation import frequencies, rotate_interleaved, tables


class Factors(NamedTuple):
    """Weights of low-rank KV attention.

    q: [n_h, d, D]; down: W_DKV, [d_c, D]; up_k: W_UK, [n_h, d, d_c];
    up_v: W_UV, [n_h, d_v, d_c]; o: [n_h, D, d_v].
    """

    q: Tensor
    down: Tensor
    up_k: Tensor
    up_v: Tensor
    o: Tensor


class Rotary(NamedTuple):
    """What decoupled RoPE adds. q: [n_h, d_r, D], one query per head; k: [d_r, D], one key for all."""

    q: Tensor
    k: Tensor


def draw_factors(
    heads: int, d: int, d_c: int, D: int, seed: int = 0, rope: int = 0
) -> tuple[Factors, Rotary]:
    """Random float64 weights, scaled so that scores are of order one."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * shape[-1] ** -0.5

    factors = Factors(
        weight(heads, d, D), weight(d_c, D), weight(heads, d, d_c),
        weight(heads, d, d_c), weight(heads, D, d),
    )
    return factors, Rotary(weight(heads, rope, D), weight(rope, D))


def probabilities(scores: Tensor, width: int) -> Tensor:
    """Causal softmax of [n_h, S, S] scores of queries `width` wide."""
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return (scores * width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)


def mha(h: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Rung 1. h: [S, D]; q, k, v: [n_h, d, D]; o: [n_h, D, d]. Cached: every
    head's key and value, 2·n_h·d per token. Returns [S, D]."""
    Q, K, V = (h @ w.mT for w in (q, k, v))  # [n_h, S, d]
    p = probabilities(Q @ K.mT, q.shape[1])
    return (p @ V @ o.mT).sum(0)


def low_rank(h: Tensor, w: Factors) -> Tensor:
    """Rung 2. Keys and values are rebuilt from c = W_DKV h, which alone is
    cached: d_c per token. Returns [S, D]."""
    Q, c = h @ w.q.mT, h @ w.down.T  # [n_h, S, d], [S, d_c]
    K, V = c @ w.up_k.mT, c @ w.up_v.mT
    p = probabilities(Q @ K.mT, w.q.shape[1])
    return (p @ V @ w.o.mT).sum(0)


def absorbed(h: Tensor, w: Factors) -> Tensor:
    """Rung 3. No key or value is rebuilt: W_UK is multiplied into W_Q, W_UV
    into W_O, and c itself is key and value of every head. Returns [S, D]."""
    q = w.up_k.mT @ w.q  # [n_h, d_c, D]
    o = w.o @ w.up_v  # [n_h, D, d_c]
    c = h @ w.down.T
    p = probabilities(h @ q.mT @ c.T, w.q.shape[1])
    return (p @ c @ o.mT).sum(0)


def rotated(h: Tensor, r: Rotary, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary queries [n_h, S, d_r] and the one rotary key [S, d_r]."""
    turn = tables(torch.arange(len(h), device=h.device), theta.to(h.device), h.dtype)
    q = rotate_interleaved((h @ r.q.mT).transpose(0, 1), *turn)  # [S, n_h, d_r]
    k = rotate_interleaved((h @ r.k.T)[:, None], *turn)
    return q.transpose(0, 1), k[:, 0]


def decoupled(h: Tensor, w: Factors, r: Rotary, absorb: bool) -> Tensor:
    """Rung 4. A second, narrow query and key carry the position; cached are
    c and the rotary key, d_c + d_r per token. Returns [S, D]."""
    q, k = rotated(h, r, frequencies(r.k.shape[0]))
    positional, width = q @ k.T, w.q.shape[1] + r.k.shape[0]
    c = h @ w.down.T
    if absorb:
        p = probabilities(h @ w.q.mT @ w.up_k @ c.T + positional, width)
        return (p @ c @ w.up_v.mT @ w.o.mT).sum(0)
    K, V = c @ w.up_k.mT, c @ w.up_v.mT
    p = probabilities(h @ w.q.mT @ K.mT + positional, width)
    return (p @ V @ w.o.mT).sum(0)
