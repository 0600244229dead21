"""The notes' eleven steps of one inner iteration: what they claim SRAM gains and loses, and what the ledger finds."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import exp, maximum

from .memory import Memory

Tensor = torch.Tensor


class Claim(NamedTuple):
    """A step as the notes print it: what happens, the change in symbols, and that change for given B_c and d."""

    does: str
    change: str
    elements: Callable[[int, int], int]


# The notes set B_r = d throughout. Step 11 releases "everything else": whatever their own sum then holds.
CLAIMS = (
    Claim("load K, V", "+2·Bc·d", lambda c, d: 2 * c * d),
    Claim("load Q, O, l, m", "+2·d² + 2d", lambda c, d: 2 * d * d + 2 * d),
    Claim("compute S", "+Bc·d", lambda c, d: c * d),
    Claim("free Q and K", "−2·Bc·d", lambda c, d: -2 * c * d),
    Claim("m~ and P~ from S", "+d + Bc·d", lambda c, d: d + c * d),
    Claim("free S", "−Bc·d", lambda c, d: -c * d),
    Claim("l~ from P~", "+d", lambda c, d: d),
    Claim("new m and l", "+2d", lambda c, d: 2 * d),
    Claim("update and store O", "−d²", lambda c, d: -d * d),
    Claim("store new l, m", "−2d", lambda c, d: -2 * d),
    Claim("free the rest", "−rest", lambda c, d: -(c * d + d * d + 4 * d)),
)


def eleven_steps(Q: Tensor, K: Tensor, V: Tensor, mem: Memory, Bc: int, Br: int) -> Iterator[int]:
    """One inner iteration in the notes' order on a real ledger; yields the elements in SRAM after each step.

    Step 4 frees Q alone: the next iteration needs K again. A stored tile is released by the step that stores it.
    """
    d = Q.shape[1]
    O, l, m = torch.zeros_like(Q), Q.new_zeros(len(Q), 1), Q.new_full((len(Q), 1), -torch.inf)
    Kj, Vj = mem.load("K", K, 0, Bc), mem.load("V", V, 0, Bc)
    yield mem.used
    Qi, Oi = mem.load("Q", Q, 0, Br), mem.load("O", O, 0, Br)
    li, mi = mem.load("l", l, 0, Br), mem.load("m", m, 0, Br)
    yield mem.used
    S = mem.hold("S", Qi @ Kj.T / d**0.5)
    yield mem.used
    mem.free("Q")
    yield mem.used
    mt = mem.hold("m~", S.amax(1, keepdim=True))
    P = mem.hold("P", exp(S - mt))
    yield mem.used
    mem.free("S")
    yield mem.used
    lt = mem.hold("l~", P.sum(1, keepdim=True))
    yield mem.used
    mn = mem.hold("m_new", maximum(mi, mt))
    ln = mem.hold("l_new", exp(mi - mn) * li + exp(mt - mn) * lt)
    yield mem.used
    mem.store(O, 0, (exp(mi - mn) * li * Oi + exp(mt - mn) * (P @ Vj)) / ln)
    mem.free("O")
    yield mem.used
    mem.store(l, 0, ln)
    mem.store(m, 0, mn)
    mem.free("l_new", "m_new")
    yield mem.used
    mem.free_all_but("K", "V")
    yield mem.used


def compare(Bc: int, d: int) -> list[tuple[str, str, int, int]]:
    """Per step: what it does, the notes' change, the notes' running total, the ledger's, with B_r = d."""
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, max(Bc, d), d)
    claimed, rows = 0, []
    for claim, held in zip(CLAIMS, eleven_steps(Q, K, V, Memory(), Bc, d), strict=True):
        claimed += claim.elements(Bc, d)
        rows.append((claim.does, claim.change, claimed, held))
    return rows
