"""Attention forward, the standard way and FlashAttention's Algorithm 1 (arXiv:2205.14135), against a `Memory`."""

from math import ceil, inf

import torch
from torch import exp, maximum

from .memory import Memory

Tensor = torch.Tensor


def paper_block_sizes(M: int, d: int) -> tuple[int, int]:
    """(B_c, B_r) as Algorithm 1, line 1 prints them: ⌈M/4d⌉ and min(⌈M/4d⌉, d)."""
    Bc = ceil(M / (4 * d))
    return Bc, min(Bc, d)


def sram_peak(Bc: int, Br: int, d: int) -> int:
    """Elements of SRAM at the fullest moment: K, V, S or P, O, six vectors of B_r."""
    return 2 * Bc * d + Br * Bc + Br * d + 6 * Br


def block_sizes(M: int, d: int) -> tuple[int, int]:
    """The paper's (B_c, B_r), reduced until all fits into M elements, vectors included.

    Raises:
        ValueError: M holds not even one row of everything.
    """
    for Bc in range(paper_block_sizes(M, d)[0], 0, -1):
        Br = min(Bc, d)
        if sram_peak(Bc, Br, d) <= M:
            return Bc, Br
    raise ValueError(
        f"M = {M} elements of SRAM are too few for d = {d}: "
        f"one row needs {sram_peak(1, 1, d)}"
    )


def standard_attention(Q: Tensor, K: Tensor, V: Tensor, mem: Memory, Br: int) -> Tensor:
    """softmax(QKᵀ/√d)V as three kernels, each from HBM to HBM, `Br` rows at a time.

    Q, K, V: [N, d]. S and P, [N, N], are written whole and read back. Returns O [N, d].
    """
    N, d = Q.shape
    S, P = Q.new_empty(N, N), Q.new_empty(N, N)
    O = Q.new_empty(N, d)
    Kall = mem.load("K", K, 0, N)
    for i in range(0, N, Br):
        Qi = mem.load("Q", Q, i, Br)
        Si = mem.hold("S", Qi @ Kall.T / d**0.5)
        mem.store(S, i, Si)
        mem.free("Q", "S")
    mem.free("K")
    for i in range(0, N, Br):
        Si = mem.load("S", S, i, Br)
        Pi = mem.hold("P", Si.softmax(1), over="S")
        mem.store(P, i, Pi)
        mem.free("P")
    Vall = mem.load("V", V, 0, N)
    for i in range(0, N, Br):
        Pi = mem.load("P", P, i, Br)
        Oi = mem.hold("O", Pi @ Vall)
        mem.store(O, i, Oi)
        mem.free("P", "O")
    mem.free("V")
    return O


def flash_attention(
    Q: Tensor, K: Tensor, V: Tensor, mem: Memory, Bc: int, Br: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: softmax(QKᵀ/√d)V without S or P in HBM. Q, K, V: [N, d].

    Returns:
        O [N, d], and per row l (sum of exponentials) and m (maximum), [N, 1].
    """
    N, d = Q.shape
    O = mem.new(N, d, like=Q)
    l = mem.new(N, 1, like=Q)
    m = mem.new(N, 1, like=Q, fill=-inf)
    for j in range(0, N, Bc):
        Kj = mem.load("K", K, j, Bc)
        Vj = mem.load("V", V, j, Bc)
        for i in range(0, N, Br):
            Qi = mem.load("Q", Q, i, Br)
            S = mem.hold("S", Qi @ Kj.T / d**0.5)
            mem.free("Q")
            mt = mem.hold("m~", S.amax(1, keepdim=True))
            P = mem.hold("P", exp(S - mt), over="S")
            lt = mem.hold("l~", P.sum(1, keepdim=True))
            mi = mem.load("m", m, i, Br)
            li = mem.load("l", l, i, Br)
            mn = mem.hold("m_new", maximum(mi, mt))
            a = mem.hold("a", exp(mi - mn), over="m")
            b = mem.hold("b", exp(mt - mn), over="m~")
            ln = mem.hold("l_new", a * li + b * lt)
            Oi = mem.load("O", O, i, Br)
            Oi = (a * li * Oi + b * (P @ Vj)) / ln
            mem.store(O, i, Oi)
            mem.store(l, i, ln)
            mem.store(m, i, mn)
            mem.free_all_but("K", "V")
        mem.free("K", "V")
    return O, l, m


def standard_traffic(N: int, d: int) -> int:
    """Elements `standard_attention` moves: Q, K, V, O once, S and P written once and read once."""
    return 4 * N * d + 4 * N * N


def flash_traffic(N: int, d: int, Bc: int) -> int:
    """Elements moved: K, V once; Q, O, l, m per block of K; O, l, m initialised."""
    Tc = ceil(N / Bc)
    return 2 * N * d + Tc * (3 * N * d + 4 * N) + N * d + 2 * N
