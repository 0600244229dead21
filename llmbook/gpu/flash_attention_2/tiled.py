"""FlashAttention-2 (arXiv:2307.08691), forward and backward, against the counting `Memory` of the chapter before."""

from collections.abc import Callable
from math import ceil, inf
from typing import Any

import torch
from torch import exp, maximum
from torch.utils._python_dispatch import TorchDispatchMode

from llmbook.gpu.flash_attention.memory import Memory

Tensor = torch.Tensor


def tiled_attention(
    Q: Tensor, K: Tensor, V: Tensor, mem: Memory, Bc: int, Br: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d)V, queries outside (Algorithm 1). Q, K, V: [N, d].

    Returns O [N, d] and the rows' logsumexp L [N, 1].
    """
    N, d = Q.shape
    O, L = torch.empty_like(Q), Q.new_empty(N, 1)
    for i in range(0, N, Br):
        Qi = mem.load("Q", Q, i, Br)
        Oi = mem.hold("O", torch.zeros_like(Qi))
        m = mem.hold("m", Qi.new_full((len(Qi), 1), -inf))
        l = mem.hold("l", Qi.new_zeros(len(Qi), 1))
        for j in range(0, min(i + Br, N) if causal else N, Bc):
            Kj = mem.load("K", K, j, Bc)
            S = mem.hold("S", Qi @ Kj.T / d**0.5)
            mem.free("K")
            if causal and j + Bc > i:
                S = S.masked_fill(hidden(i, j, S), -inf)
            mn = mem.hold("m_new", maximum(m, S.amax(1, keepdim=True)))
            a = mem.hold("a", exp(m - mn), over="m")
            P = mem.hold("P", exp(S - mn), over="S")
            l = a * l + P.sum(1, keepdim=True)
            Vj = mem.load("V", V, j, Bc)
            Oi = a * Oi + P @ Vj
            m = mem.hold("m", mn, over="m_new")
            mem.free("a", "P", "V")
        mem.store(O, i, Oi / l)
        mem.store(L, i, m + l.log())
        mem.free_all_but()
    return O, L


def hidden(i: int, j: int, S: Tensor) -> Tensor:
    """Which entries of the tile at row i, column j lie above the diagonal."""
    return torch.ones_like(S, dtype=torch.bool).triu(i - j + 1)


def tiled_traffic(N: int, d: int, Br: int) -> int:
    """Elements moved: Q, O, L once; K, V once per block of queries."""
    return 2 * N * d + N + ceil(N / Br) * 2 * N * d


def tiled_peak(Bc: int, Br: int, d: int) -> int:
    """Elements of SRAM at the fullest moment: Q, O, S or P, K or V, m, l and a."""
    return 2 * Br * d + Bc * d + Br * Bc + 3 * Br


def tiled_backward(
    Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, dO: Tensor,
    mem: Memory, Bc: int, Br: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, [N, d], from O and L [N, 1]; P is computed again, twice."""
    N = len(Q)
    dQ, dK, dV, D = (torch.empty_like(t) for t in (Q, K, V, L))
    for i in range(0, N, Br):
        Oi, dOi = mem.load("O", O, i, Br), mem.load("dO", dO, i, Br)
        mem.store(D, i, mem.hold("D", (Oi * dOi).sum(1, keepdim=True)))
        mem.free("O", "dO", "D")
    for j in range(0, N, Bc):
        Kj, Vj = mem.load("K", K, j, Bc), mem.load("V", V, j, Bc)
        dKj, dVj = mem.hold("dK", 0 * Kj), mem.hold("dV", 0 * Vj)
        for i in range(0, N, Br):
            Qi, dOi, P, dS = _tile(Q, dO, L, D, Kj, Vj, i, Br, mem)
            dVj += P.T @ dOi
            dKj += dS.T @ Qi
            mem.free("Q", "dO", "L", "D", "P", "dS")
        mem.store(dK, j, dKj)
        mem.store(dV, j, dVj)
        mem.free_all_but()
    for i in range(0, N, Br):
        dQi = mem.hold("dQ", 0 * Q[i : i + Br])
        for j in range(0, N, Bc):
            Kj, Vj = mem.load("K", K, j, Bc), mem.load("V", V, j, Bc)
            _, _, _, dS = _tile(Q, dO, L, D, Kj, Vj, i, Br, mem)
            dQi += dS @ Kj
            mem.free_all_but("dQ", "Q", "dO", "L", "D")
        mem.store(dQ, i, dQi)
        mem.free_all_but()
    return dQ, dK, dV


def _tile(
    Q: Tensor, dO: Tensor, L: Tensor, D: Tensor, Kj: Tensor, Vj: Tensor, i: int, Br: int, mem: Memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q_i, dO_i, P and dS of one tile; what is still in SRAM is not loaded again."""
    Qi, dOi, Li, Di = (
        matrix[i : i + Br] if name in mem.live else mem.load(name, matrix, i, Br)
        for name, matrix in (("Q", Q), ("dO", dO), ("L", L), ("D", D))
    )
    scale = Q.shape[1] ** -0.5
    P = mem.hold("P", exp(Qi @ Kj.T * scale - Li))
    dS = mem.hold("dS", P * (dOi @ Vj.T - Di) * scale)
    return Qi, dOi, P, dS


def tiled_backward_traffic(N: int, d: int, Bc: int, Br: int) -> int:
    """Elements moved: for D; by blocks of keys, for dK and dV; by queries, for dQ."""
    rows, keys = ceil(N / Br), ceil(N / Bc)
    by_keys = 4 * N * d + keys * (2 * N * d + 2 * N)
    by_queries = 3 * N * d + 2 * N + rows * 2 * N * d
    return 2 * N * d + N + by_keys + by_queries


class Counted(TorchDispatchMode):
    """Counts what runs: FLOPs of products, and elements of all else that computes."""

    FREE = (
        "t", "transpose", "slice", "view", "detach", "copy_", "empty_like", "new_empty",
        "new_full", "zeros_like",
    )

    def __init__(self) -> None:
        super().__init__()
        self.product_flops = self.vector_ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "mm":
            self.product_flops += 2 * out.numel() * args[0].shape[-1]
        elif name not in self.FREE:  # a reduction touches its input once
            self.vector_ops += max(out.numel(), args[0].numel())
        return out


def counted(run: Callable[[], Any]) -> Counted:
    """Run it and return the counts."""
    with Counted() as counts:
        run()
    return counts
