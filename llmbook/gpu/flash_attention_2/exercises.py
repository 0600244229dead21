"""Checkers for the flash_attention_2 chapter's exercises."""

from collections.abc import Callable, Sequence

import torch

from llmbook.gpu.flash_attention.memory import Memory, SramError
from llmbook.kit.exercise import exercise, expect

from .schedule import busy, key_tiles, launch_flash_2, makespan, run
from .tiled import tiled_attention, tiled_peak, tiled_traffic

CHIPS = ((32_768, 64, 16), (83_456, 128, 32), (116_224, 128, 64), (2_000, 7, 4))


@exercise
def rows_for_a_chip(answer: Callable[[int, int, int], int]) -> str:
    """answer(M, d, Bc) → the largest B_r whose tiles fit into M elements next to keys taken Bc at a time."""
    for M, d, Bc in CHIPS:
        Br = answer(M, d, Bc)
        where = f"for M={M:,}, d={d}, B_c={Bc} you gave B_r={Br}"
        expect(isinstance(Br, int) and Br > 0, f"{where}: it must be a whole number of rows, 1 or more")
        peak = tiled_peak(Bc, Br, d)
        expect(peak <= M, f"{where}, which needs {peak:,} elements, {peak - M:,} more than there are")
        more = tiled_peak(Bc, Br + 1, d)
        expect(more > M, f"{where}, but B_r={Br + 1} needs only {more:,}: there is room for more rows")
    M, d, Bc = CHIPS[-1]
    Br = answer(M, d, Bc)
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 2 * Br, d, dtype=torch.float64)
    mem = Memory(M)
    try:
        tiled_attention(Q, K, V, mem, Bc, Br)
    except SramError as error:
        expect(False, f"the ledger overflows: {error}")
    expect(mem.peak == tiled_peak(Bc, Br, d), f"the ledger's peak is {mem.peak}, not {tiled_peak(Bc, Br, d)}")
    moved = tiled_traffic(4096, d, Br)
    return f"right for {len(CHIPS)} chips, and the ledger agrees; at N = 4096 the last one moves {moved:,} elements."


@exercise
def jacobian_of_a_row(answer: Callable[..., torch.Tensor]) -> str:
    """answer(P, dP, D) → dS of rows whose softmax is P, without forming any Jacobian; D = rowsum(dO ∘ O)."""
    torch.manual_seed(1)
    for rows, n, d in ((3, 5, 4), (1, 7, 2), (4, 1, 3)):
        S, V = torch.randn(rows, n, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
        dO = torch.randn(rows, d, dtype=torch.float64)
        P = S.softmax(1)
        D, dP = (dO * (P @ V)).sum(1, keepdim=True), dO @ V.T
        J = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
        wanted = (J @ dP[:, :, None])[:, :, 0]
        given = answer(P, dP, D)
        expect(isinstance(given, torch.Tensor) and given.shape == S.shape, f"dS should be a tensor {list(S.shape)}")
        drop = "that is P ∘ dP: the second term of diag(p) − ppᵀ is missing"
        expect(not torch.allclose(given, P * dP) or torch.allclose(wanted, P * dP), drop)
        off = float((given - wanted).abs().max())
        expect(off < 1e-12, f"dS is off by {off:.2g}: each row is (diag(p) − ppᵀ) dp, and pᵀdp is already in D")
    return "equal to (diag(p) − ppᵀ) dp, row by row."


@exercise
def deal_the_tiles(answer: Callable[[Sequence[int], int], list[list[int]]]) -> str:
    """answer(work, sms) → for each multiprocessor the numbers of its tiles, of which tile t takes work[t] time."""
    for heads, N, sms in ((2, 1024, 6), (4, 1024, 12), (3, 1536, 16)):
        launch = launch_flash_2(heads, N, 128, 64, causal=True)
        work = [tile.work for tile in launch]
        shares = answer(work, sms)
        expect(len(shares) == sms, f"{sms} multiprocessors need {sms} lists, not {len(shares)}")
        dealt = sorted(t for share in shares for t in share)
        twice = f"every tile from 0 to {len(work) - 1} must be dealt once; you dealt {len(dealt)}"
        expect(dealt == list(range(len(work))), twice)
        longest = max(sum(work[t] for t in share) for share in shares)
        fixed = makespan(run(launch, sms, persistent=True))
        least = max(-(-sum(work) // sms), max(work))
        told = f"on {sms} of them yours takes {longest} key tiles; every n-th tile takes {fixed}, {least} is least"
        expect(longest < fixed, told)
        expect(longest <= 1.12 * least, f"{told}; come within 12% of it")
    return f"within 12% of the least, where every n-th tile keeps only {busy(run(launch, sms, True), sms):.0%} busy."


@exercise
def causal_work(answer: Callable[[int, int, int], int]) -> str:
    """answer(N, BM, BN) → tiles of keys that all blocks of BM queries visit if causal, N a multiple of both."""
    for N, BM, BN in ((1024, 128, 64), (4096, 128, 128), (512, 64, 128), (256, 32, 32)):
        wanted = sum(key_tiles(block, N, BM, BN, True) for block in range(N // BM))
        given = answer(N, BM, BN)
        full = N // BM * (N // BN)
        expect(given != full, f"for N={N}, B_r={BM}, B_c={BN}: {full:,} is every tile, the hidden ones too")
        half = "half of all tiles leaves the diagonal out: a tile on it is visited whole"
        expect(given != full // 2 or given == wanted, f"for N={N}, B_r={BM}, B_c={BN}: {half}")
        expect(given == wanted, f"for N={N}, B_r={BM}, B_c={BN}: {wanted:,} tiles, not {given:,}")
    return "the diagonal's tiles are visited whole, so a little more than half."
