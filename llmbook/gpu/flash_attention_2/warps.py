"""How the warps of a program share a tile: by keys, as FlashAttention did, or by queries, as FlashAttention-2 does."""

from dataclasses import dataclass

import torch

from llmbook.gpu.online_softmax.state import absorb, empty, finish, merge

Tensor = torch.Tensor


@dataclass
class Shared:
    """Shared memory between warps: elements written to it, and barriers waited for."""

    written: int = 0
    barriers: int = 0


def split_by_keys(
    Q: Tensor, K: Tensor, V: Tensor, warps: int, shared: Shared
) -> Tensor:
    """Each warp sees all queries and its share of the keys: partial results meet."""
    state = empty(len(Q), d=V.shape[1], dtype=Q.dtype)
    parts = [
        absorb(state, Q @ k.T / Q.shape[1] ** 0.5, v)
        for k, v in zip(K.chunk(warps), V.chunk(warps), strict=True)
    ]
    shared.written += sum(t.numel() for part in parts for t in part)
    shared.barriers += 1
    for part in parts:
        state = merge(state, part)
    return finish(state)[0]


def split_by_queries(
    Q: Tensor, K: Tensor, V: Tensor, warps: int, shared: Shared
) -> Tensor:
    """Each warp sees its share of the queries and all keys: nothing to exchange."""
    rows = []
    for q in Q.chunk(warps):
        state = empty(len(q), d=V.shape[1], dtype=Q.dtype)
        rows.append(finish(absorb(state, q @ K.T / Q.shape[1] ** 0.5, V))[0])
    return torch.cat(rows)
