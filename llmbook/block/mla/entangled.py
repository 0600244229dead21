"""Why RoPE on keys that are rebuilt from the latent cannot be absorbed: a matrix that depends on two positions."""

import torch
from torch import Tensor

from llmbook.block.rope.rotation import frequencies, rotate_by_matrix, rotate_interleaved, tables


def rotation(d: int, position: int) -> Tensor:
    """R(m), [d, d], float64."""
    turn = tables(torch.tensor([position]), frequencies(d), torch.float64)
    columns = torch.eye(d, dtype=torch.float64)[None]  # one head per basis vector
    return rotate_by_matrix(columns, *turn)[0].T


def between(up_q: Tensor, up_k: Tensor, offset: int) -> Tensor:
    """W_UQᵀ R(n − m) W_UK, what stands between h_m and c_n.

    up_q: [d, D]; up_k: [d, d_c]; offset: n − m, 0 or below for a causal key.
    Returns [D, d_c]: one matrix per offset, where absorption wants one.
    """
    return up_q.T @ rotation(up_k.shape[0], offset).to(up_k.device) @ up_k


def best_single(up_q: Tensor, up_k: Tensor, offsets: range) -> Tensor:
    """The one matrix that is nearest to all of them: their mean.

    Least squares over the offsets, so no other choice does better.
    """
    return torch.stack([between(up_q, up_k, n) for n in offsets]).mean(0)


def misses(up_q: Tensor, up_k: Tensor, single: Tensor, offsets: range) -> Tensor:
    """‖W_UQᵀ R(Δ) W_UK − single‖ / ‖W_UQᵀ R(Δ) W_UK‖ for each offset, [n]."""
    true = torch.stack([between(up_q, up_k, n) for n in offsets])
    return (true - single).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)


def turns(h: Tensor, d: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, d / 2], of the positions of h, [S, D], in its dtype and where it is."""
    at = torch.arange(start, start + len(h), device=h.device)
    return tables(at, frequencies(d).to(h.device), h.dtype)


def scores_with_rope(h: Tensor, c: Tensor, up_q: Tensor, up_k: Tensor) -> Tensor:
    """(R(m) W_UQ h_m)ᵀ (R(n) W_UK c_n) for all m, n, [S, S]: keys rebuilt, then
    turned, as RoPE has it."""
    turn = turns(h, up_k.shape[0])
    q = rotate_interleaved((h @ up_q.T)[:, None], *turn)[:, 0]
    k = rotate_interleaved((c @ up_k.T)[:, None], *turn)[:, 0]
    return q @ k.T


def scores_absorbed_anyway(h: Tensor, c: Tensor, up_q: Tensor, up_k: Tensor) -> Tensor:
    """The tempting wrong form: turn the query, absorb W_UK, and turn the latent
    (by frequencies of its own width), as if the turn could pass W_UK."""
    turn_q, turn_c = turns(h, up_k.shape[0]), turns(h, c.shape[1])
    q = rotate_interleaved((h @ up_q.T)[:, None], *turn_q)[:, 0]
    return q @ up_k @ rotate_interleaved(c[:, None], *turn_c)[:, 0].T


def scores_turned_latent(h: Tensor, c: Tensor, up_q: Tensor, up_k: Tensor, start: int = 0) -> Tensor:
    """Another model: (R(m) W_UKᵀ W_UQ h_m)ᵀ (R(n) c_n), RoPE inside the latent space.

    Consistent, and a function of n − m alone, but its keys are R(n) c_n and its values must stay c_n: two vectors of
    width d_c per token to keep or to turn on every read, and no rebuilt form. start: the first token's position.
    """
    turn = turns(h, c.shape[1], start)
    q = rotate_interleaved((h @ up_q.T @ up_k)[:, None], *turn)[:, 0]
    return q @ rotate_interleaved(c[:, None], *turn)[:, 0].T
