"""FlashAttention: the tile algorithm and the kernel against PyTorch, the accounts against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmbook.gpu.flash_attention import benchmark, eleven_steps, exercises, figures
from llmbook.gpu.flash_attention import kernel as kernel_module
from llmbook.gpu.flash_attention.backward import (
    TiledAttention,
    flash_backward,
    flash_backward_traffic,
    standard_backward,
    standard_backward_traffic,
)
from llmbook.gpu.flash_attention.forward import (
    block_sizes,
    flash_attention,
    flash_traffic,
    paper_block_sizes,
    sram_peak,
    standard_attention,
    standard_traffic,
)
from llmbook.gpu.flash_attention.kernel import flash_attention_1
from llmbook.gpu.flash_attention.memory import Memory, SramError
from llmbook.gpu.flash_attention.rule import error_by_the_rule, standard

sizes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 17), st.integers(1, 17))


def qkv(n, d, dtype=torch.float64, seed=0):
    return torch.randn(3, n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(sizes)
def test_any_blocks_give_exact_attention_and_the_counted_traffic(size):
    n, d, bc, br = size
    q, k, v = qkv(n, d)
    mem = Memory()
    out, l, m = flash_attention(q, k, v, mem, bc, br)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(m + l.log(), (q @ k.T / d**0.5).logsumexp(1, keepdim=True), atol=1e-13, rtol=1e-12)
    assert mem.reads + mem.writes == flash_traffic(n, d, bc)
    assert not mem.live


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_standard_attention_and_its_traffic(n, d, br):
    q, k, v = qkv(n, d)
    mem = Memory()
    torch.testing.assert_close(standard_attention(q, k, v, mem, br), F.scaled_dot_product_attention(q, k, v))
    assert mem.reads + mem.writes == standard_traffic(n, d)


@given(st.integers(1, 16), st.integers(0, 3000))
def test_block_sizes_are_the_largest_that_fit(d, extra):
    M = sram_peak(1, 1, d) + extra
    bc, br = block_sizes(M, d)
    assert br == min(bc, d)
    assert sram_peak(bc, br, d) <= M
    if bc < paper_block_sizes(M, d)[0]:
        assert sram_peak(bc + 1, min(bc + 1, d), d) > M
    n = 2 * bc + 1
    mem = Memory(M)
    flash_attention(*qkv(n, d), mem, bc, br)
    assert mem.peak == sram_peak(bc, br, d)


def test_the_papers_block_sizes():
    """Algorithm 1, line 1, at M = 4·d·B: B_c = B and B_r = min(B, d); and its ceiling."""
    assert paper_block_sizes(4 * 64 * 128, 64) == (128, 64)
    assert paper_block_sizes(4 * 64 * 32, 64) == (32, 32)
    assert paper_block_sizes(4 * 64 * 32 + 1, 64) == (33, 33)


def test_too_little_sram_is_refused():
    with pytest.raises(ValueError, match="M = 10 elements of SRAM are too few for d = 8: one row needs 31"):
        block_sizes(10, 8)


def test_traffic_is_n_squared_d_squared_over_m():
    """Θ(N²d²/M): doubling N, d or halving M multiplies by 4, 4, 2, far from the edges."""
    def elements(n, d, m):
        return flash_traffic(n, d, block_sizes(m, d)[0])

    base = elements(2**16, 64, 2**18)
    assert elements(2**17, 64, 2**18) / base == pytest.approx(4, rel=0.02)
    assert elements(2**16, 128, 2**18) / base == pytest.approx(4, rel=0.05)
    assert elements(2**16, 64, 2**17) / base == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_extreme_scores_stay_finite(shift):
    q, k, v = qkv(12, 4)
    q[:, 0], k[:, 0] = 100.0, shift
    k[3, 0] += 50
    out, *_ = flash_attention(q, k, v, Memory(), 5, 3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@given(sizes)
def test_backward_equals_autograd_and_its_traffic(size):
    n, d, bc, br = size
    q, k, v = (t.requires_grad_() for t in qkv(n, d))
    reference = F.scaled_dot_product_attention(q, k, v)
    d_out = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    wanted = torch.autograd.grad(reference, (q, k, v), d_out)
    with torch.no_grad():
        out, l, m = flash_attention(q, k, v, Memory(), bc, br)
        mem = Memory()
        found = flash_backward(q, k, v, out, d_out, l, m, mem, bc, br)
        naive = Memory()
        plain = standard_backward(q, k, v, (q @ k.T / d**0.5).softmax(1), d_out, naive)
    for one, other, exact in zip(found, plain, wanted, strict=True):
        torch.testing.assert_close(one, exact, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(other, exact, atol=1e-12, rtol=1e-10)
    assert mem.reads + mem.writes == flash_backward_traffic(n, d, bc)
    assert naive.reads + naive.writes == standard_backward_traffic(n, d)
    assert not mem.live


def test_gradcheck_with_batch_and_heads():
    q, k, v = (torch.randn(2, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *t: TiledAttention.apply(*t, 60), (q, k, v))


def test_the_memory_refuses_what_cannot_be():
    x = torch.ones(4, 4)
    mem = Memory(20)
    mem.load("A", x, 0, 4)
    with pytest.raises(SramError, match="B needs 8 elements, but only 4 of 20 are free"):
        mem.load("B", x, 0, 2)
    with pytest.raises(SramError, match="C is not in SRAM, which holds \\['A'\\]"):
        mem.free("C")
    with pytest.raises(SramError, match="A is already in SRAM"):
        mem.hold("A", x[:1])
    mem.free("A")
    mem.hold("A", x[:1])
    with pytest.raises(SramError, match="cannot replace it"):
        mem.hold("B", x, over="A")
    assert (mem.peak, mem.reads) == (16, 24)  # a read that finds no room has crossed all the same


def test_the_recording_is_the_algorithms_own():
    source, frames = figures.flash_frames(6, 2, 34)
    assert max(sum(frame.live.values()) for frame in frames) == 34 == sram_peak(3, 2, 2)
    assert frames[-1].moved == flash_traffic(6, 2, 3)
    assert not frames[-1].live
    assert any("mem.store(O, i, Oi)" in line for line in source)
    assert frames[-1].written["O"] == 2 * 3  # two blocks of keys, three of queries


def test_the_eleven_steps_differ_where_the_chapter_says():
    for bc, d in ((64, 64), (128, 64), (32, 64)):
        rows = eleven_steps.compare(bc, d)
        agree = [claimed == held for *_, claimed, held in rows]
        assert agree[:3] == [True, True, True]
        # Step 4: the notes free Q and K (2·B_c·d), the algorithm Q alone (d²).
        assert rows[3][3] - rows[3][2] == 2 * bc * d - d * d
        assert rows[10][2] == 0
        assert rows[10][3] == 2 * bc * d  # K and V stay for the next queries


# --- the Triton kernel, interpreted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 16), (64, 32), (70, 64), (33, 128), (40, 256)])
def test_the_kernel_equals_float64(n, d, causal):
    q, k, v = torch.randn(3, 1, 2, n, d, generator=torch.Generator().manual_seed(n))
    out, lse = flash_attention_1(q, k, v, causal)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-5)
    scores = q.double() @ k.double().mT / d**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_in_half_precision_by_flash_attentions_own_rule(dtype):
    q, k, v = torch.randn(3, 1, 1, 96, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    out, _ = flash_attention_1(q, k, v, True)
    error, allowed = error_by_the_rule([out], (q, k, v), lambda *head: [standard(*head, True)], times=2)
    assert error <= allowed
    assert out.dtype == dtype


def test_the_kernel_takes_views_and_no_rows_at_all():
    x = torch.randn(3, 2, 33, 2, 16)
    q, k, v = x.transpose(2, 3)  # [2, 2, 33, 16], not contiguous
    out, _ = flash_attention_1(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)
    empty, lse = flash_attention_1(*torch.randn(3, 2, 2, 0, 16))
    assert empty.shape == (2, 2, 0, 16)
    assert lse.shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((1, 1, 4, 16), (1, 1, 5, 16), (1, 1, 5, 16)), torch.float32, "must share one shape"),
        (((4, 16),) * 3, torch.float32, "must share one shape"),
        (((1, 1, 4, 48),) * 3, torch.float32, "head dimension 48 is not supported; use one of"),
        (((1, 1, 4, 16),) * 3, torch.float64, "q, k, v must share one of float16, bfloat16, float32"),
    ],
)
def test_the_kernel_refuses_bad_input(shapes, dtype, message):
    with pytest.raises(ValueError, match=message):
        flash_attention_1(*(torch.randn(shape).to(dtype) for shape in shapes))


def test_narrow_tiles_before_tensor_cores():
    assert kernel_module.block_rows(64, 75) == 32
    assert kernel_module.block_rows(64, 80) == 64
    assert kernel_module.block_rows(128, 90) == 32


def test_the_benchmarks_cases_count_half_where_half_is_masked():
    for case in benchmark.cases(**benchmark.SMALL):
        assert case.flops == 4 * 40 * 40 * 16 * 6 // (2 if case.sizes["causal"] else 1)
        assert {"SDPA flash", "SDPA cuDNN", "standard, three kernels"} <= set(case.make().peers)


@pytest.mark.parametrize("damage", ["second sequence", "last head", "last number", "NaN in the last head"])
@pytest.mark.parametrize("piece", [1, 2 * 40**2, 2**24])
def test_the_rule_looks_at_every_head_of_every_sequence(damage, piece, monkeypatch):
    """One head at a time, two, or all."""
    monkeypatch.setattr("llmbook.gpu.flash_attention.rule.PIECE", piece)
    q, k, v = torch.randn(3, 2, 3, 40, 16, generator=torch.Generator().manual_seed(1)).half()
    out = standard(q, k, v, True)

    def plain(q, k, v):
        return [standard(q, k, v, True)]

    error, allowed = error_by_the_rule([out], (q, k, v), plain, times=2)
    assert error <= allowed
    if damage == "second sequence":
        out[1] = out[0]
    elif damage == "last head":
        out[1, 2] = out[1, 1]
    elif damage == "last number":
        out[-1, -1, -1, -1] += 0.1
    else:
        out[0, 2, 5] = torch.nan
    assert not error_by_the_rule([out], (q, k, v), plain, times=2)[0] <= allowed


def test_the_rule_refuses_other_shapes_and_numbers_of_results():
    q, k, v = torch.randn(3, 2, 3, 8, 16).half()

    def plain(q, k, v):
        return [standard(q, k, v, False)]

    with pytest.raises(ValueError, match=r"the result is \[1, 3, 8, 16\], but the reference is \[2, 3, 8, 16\]"):
        error_by_the_rule([standard(q, k, v, False)[:1]], (q, k, v), plain, times=2)
    with pytest.raises(ValueError, match="there are 2 results, but 1 references"):
        error_by_the_rule([q, q], (q, k, v), plain, times=2)


# --- exercises


def good_blocks(M, d):
    bc = M
    while sram_peak(bc, min(bc, d), d) > M:
        bc -= 1
    return bc, min(bc, d)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (paper_block_sizes, "more than there are|leaves room"),
        (lambda M, d: (M // (8 * d), min(M // (8 * d), d)), "leaves room"),
        (lambda M, d: (good_blocks(M, d)[0],) * 2, "B_r should be"),
        (lambda M, d: (1, 1), "leaves room"),
    ],
)
def test_wrong_blocks_are_told_why(answer, words):
    right, sentence = exercises.blocks_for_a_chip.verdict(answer)
    assert not right
    assert any(word in sentence for word in words.split("|")), sentence


def good_merge(O1, l1, m1, O2, l2, m2):
    m = torch.maximum(m1, m2)
    a, b = (m1 - m).exp() * l1, (m2 - m).exp() * l2
    return (a * O1 + b * O2) / (a + b), a + b, m


def test_solutions_are_accepted():
    assert exercises.blocks_for_a_chip.verdict(good_blocks)[0]
    assert exercises.merge_two_blocks.verdict(good_merge)[0]
    other = exercises.traffic_of_the_other_order.verdict(lambda N, d, Br: 2 * N * d + -(-N // Br) * 2 * N * d)
    assert other[0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda O1, l1, m1, O2, l2, m2: ((l1 * O1 + l2 * O2) / (l1 + l2), l1 + l2, torch.maximum(m1, m2)), "l is off"),
        (lambda O1, l1, m1, O2, l2, m2: (O1 + O2, *good_merge(O1, l1, m1, O2, l2, m2)[1:]), "O is off"),
        (lambda *a: (*good_merge(*a)[:2], torch.minimum(a[2], a[5])), "m is not the larger"),
        (lambda O1, l1, m1, O2, l2, m2: (
            (m1.exp() * l1 * O1 + m2.exp() * l2 * O2) / (m1.exp() * l1 + m2.exp() * l2), l1, torch.maximum(m1, m2),
        ), "l is off|inf or nan"),
    ],
)
def test_wrong_merges_are_told_why(answer, words):
    right, sentence = exercises.merge_two_blocks.verdict(answer)
    assert not right
    assert any(word in sentence for word in words.split("|")), sentence


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (flash_traffic, "Algorithm 1's own"),
        (lambda N, d, Br: 4 * N * d, "instead of"),
        (lambda N, d, Br: 2 * N * d + N // Br * 2 * N * d, "instead of"),
        (lambda N, d, Br: 4 * N * d + 4 * N * N, "instead of"),
    ],
)
def test_wrong_traffic_is_told_why(answer, words):
    right, sentence = exercises.traffic_of_the_other_order.verdict(answer)
    assert not right
    assert words in sentence


def causal_but_all_tiles(Q, K, V, mem, Bc, Br):
    flash_attention(Q, K, V, mem, Bc, Br)
    return F.scaled_dot_product_attention(Q[None], K[None], V[None], is_causal=True)[0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda Q, K, V, mem, Bc, Br: flash_attention(Q, K, V, mem, Bc, Br)[0], "off by"),
        (causal_but_all_tiles, "skip the hidden tiles"),
        (lambda Q, K, V, mem, Bc, Br: F.scaled_dot_product_attention(
            Q[None], K[None], V[None], is_causal=True, scale=1.0)[0], "off by"),
        (lambda Q, K, V, mem, Bc, Br: flash_attention(Q.tril(), K, V, mem, Bc, Br)[0], "off by"),
    ],
)
def test_wrong_causal_attention_is_told_why(answer, words):
    right, sentence = exercises.causal_flash_attention.verdict(answer)
    assert not right
    assert words in sentence
