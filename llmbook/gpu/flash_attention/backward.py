"""Attention backward: the standard way, and FlashAttention's Algorithm 4, which recomputes P from (Q, K, l, m)."""

from math import ceil

import torch
from torch import exp

from .forward import block_sizes, flash_attention
from .memory import Memory

Tensor = torch.Tensor


def standard_backward(
    Q: Tensor, K: Tensor, V: Tensor, P: Tensor, dO: Tensor, mem: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the P that the forward left in HBM (Algorithm 3): five kernels. Q, K, V, dO: [N, d]; P: [N, N]."""
    d = Q.shape[1]
    mem.reads += P.numel() + dO.numel()
    dV = P.T @ dO
    mem.writes += dV.numel()
    mem.reads += dO.numel() + V.numel()
    dP = dO @ V.T
    mem.writes += dP.numel()
    mem.reads += P.numel() + dP.numel()
    dS = P * (dP - (dP * P).sum(1, keepdim=True)) / d**0.5
    mem.writes += dS.numel()
    mem.reads += dS.numel() + K.numel()
    dQ = dS @ K
    mem.writes += dQ.numel()
    mem.reads += dS.numel() + Q.numel()
    dK = dS.T @ Q
    mem.writes += dK.numel()
    return dQ, dK, dV


def flash_backward(
    Q: Tensor, K: Tensor, V: Tensor, O: Tensor, dO: Tensor, l: Tensor, m: Tensor,
    mem: Memory, Bc: int, Br: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4: dQ, dK, dV [N, d] with no N × N matrix in HBM.

    Q, K, V, O, dO: [N, d]; l, m: [N, 1] from the forward.
    """
    N, d = Q.shape
    dQ, dK, dV = (mem.new(N, d, like=Q) for _ in range(3))
    for j in range(0, N, Bc):
        Kj = mem.load("K", K, j, Bc)
        Vj = mem.load("V", V, j, Bc)
        dKj = mem.hold("dK", torch.zeros_like(Kj))
        dVj = mem.hold("dV", torch.zeros_like(Vj))
        for i in range(0, N, Br):
            Qi, Oi = mem.load("Q", Q, i, Br), mem.load("O", O, i, Br)
            dOi, dQi = mem.load("dO", dO, i, Br), mem.load("dQ", dQ, i, Br)
            li, mi = mem.load("l", l, i, Br), mem.load("m", m, i, Br)
            P = mem.hold("P", exp(Qi @ Kj.T / d**0.5 - mi) / li)
            dVj += P.T @ dOi
            D = mem.hold("D", (dOi * Oi).sum(1, keepdim=True))
            dP = mem.hold("dP", dOi @ Vj.T)
            dS = mem.hold("dS", P * (dP - D) / d**0.5, over="dP")
            mem.store(dQ, i, dQi + dS @ Kj)
            dKj += dS.T @ Qi
            mem.free("Q", "O", "dO", "dQ", "l", "m", "P", "D", "dS")
        mem.store(dK, j, dKj)
        mem.store(dV, j, dVj)
        mem.free("K", "V", "dK", "dV")
    return dQ, dK, dV


def flash_backward_traffic(N: int, d: int, Bc: int) -> int:
    """Elements `flash_backward` moves: K, V, dK, dV once; Q, O, dO, dQ, l, m per block of K; gradients initialised."""
    Tc = ceil(N / Bc)
    return 4 * N * d + Tc * (5 * N * d + 2 * N) + 3 * N * d


def standard_backward_traffic(N: int, d: int) -> int:
    """Elements `standard_backward` moves: seven passes over an N × N matrix, eight over an N × d one."""
    return 7 * N * N + 8 * N * d


class TiledAttention(torch.autograd.Function):
    """Both algorithms behind autograd. `TiledAttention.apply(Q, K, V, M)` with Q, K, V of shape [..., N, d]."""

    @staticmethod
    def forward(ctx, Q: Tensor, K: Tensor, V: Tensor, M: int) -> Tensor:  # type: ignore[no-untyped-def]
        N, d = Q.shape[-2:]
        heads = [flash_attention(q, k, v, Memory(M), *block_sizes(M, d)) for q, k, v in _heads(Q, K, V)]
        O, l, m = (torch.stack(parts).reshape(*Q.shape[:-2], N, -1) for parts in zip(*heads, strict=True))
        ctx.save_for_backward(Q, K, V, O, l, m)
        return O

    @staticmethod
    def backward(ctx, dO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        Q, K, V, O, l, m = ctx.saved_tensors
        # Twice as many tiles are alive as in the forward; the sizes are the caller's concern only there.
        heads = [
            flash_backward(q, k, v, o, do, li, mi, Memory(), 16, 16)
            for q, k, v, o, do, li, mi in _heads(Q, K, V, O, dO, l, m)
        ]
        return (*(torch.stack(parts).reshape(Q.shape) for parts in zip(*heads, strict=True)), None)


def _heads(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The leading dimensions flattened: one tuple of matrices per head."""
    return list(zip(*(t.reshape(-1, *t.shape[-2:]) for t in tensors), strict=True))
