"""FlashAttention-2 on the ledger, its warps and its schedule, against PyTorch and closed forms."""

from itertools import pairwise
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmbook.gpu.flash_attention.forward import flash_attention, flash_traffic
from llmbook.gpu.flash_attention.memory import Memory, SramError
from llmbook.gpu.flash_attention_2 import benchmark, exercises, figures, schedule
from llmbook.gpu.flash_attention_2.schedule import (
    Tile,
    busy,
    heads_at_once,
    launch_flash_1,
    launch_flash_2,
    makespan,
    run,
)
from llmbook.gpu.flash_attention_2.tiled import (
    counted,
    tiled_attention,
    tiled_backward,
    tiled_backward_traffic,
    tiled_peak,
    tiled_traffic,
)
from llmbook.gpu.flash_attention_2.warps import Shared, split_by_keys, split_by_queries
from tests.checkers import checker_tests, explorer_test

sizes = st.integers(1, 40)
blocks = st.integers(1, 17)


def tensors(N, d, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, N, d, generator=generator, dtype=torch.float64)


@given(N=sizes, d=st.integers(1, 9), Bc=blocks, Br=blocks, causal=st.booleans())
def test_forward_equals_sdpa_and_its_traffic_the_closed_form(N, d, Bc, Br, causal):
    Q, K, V = tensors(N, d)
    mem = Memory(tiled_peak(Bc, Br, d))
    O, L = tiled_attention(Q, K, V, mem, Bc, Br, causal)
    S = Q @ K.T / d**0.5
    if causal:
        S = S.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    wanted = F.scaled_dot_product_attention(Q[None], K[None], V[None], is_causal=causal)[0]
    torch.testing.assert_close(O, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(L, S.logsumexp(1, keepdim=True), atol=1e-12, rtol=0)
    moved = mem.reads + mem.writes
    assert moved == tiled_traffic(N, d, Br) if not causal else moved <= tiled_traffic(N, d, Br)
    assert not mem.live
    if Bc <= N and Br <= N and not causal:
        assert mem.peak == tiled_peak(Bc, Br, d)


@given(N=sizes, d=st.integers(1, 6), Bc=blocks, Br=blocks)
def test_backward_equals_autograd_and_its_traffic_the_closed_form(N, d, Bc, Br):
    Q, K, V, dO = tensors(N, d, 4)
    O, L = tiled_attention(Q, K, V, Memory(), Bc, Br)
    mem = Memory()
    ours = tiled_backward(Q, K, V, O, L, dO, mem, Bc, Br)
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    out = F.scaled_dot_product_attention(*(t[None] for t in leaves))[0]
    for mine, theirs in zip(ours, torch.autograd.grad(out, leaves, dO), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert mem.reads + mem.writes == tiled_backward_traffic(N, d, Bc, Br)
    assert not mem.live


def test_a_tile_more_than_fits_is_refused_by_the_ledger():
    Q, K, V = tensors(20, 4)
    with pytest.raises(SramError, match="needs"):
        tiled_attention(Q, K, V, Memory(tiled_peak(5, 5, 4) - 1), 5, 5)


@pytest.mark.parametrize(("N", "d", "B"), [(512, 32, 32), (1024, 64, 64), (4096, 128, 128)])
def test_with_equal_tiles_it_moves_two_thirds_of_flash_attention(N, d, B):
    ratio = tiled_traffic(N, d, B) / flash_traffic(N, d, B)
    assert 0.6 < ratio < 0.72


def test_deferred_rescaling_saves_vector_work_and_no_product():
    N, d, B = 64, 16, 8
    Q, K, V = tensors(N, d)
    one = counted(lambda: flash_attention(Q, K, V, Memory(), B, B))
    two = counted(lambda: tiled_attention(Q, K, V, Memory(), B, B))
    assert one.product_flops == two.product_flops == 4 * N * N * d
    assert two.vector_ops < one.vector_ops
    saved = one.vector_ops - two.vector_ops
    # Per tile FA1 multiplies O by l and b·PV, and divides: two passes over O more, and a few vectors.
    tiles = (N // B) ** 2
    assert 2 * B * d * tiles * 0.8 < saved < 2 * B * d * tiles + 12 * B * tiles


@given(rows=st.integers(1, 12), keys=st.integers(1, 12), d=st.integers(1, 5), warps=st.integers(1, 4))
def test_both_ways_to_split_a_tile_are_exact_and_one_exchanges_nothing(rows, keys, d, warps):
    Q, K, V = tensors(rows * warps, d)[0], *tensors(keys * warps, d, 2, seed=1)
    wanted = (Q @ K.T / d**0.5).softmax(1) @ V
    by_keys, by_queries = Shared(), Shared()
    torch.testing.assert_close(split_by_keys(Q, K, V, warps, by_keys), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(split_by_queries(Q, K, V, warps, by_queries), wanted, atol=1e-12, rtol=0)
    assert by_keys == Shared(written=warps * len(Q) * (d + 2), barriers=1)
    assert by_queries == Shared()


# --- the schedule


@given(
    heads=st.integers(1, 5), N=st.integers(1, 400), sms=st.integers(1, 20), causal=st.booleans(), fixed=st.booleans()
)
def test_a_run_does_every_tile_once_and_never_two_at_a_time(heads, N, sms, causal, fixed):
    launch = launch_flash_2(heads, N, 32, 16, causal)
    spans = run(launch, sms, fixed)
    assert sorted(s.tile for s in spans) == sorted(launch)
    for sm in range(sms):
        mine = sorted(s for s in spans if s.sm == sm)
        assert all(a.end <= b.start for a, b in pairwise(mine))
    total = sum(t.work for t in launch)
    assert makespan(spans) >= max(ceil(total / sms), max(t.work for t in launch))
    assert 0 < busy(spans, sms) <= 1
    if not fixed:  # Graham's bound for list scheduling
        assert makespan(spans) <= total / sms + max(t.work for t in launch)


@given(N=st.integers(1, 500), BM=st.sampled_from([16, 32, 64]), BN=st.sampled_from([16, 32, 64]), causal=st.booleans())
def test_both_launches_do_the_same_work(N, BM, BN, causal):
    one, two = launch_flash_1(2, N, BM, BN, causal), launch_flash_2(2, N, BM, BN, causal)
    assert sum(t.work for t in one) == sum(t.work for t in two)
    assert len(one) == 2
    assert len(two) == 2 * ceil(N / BM)
    rows, keys = range(ceil(N / BM)), range(ceil(N / BN))
    seen = sum(not causal or j * BN < min(N, (i + 1) * BM) for i in rows for j in keys)
    assert sum(t.work for t in two) == 2 * seen


def test_longest_first_beats_the_order_of_rows():
    orders = [run(launch_flash_2(16, 16_384, 128, 64, True, longest), 132) for longest in (False, True)]
    assert busy(orders[0], 132) < 0.95 < 0.98 < busy(orders[1], 132)


def test_a_fixed_share_of_unequal_tiles_idles():
    launch = launch_flash_2(8, 16_384, 128, 64, True)
    assert busy(run(launch, 132, persistent=True), 132) < 0.6 < 0.98 < busy(run(launch, 132), 132)


def test_the_empty_launch():
    assert (makespan([]), busy([], 4), heads_at_once([])) == (0, 0.0, 0)
    assert schedule.launch_flash_2(0, 10, 4, 4) == []


def test_heads_at_once_is_what_a_clock_would_see():
    spans = run([Tile(h, 0, w) for h, w in enumerate((4, 1, 1, 5, 2))], 2)
    clock = max(len({s.tile.head for s in spans if s.start <= t < s.end}) for t in range(makespan(spans)))
    assert heads_at_once(spans) == clock


# --- exercises, figures, benchmark


def rows_for_a_chip(M, d, Bc):
    return (M - Bc * d) // (2 * d + Bc + 3)


def deal(work, sms):
    shares, load = [[] for _ in range(sms)], [0] * sms
    for t in sorted(range(len(work)), key=lambda t: -work[t]):
        least = load.index(min(load))
        shares[least].append(t)
        load[least] += work[t]
    return shares


SOLUTIONS = {
    "rows_for_a_chip": rows_for_a_chip,
    "jacobian_of_a_row": lambda P, dP, D: P * (dP - D),
    "deal_the_tiles": deal,
    "causal_work": lambda N, BM, BN: sum(-(-(i + 1) * BM // BN) for i in range(N // BM)),
}
WRONG = {
    "rows_for_a_chip": [
        (lambda M, d, Bc: M // (4 * d), "room for more rows"),
        (lambda M, d, Bc: (M - Bc * d) // (2 * d + Bc), "than there are"),
        (lambda M, d, Bc: min(d, rows_for_a_chip(M, d, Bc)), "room for more rows"),
        (lambda M, d, Bc: (M - 2 * Bc * d) // (2 * d + Bc + 3), "room for more rows"),
        (lambda M, d, Bc: M / d, "a whole number of rows"),
    ],
    "jacobian_of_a_row": [
        (lambda P, dP, D: P * dP, "the second term"),
        (lambda P, dP, D: P * dP - D, "off by"),
        (lambda P, dP, D: P * (dP + D), "off by"),
        (lambda P, dP, D: P * (1 - P) * dP, "off by"),
        (lambda P, dP, D: D, "should be a tensor"),
    ],
    "deal_the_tiles": [
        (lambda work, sms: [list(range(s, len(work), sms)) for s in range(sms)], "every n-th tile takes"),
        (lambda work, sms: [list(range(len(work)))], "need 6 lists"),
        (lambda work, sms: [[t] for t in range(sms)], "dealt once"),
        (lambda work, sms: [list(range(len(work))), *([] for _ in range(sms - 1))], "yours takes"),
    ],
    "causal_work": [
        (lambda N, BM, BN: N // BM * (N // BN), "the hidden ones too"),
        (lambda N, BM, BN: N // BM * (N // BN) // 2, "leaves the diagonal out"),
        (lambda N, BM, BN: N // BM * (N // BM + 1) // 2, "tiles, not"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


test_explorers_draw_their_corners = explorer_test(figures.EXPLORERS)


def test_benchmark_cases_count_half_where_half_is_masked():
    full, masked = list(benchmark.cases(**benchmark.SMALL))[::2]
    assert (full.sizes["causal"], masked.sizes["causal"]) == (False, True)
    assert full.flops == 2 * masked.flops == 4 * 40 * 40 * 32 * 6
