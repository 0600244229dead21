"""Causal attention with grouped heads, whole or continued from a cache: prefill, chunks and decode are one function."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from llmbook.block.rope.rotation import frequencies, rotate_half_split, tables

from .cache import Cache
from .heads import Heads


def visible(starts: Tensor, counts: Tensor, new: int, keys: int) -> Tensor:
    """Which keys each new query sees: those up to its own position.

    Args:
        starts: [B], tokens that each sequence had before.
        counts: [B], how many of its `new` tokens are real; the rest is padding.
        new, keys: S and T.

    Returns:
        [B, S, T], bool. Padding sees nothing.
    """
    i = torch.arange(new, device=starts.device)[:, None]
    j = torch.arange(keys, device=starts.device)
    return (j <= starts[:, None, None] + i) & (i < counts[:, None, None])


def softmax_over(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax of [..., T] over the keys that `seen`, bool, allows; a row that
    sees none is zeros. What is hidden may hold anything, NaN too."""
    # −∞, and no finite number, which a visible score may have; but 0 in a row
    # that sees nothing, which would become NaN.
    hidden, blind = ~seen, ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(blind, 0)
    return scores.softmax(-1).masked_fill(hidden, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(QKᵀ/√d_h + mask)V, each KV head read once for all its queries.

    Args:
        q: [B, n_h, S, d_h]; query heads i·n_rep to (i+1)·n_rep − 1 share KV
            head i.
        k, v: [B, n_kv, T, d_h].
        seen: [B, S, T], bool.

    Returns:
        [B, n_h, S, d_h]; zeros where a query sees no key. Keys and values that
        no query sees may hold anything.
    """
    B, n_h, S, d = q.shape
    n_kv, T = k.shape[1:3]
    unseen = ~seen.any(1)[:, None, :, None]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)  # 0 · NaN is NaN
    # The queries that share a head become rows of one matrix: K is not copied.
    rows = q.reshape(B, n_kv, n_h // n_kv * S, d)
    scores = (rows @ k.mT * d**-0.5).view(B, n_kv, n_h // n_kv, S, T)
    p = softmax_over(scores, seen[:, None, None])
    return (p.view(B, n_kv, n_h // n_kv * S, T) @ v).view(q.shape)


class Attention(nn.Module):
    """MHA, GQA or MQA with RoPE, under Hugging Face's names.

    Args:
        heads: the sizes.
        layer: which layer of the cache is its own.
        base, angles: RoPE's θ, [d_h / 2], is angles(d_h, base).
    """

    theta: Tensor

    def __init__(
        self, heads: Heads, layer: int = 0, base: float = 1e4,
        angles: Callable[[int, float], Tensor] = frequencies,
    ) -> None:
        super().__init__()
        self.heads, self.layer, self.base, self.angles = heads, layer, base, angles
        wide, narrow = (n * heads.head_dim for n in (heads.heads, heads.kv_heads))
        self.q_proj = nn.Linear(heads.dim, wide, bias=False)
        self.k_proj = nn.Linear(heads.dim, narrow, bias=False)
        self.v_proj = nn.Linear(heads.dim, narrow, bias=False)
        self.o_proj = nn.Linear(wide, heads.dim, bias=False)
        self.register_buffer("theta", angles(heads.head_dim, base), persistent=False)

    def forward(
        self, x: Tensor, cache: Cache | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """Attend from new tokens to themselves and to what the cache holds.

        x: [B, S, D], any S, 0 too. counts: [B], each row's real tokens; all,
        if not given. Returns [B, S, D], zeros for padding, whatever it holds.
        """
        B, S = x.shape[:2]
        counts = new_tokens(counts, B, S, x.device)
        x = without_padding(x, counts)
        starts = torch.zeros_like(counts)
        if cache is not None:
            starts = cache.lengths[self.layer].clone()
        at = starts[:, None] + torch.arange(S, device=x.device)
        angles = tables(at, self.theta, x.dtype)
        q = rotate_half_split(self.split(self.q_proj(x)), *angles).transpose(1, 2)
        k = rotate_half_split(self.split(self.k_proj(x)), *angles).transpose(1, 2)
        v = self.split(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, counts, self.layer)
        o = attend(q, k, v, visible(starts, counts, S, k.shape[2]))
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; θ stays float64: bf16 would lose the far positions."""
        super()._apply(fn, recurse)
        theta = self.angles(self.heads.head_dim, self.base)
        self.theta = theta.to(self.q_proj.weight.device)
        return self

    def split(self, x: Tensor) -> Tensor:
        """[B, S, n·d_h] → [B, S, n, d_h], a view."""
        d = self.heads.head_dim
        return x.view(*x.shape[:2], x.shape[2] // d, d)


def without_padding(x: Tensor, counts: Tensor) -> Tensor:
    """x, [B, S, D], with zeros from token counts[b] on: a NaN there would reach
    the weights' gradients."""
    padding = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
    return x.masked_fill(padding[..., None], 0)


def new_tokens(counts: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """`counts`, checked; S for every sequence if it is None."""
    if counts is None:
        return torch.full((B,), S, device=device)
    if list(counts.shape) != [B] or counts.is_floating_point() or ((counts < 0) | (counts > S)).any():
        raise ValueError(f"counts must be {B} whole numbers from 0 to {S}, one per sequence, not {counts.tolist()}")
    return counts
