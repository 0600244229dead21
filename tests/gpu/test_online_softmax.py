"""The (m, l, o) state: any split, any tree, any logits, against PyTorch's softmax, logsumexp and attention."""

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmbook.gpu.online_softmax import figures, passes, rounding, trees
from llmbook.gpu.online_softmax.state import State, absorb, empty, finish, merge, merge_outputs, stream

INF = math.inf
logits = st.one_of(
    st.floats(-30, 30), st.sampled_from([1e4, -1e4, 0.0, -INF, 88.0, 745.0]), st.floats(-1e4, 1e4)
)
rows = st.lists(logits, min_size=1, max_size=24)


def values(n, d=3, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alone(s, v):
    """One block's state, read from nothing."""
    return absorb(empty(*s.shape[:-1], d=v.shape[-1], dtype=s.dtype), s, v)


def exact(s, v):
    """softmax(s)·v and logsumexp(s) by PyTorch; zeros and −inf where all is masked."""
    if bool((s == -INF).all()):
        return torch.zeros(v.shape[-1], dtype=s.dtype), torch.tensor(-INF, dtype=s.dtype)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@st.composite
def cut_rows(draw):
    """A row, the places where it is cut (empty blocks too), and a tree over its blocks."""
    row = draw(rows)
    cuts = sorted(draw(st.lists(st.integers(0, len(row)), max_size=7)))
    edges = [0, *cuts, len(row)]
    parts = list(range(len(edges) - 1))
    while len(parts) > 1:
        a = parts.pop(draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(draw(st.integers(0, len(parts) - 1)))
        parts.append((a, b))
    return row, edges, parts[0]


@given(cut_rows())
def test_any_split_and_any_tree_give_the_softmax(case):
    row, edges, tree = case
    s = torch.tensor(row, dtype=torch.float64)
    v = values(len(row))
    blocks = [alone(s[i:j], v[i:j]) for i, j in itertools.pairwise(edges)]
    close(finish(trees.merge_tree(tree, blocks)), exact(s, v))
    close(finish(trees.chain(blocks)), exact(s, v))
    close(finish(trees.balanced(blocks)), exact(s, v))
    state = functools.reduce(lambda a, e: absorb(a, s[e[0] : e[1]], v[e[0] : e[1]]), itertools.pairwise(edges),
                             empty(d=3, dtype=torch.float64))
    close(finish(state), exact(s, v))


@given(rows, rows, rows)
def test_the_monoids_laws(a, b, c):
    x, y, z = (
        alone(torch.tensor(row, dtype=torch.float64), values(len(row), seed=i)) for i, row in enumerate((a, b, c))
    )
    nothing = empty(d=3, dtype=torch.float64)
    for one in (merge(x, nothing), merge(nothing, x)):
        for found, wanted in zip(one, x, strict=True):
            assert torch.equal(found, wanted)  # the identity changes no bit
    for found, wanted in zip(merge(x, y), merge(y, x), strict=True):
        assert torch.equal(found, wanted)  # nor does the order of two
    close(merge(merge(x, y), z), merge(x, merge(y, z)))


def test_associativity_in_exact_arithmetic():
    """With 2^s for e^s and whole s, everything is a fraction, and both sides are equal, not close."""
    def join(a, b):
        m = max(a[0], b[0])
        wa, wb = Fraction(2) ** (a[0] - m), Fraction(2) ** (b[0] - m)
        return m, wa * a[1] + wb * b[1], wa * a[2] + wb * b[2]

    blocks = [(3, Fraction(5, 4), Fraction(-7)), (-2, Fraction(1), Fraction(1, 3)), (9, Fraction(17, 8), Fraction(2))]
    for a, b, c in itertools.permutations(blocks):
        assert join(join(a, b), c) == join(a, join(b, c)) == join(*sorted((join(a, b), c)))


@given(rows, st.integers(1, 9))
def test_l_stays_between_one_and_the_count(row, block):
    s = torch.tensor(row, dtype=torch.float64)
    for read, state in enumerate(stream(s, values(len(row)), block)):
        seen = int((s[: read * block] > -INF).sum())
        assert (1 <= state.l <= seen + 1e-9) if seen else state.l == 0
        assert bool(torch.isfinite(state.o).all())


@given(cut_rows())
def test_finished_parts_merge_like_states(case):
    row, edges, _ = case
    s, v = torch.tensor(row, dtype=torch.float64), values(len(row))
    parts = [finish(alone(s[i:j], v[i:j])) for i, j in itertools.pairwise(edges)]
    close(functools.reduce(lambda a, b: merge_outputs(*a, *b), parts), exact(s, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_attention_with_heads_masks_and_blocks_is_sdpa(dtype, shift):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=dtype) for n in (5, 11, 11))
    mask = torch.rand(5, 11, generator=generator) < 0.6
    mask[2] = False  # this query sees nothing at all
    bias = torch.zeros(5, 11, dtype=dtype).masked_fill(~mask, -INF) + shift
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    s = q @ k.mT / 8**0.5 + bias
    for block in (1, 4, 11, 50):
        *_, state = stream(s, v, block)
        o, lse = finish(state)
        torch.testing.assert_close(o, wanted)
        torch.testing.assert_close(lse, s.logsumexp(-1))
    assert bool((wanted[:, :, 2] == 0).all())  # PyTorch's own convention, which `finish` follows


def test_nan_and_plus_infinity_make_their_own_row_nan_by_every_tree():
    s = torch.zeros(3, 6, dtype=torch.float64)
    s[0, 4], s[1, 2] = math.nan, INF
    v = values(6)
    blocks = [alone(s[:, i : i + 2], v[i : i + 2]) for i in (0, 2, 4)]
    for order in itertools.permutations(range(3)):
        o, _ = finish(trees.chain([blocks[i] for i in order]))
        assert o.isnan().all(1).tolist() == [True, True, False]
    assert s.softmax(1).isnan().any(1).tolist() == [True, True, False]


def test_nothing_read_is_zeros_and_minus_infinity():
    o, lse = finish(empty(2, d=3))
    assert o.tolist() == [[0.0] * 3] * 2
    assert lse.tolist() == [-INF] * 2
    state = empty(2, d=3)
    assert absorb(state, torch.zeros(2, 0), torch.zeros(0, 3)) is state
    assert F.scaled_dot_product_attention(torch.ones(1, 2, 3), torch.ones(1, 0, 3), torch.ones(1, 0, 3)).sum() == 0


def test_gradients_with_a_masked_row():
    s = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    s[1] = -INF
    keep = torch.tensor([0, 2])
    v = values(7).requires_grad_()
    s.requires_grad_()

    def ours(s, v):
        *_, state = stream(s, v, 3)
        return finish(state)

    o, lse = ours(s, v)
    wanted = torch.autograd.grad((s[keep].softmax(1) @ v).sum() + s[keep].logsumexp(1).sum(), (s, v))
    found = torch.autograd.grad(o.sum() + lse[keep].sum(), (s, v))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(ours, (s[keep].detach().requires_grad_(), v))


def test_bad_input_is_refused_in_one_sentence():
    state = empty(d=3)
    with pytest.raises(ValueError, match="s has 4 scores and v has 5 values"):
        absorb(state, torch.zeros(4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"must share one shape, but they are \[3\] and \[2, 3\]"):
        merge(state, empty(2, d=3))
    with pytest.raises(ValueError, match="at least 1 key, not 0"):
        list(stream(torch.zeros(4), torch.zeros(4, 3), 0))
    with pytest.raises(ValueError, match=r"the state has rows \[\], but the block's scores have \[2\]"):
        absorb(state, torch.zeros(2, 4), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"not \[\[2, 3\], \[2, 1\], \[2, 3\], \[2, 1\]\]"):
        merge_outputs(*(torch.zeros(2, n) for n in (3, 1, 3, 1)))
    for function in (passes.three_passes, passes.two_passes):
        with pytest.raises(ValueError, match="at least 1 key, not -1"):
            function(torch.zeros(2, 4), passes.Traffic(), -1)
    with pytest.raises(ValueError, match="4 scores per row need as many values, not 5"):
        passes.one_pass(torch.zeros(4), torch.zeros(5, 3), passes.Traffic(), 2)


def test_the_state_keeps_its_own_precision():
    s = torch.zeros(5000, dtype=torch.float16)
    v = torch.ones(5000, 1, dtype=torch.float16)
    *_, wide = stream(s, v, 1, torch.float32)
    assert wide.l == 5000
    *_, half = stream(s, v, 1)
    assert half.l.dtype == torch.float16
    assert half.l == 2048  # where adding 1 no longer changes a float16


# --- passes and what they move


@given(st.integers(0, 3), st.integers(0, 30), st.integers(1, 8), st.integers(0, 4))
def test_passes_agree_and_move_what_the_formula_says(height, n, block, d):
    s = 5 * torch.randn(height, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    v = values(n, d)
    wanted = s.softmax(-1)
    for way, function in (("three passes", passes.three_passes), ("two passes", passes.two_passes)):
        mem = passes.Traffic()
        p = function(s, mem, block)
        torch.testing.assert_close(p, wanted, atol=1e-15, rtol=1e-12)
        assert mem.total == (passes.PER_SCORE[way] - 1) * height * n
        torch.testing.assert_close(passes.product(p, v, mem), wanted @ v)
        assert mem.total == passes.elements(way, n, d, height)
    mem = passes.Traffic()
    torch.testing.assert_close(passes.one_pass(s, v, mem, block), wanted @ v, atol=1e-14, rtol=1e-12)
    assert mem.total == passes.elements("one pass, fused", n, d, height)


@pytest.mark.parametrize("function", [passes.three_passes, passes.two_passes])
def test_passes_on_masked_rows_and_large_logits(function):
    s = torch.tensor([[-INF, -INF, -INF], [1e4, 1e4 - 1, -INF], [-1e4, -INF, -1e4]], dtype=torch.float64)
    p = function(s, passes.Traffic(), 2)
    assert p[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(p[1:], s[1:].softmax(1))


def test_softmax_backward_is_autograds():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    dp = torch.randn(4, 9, dtype=torch.float64)
    p = x.softmax(-1)
    (wanted,) = torch.autograd.grad(p, x, dp)
    torch.testing.assert_close(passes.softmax_backward(p, dp), wanted)
    jacobian = torch.autograd.functional.jacobian(lambda row: row.softmax(0), x[0].detach())
    torch.testing.assert_close(passes.softmax_backward(p, dp)[0], jacobian @ dp[0])


# --- trees, rounding, pictures


@given(st.integers(1, 40), st.integers(0, 5))
def test_trees_hold_every_block_once_at_the_depth_they_promise(n, seed):
    def leaves(tree):
        return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[1])

    for tree in (trees.chain_tree(n), trees.balanced_tree(n), trees.random_tree(n, seed)):
        assert sorted(leaves(tree)) == list(range(n))
    assert trees.depth(trees.chain_tree(n)) == n - 1
    assert trees.depth(trees.balanced_tree(n)) == math.ceil(math.log2(n))
    assert leaves(trees.balanced_tree(n)) == list(range(n))


def test_error_grows_along_a_chain_and_not_in_a_tree():
    for spread in (1, 10):
        found = rounding.errors(spread)
        assert found["balanced tree"][-1] < 2**-22
        assert found["one key at a time"][-1] > 5 * found["balanced tree"][-1]
        assert found["one key at a time"][-1] > found["blocks of 64 keys"][-1]


def test_halve_is_a_merge_tree():
    s = torch.randn(2, 8, dtype=torch.float64)
    keys = [State(s[:, i], torch.ones(2).double(), torch.zeros(2, 0).double()) for i in range(8)]
    close(rounding.halve(s)[:2], trees.balanced(keys)[:2])


def test_pictures_say_what_the_states_are():
    assert "the old sums are multiplied by 0.050" in figures.streaming_caption("one outlier", 4, 2)
    assert "is masked" in figures.streaming_caption("masked start", 4, 1)
    for row in figures.ROWS:
        for block in (1, 2, 3, 4):
            said = [figures.streaming_caption(row, block, step) for step in figures.steps(block)]
            drawn = [figures.streaming(row, block, step).as_str() for step in figures.steps(block)]
            assert len(set(said)) == len(set(drawn)) == len(said)
            assert said[-1].endswith("meet their marks.")
    for tree in figures.TREES:
        assert "−0.314898" in figures.merging_caption(tree, 5)
        assert len({figures.merging(tree, step).as_str() for step in range(6)}) == 6
    assert "2.32 times fewer" in figures.traffic_caption(64, 128)
    assert len({figures.traffic(64, d).as_str() for d in (64, 128)}) == 2
