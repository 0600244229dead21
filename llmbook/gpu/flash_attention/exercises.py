"""Checkers for the flash_attention chapter's exercises."""

from collections.abc import Callable

import torch

from llmbook.kit.exercise import exercise, expect

from .forward import flash_traffic, sram_peak
from .memory import Memory

CHIPS = ((16_384, 64), (98_304, 64), (98_304, 128), (1_000, 7))


@exercise
def blocks_for_a_chip(answer: Callable[[int, int], tuple[int, int]]) -> str:
    """answer(M, d) → the (B_c, B_r) with B_r = min(B_c, d) of the largest B_c whose peak fits into M elements."""
    for M, d in CHIPS:
        Bc, Br = answer(M, d)
        expect(
            Br == min(Bc, d),
            f"for M={M}, d={d} you gave B_c={Bc}, B_r={Br}, but B_r should be min(B_c, d)={min(Bc, d)}",
        )
        peak = sram_peak(Bc, Br, d)
        expect(peak <= M, f"for M={M}, d={d} your B_c={Bc} needs {peak} elements, {peak - M} more than there are")
        more = sram_peak(Bc + 1, min(Bc + 1, d), d)
        expect(more > M, f"for M={M}, d={d} B_c={Bc} leaves room: B_c={Bc + 1} needs {more} of {M}")
    return f"right for {len(CHIPS)} chips; the ledger agrees."


@exercise
def merge_two_blocks(answer: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> str:
    """answer(O1, l1, m1, O2, l2, m2) → (O, l, m) of the two blocks' keys together."""
    generator = torch.Generator().manual_seed(0)
    for rows, d, shift in ((3, 4, 0.0), (5, 2, 40.0), (1, 3, 2_000.0)):
        S = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        S[:, 4:] += shift
        V = torch.randn(6, d, generator=generator, dtype=torch.float64)
        parts = []
        for keys in (slice(0, 4), slice(4, 6)):
            m = S[:, keys].amax(1, keepdim=True)
            e = (S[:, keys] - m).exp()
            l = e.sum(1, keepdim=True)
            parts += [e @ V[keys] / l, l, m]
        O, l, m = answer(*parts)
        finite = bool(torch.isfinite(O).all())
        expect(finite, f"with scores {shift:g} apart O has inf or nan: subtract the new maximum")
        wanted_m = S.amax(1, keepdim=True)
        expect(torch.equal(m, wanted_m), "m is not the larger of the two maxima")
        wanted_l = (S - wanted_m).exp().sum(1, keepdim=True)
        rescale = "l is off: each block's sum must be rescaled from its own maximum to the new one"
        expect(torch.allclose(l, wanted_l), rescale)
        wanted = S.softmax(1) @ V
        off = float((O - wanted).abs().max())
        weigh = "weigh each block's O by its rescaled l, divide by the new l"
        expect(torch.allclose(O, wanted), f"O is off by {off:.3g}: {weigh}")
    return "exact, and finite when the scores are 2,000 apart."


@exercise
def traffic_of_the_other_order(answer: Callable[[int, int, int], int]) -> str:
    """answer(N, d, Br) → elements moved when Q is outside and K, V are inside, O, l, m staying in SRAM."""
    for N, d, Br in ((64, 8, 8), (100, 16, 7), (1024, 64, 64)):
        blocks = -(-N // Br)
        wanted = 2 * N * d + blocks * 2 * N * d
        given = answer(N, d, Br)
        own = "that is Algorithm 1's own traffic; here O is not re-read, but K and V are"
        expect(given != flash_traffic(N, d, Br), own)
        count = "count Q and O once, K and V per block of Q"
        expect(given == wanted, f"for N={N}, d={d}, B_r={Br}: {given:,} instead of {wanted:,}; {count}")
    return "K and V are read once per block of Q, and O is written once."


@exercise
def causal_flash_attention(answer: Callable[..., torch.Tensor]) -> str:
    """answer(Q, K, V, mem, Bc, Br) → causal attention [N, d], skipping tiles above the diagonal."""
    generator = torch.Generator().manual_seed(1)
    for N, d, Bc, Br in ((8, 4, 2, 2), (11, 4, 3, 2), (9, 2, 4, 2), (1, 2, 2, 2)):
        Q, K, V = torch.randn(3, N, d, generator=generator, dtype=torch.float64)
        mem = Memory(sram_peak(Bc, Br, d))
        O = answer(Q, K, V, mem, Bc, Br)
        S = (Q @ K.T / d**0.5).masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
        off = float((O - S.softmax(1) @ V).abs().max())
        expect(off < 1e-12, f"for N={N}, B_c={Bc}, B_r={Br} the output is off by {off:.3g}")
        full = flash_traffic(N, d, Bc)
        moved = mem.reads + mem.writes
        skip = f"right, but {moved:,} elements moved, as many as without the mask: skip the hidden tiles"
        expect(Br >= N or moved < full, skip)
    return "right, and the hidden tiles are never loaded."
