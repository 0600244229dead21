"""RoPE against Hugging Face, the ONNX operator in PyTorch, and its own algebra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmbook.block.rope import benchmark, cost, decay, exercises, figures, kernel, rotation, scaling
from llmbook.kit import measure
from llmbook.kit.explore import MAX_BYTES, picture

FORMS = (rotation.rotate_by_matrix, rotation.rotate_complex, rotation.rotate_interleaved)
widths = st.integers(1, 24).map(lambda pairs: 2 * pairs)
bases = st.sampled_from([2.0, 100.0, 10_000.0, 500_000.0])
sizes = st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 3))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def wide(positions, d, base=10_000.0, dtype=torch.float64):
    return rotation.tables(positions, rotation.frequencies(d, base), dtype)


def config(d=64, base=10_000.0, length=4096, **scaling_parameters):
    return LlamaConfig(
        hidden_size=4 * d, num_attention_heads=4, head_dim=d, max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": base, **scaling_parameters},
    )  # fmt: skip


# The four forms


@given(widths, bases, sizes, st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_forms_agree_up_to_the_permutation(d, base, shape, start):
    batch, tokens, heads = shape
    x = randn(batch, tokens, heads, d)
    cos, sin = wide(torch.arange(start, start + tokens), d, base)
    first, *others = [form(x, cos, sin) for form in FORMS]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)
    order = rotation.half_split_order(d)
    halves = rotation.rotate_half_split(x[..., order], cos, sin)
    torch.testing.assert_close(halves, first[..., order], rtol=0, atol=1e-12)


@given(widths, bases, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_scores_depend_on_the_distance_only_and_norms_stay(d, base, m, n, shift):
    q, k = randn(1, 1, d), randn(1, 1, d, seed=1)
    for rotate in (*FORMS, rotation.rotate_half_split):
        turn = lambda x, at, rotate=rotate: rotate(x, *wide(torch.tensor([at]), d, base)).flatten()  # noqa: E731
        score = turn(q, m) @ turn(k, n)
        torch.testing.assert_close(turn(q, m + shift) @ turn(k, n + shift), score, rtol=0, atol=1e-9)
        torch.testing.assert_close(q.flatten() @ turn(k, n - m), score, rtol=0, atol=1e-9)
        torch.testing.assert_close(turn(q, m).norm(), q.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("d", [2, 10, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_half_split_is_llamas(d, base):
    q, k = randn(2, 4, 9, d, dtype=torch.float32), randn(2, 2, 9, d, seed=1, dtype=torch.float32)
    positions = torch.arange(20, 29).repeat(2, 1)
    cos, sin = LlamaRotaryEmbedding(config(d, base))(q, positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    tables = wide(positions, d, base, torch.float32)
    for mine, other in zip((q, k), theirs, strict=True):
        ours = rotation.rotate_half_split(mine.transpose(1, 2), *tables).transpose(1, 2)
        torch.testing.assert_close(ours, other, rtol=0, atol=2e-5)


@given(st.integers(1, 16).map(lambda pairs: 2 * pairs), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_interleaved_is_deepseeks(d, tokens):
    q, k = randn(2, 3, tokens, d), randn(2, 1, tokens, d, seed=1)
    cos, sin = wide(torch.arange(tokens), d)
    theirs = apply_rotary_pos_emb_interleave(
        q, k, *(torch.cat((t, t), -1).expand(2, -1, -1) for t in (cos, sin))
    )
    order = rotation.half_split_order(d)  # theirs writes the result in half-split order
    for mine, other in zip((q, k), theirs, strict=True):
        ours = rotation.rotate_interleaved(mine.transpose(1, 2), cos, sin).transpose(1, 2)
        torch.testing.assert_close(ours[..., order], other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_layouts_are_onnxs(interleaved):
    x = randn(2, 7, 3, 12, dtype=torch.float32)
    cos, sin = wide(torch.arange(30), 12, dtype=torch.float32)
    at = torch.arange(5, 12).repeat(2, 1)
    theirs = torch.onnx.ops.rotary_embedding(x.transpose(1, 2), cos, sin, at, interleaved=interleaved)
    rotate = rotation.rotate_interleaved if interleaved else rotation.rotate_half_split
    torch.testing.assert_close(rotate(x, cos[at], sin[at]), theirs.transpose(1, 2), rtol=0, atol=1e-6)


@given(st.integers(1, 5), widths, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_permuted_weights_give_the_same_scores(heads, d, width):
    weights = [randn(heads * d, width, seed=seed) for seed in (0, 1)]
    x = randn(1, 6, width, seed=2)
    cos, sin = wide(torch.arange(6), d)

    def scores(weights, rotate):
        q, k = [rotate((x @ w.T).unflatten(-1, (heads, d)), cos, sin) for w in weights]
        return torch.einsum("bqhd,bkhd->bhqk", q, k)

    there = scores(weights, rotation.rotate_interleaved)
    moved = [rotation.to_half_split(w, heads) for w in weights]
    torch.testing.assert_close(scores(moved, rotation.rotate_half_split), there, rtol=1e-12, atol=1e-11)
    for before, after in zip(weights, moved, strict=True):
        # Hugging Face's conversion of Meta's checkpoints, written its way
        view = before.view(heads, d // 2, 2, width).transpose(1, 2).reshape_as(before)
        assert torch.equal(after, view)
        assert torch.equal(rotation.to_interleaved(after, heads), before)
        bias = before[:, 0]
        assert torch.equal(rotation.to_half_split(bias, heads), after[:, 0])


def test_gradients():
    x = randn(2, 3, 2, 6).requires_grad_()
    tables = wide(torch.arange(3), 6)
    for rotate in (*FORMS, rotation.rotate_half_split):
        assert torch.autograd.gradcheck(lambda x, rotate=rotate: rotate(x, *tables), (x,))


def test_angles_hold_at_a_million():
    theta = rotation.frequencies(128)
    at = 10**6 + 7
    exact = [math.cos(at * 10_000.0 ** (-2 * i / 128)) for i in range(64)]
    cos, _ = rotation.tables(torch.tensor([at]), theta)
    assert max(abs(float(c) - e) for c, e in zip(cos[0], exact, strict=True)) < 1e-7
    single = (torch.tensor(float(at)) * theta.float()).cos()
    assert (single - torch.tensor(exact)).abs().max() > 1e-3  # what float32 angles would give


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rotation.frequencies(7), "even and at least 2, not 7"),
        (lambda: rotation.frequencies(0), "not 0"),
        (lambda: rotation.frequencies(8, 0.0), "base must be above 0"),
        (lambda: rotation.frequencies(8, math.nan), "base must be above 0"),
        (lambda: rotation.to_half_split(randn(12, 2), 4), "12 rows do not divide into 4 heads"),
        (lambda: rotation.to_interleaved(randn(12, 2), 0), "into 0 heads"),
        (lambda: scaling.interpolated(randn(4), 0.5), "at least 1, not 0.5"),
        (lambda: scaling.ntk_base(2, 10_000.0, 2.0), "needs 2 pairs"),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Longer contexts

models = st.tuples(
    st.sampled_from([16, 64, 128]), st.sampled_from([1e4, 5e5]), st.sampled_from([1.0, 2.0, 8.0, 40.0]),
    st.sampled_from([512, 4096, 8192]),
)  # fmt: skip


@given(models)
@settings(max_examples=30, deadline=None)
def test_scaled_frequencies_are_hugging_faces(model):
    d, base, factor, length = model
    theta = rotation.frequencies(d, base)
    hugging = {
        kind: ROPE_INIT_FUNCTIONS[kind](
            config(d, base, length, rope_type=kind, factor=factor, **more), "cpu", **also
        )
        for kind, more, also in (
            ("linear", {}, {}),
            ("dynamic", {}, {"seq_len": 3 * length}),
            ("yarn", {"original_max_position_embeddings": length}, {}),
            ("llama3", {
                "original_max_position_embeddings": length, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            }, {}),
        )
    }  # fmt: skip
    longer = scaling.dynamic_ntk_base(d, base, factor, 3 * length, length)
    ours = {
        "linear": (scaling.interpolated(theta, factor), 1.0),
        "dynamic": (rotation.frequencies(d, longer), 1.0),
        "yarn": (scaling.yarn(d, base, factor, length), scaling.yarn_attention_factor(factor)),
        "llama3": (scaling.by_parts(theta, factor, length, fast=4.0), 1.0),
    }
    for kind, (mine, scale) in ours.items():
        assert torch.allclose(mine.float(), hugging[kind][0], rtol=2e-5, atol=0), kind
        assert scale == pytest.approx(hugging[kind][1], rel=1e-12)


def test_ntk_stretches_the_last_pair_by_s_and_the_first_not():
    d, base, factor = 128, 10_000.0, 8.0
    before = rotation.frequencies(d, base)
    after = rotation.frequencies(d, scaling.ntk_base(d, base, factor))
    assert float(before[0] / after[0]) == 1
    assert float(before[-1] / after[-1]) == pytest.approx(factor, rel=1e-12)
    assert scaling.dynamic_ntk_base(d, base, factor, 100, 4096) == base


# Decay


@given(widths, bases, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scores_from_pairs_equal_rotated_inner_products_and_stay_below_the_bound(d, base, seed):
    q, k = randn(d, seed=seed), randn(d, seed=seed + 100)
    theta, at = rotation.frequencies(d, base), torch.tensor([0, 1, 5, 77, 4096])
    turned = rotation.rotate_interleaved(q.expand(5, 1, d), *wide(at, d, base))[:, 0]
    scores = decay.scores(q, k, at, theta)
    torch.testing.assert_close(turned @ k, scores, rtol=0, atol=1e-10)
    assert (scores.abs() <= decay.score_bound(q, k, at, theta) * (1 + 1e-12)).all()
    bound = decay.relative_bound(at, theta)
    assert float(bound[0]) == pytest.approx((d / 2 + 1) / 2)
    assert (bound <= bound[0] + 1e-12).all()


# Cost


@given(st.integers(1, 5), st.integers(1, 4), widths)
@settings(max_examples=20, deadline=None)
def test_counted_flops_equal_the_formula(tokens, heads, d):
    x = randn(tokens, heads, d)
    tables = wide(torch.arange(tokens), d)
    for rotate in (rotation.rotate_interleaved, rotation.rotate_half_split):
        with cost.Count() as count:
            rotate(x, *tables)
        assert count.flops == cost.flops(tokens, heads, d)
        assert count.bytes > cost.fused_bytes(tokens, heads, d, 8, table=8)


# The kernel


def reference(q, k, cos, sin, layout, upstream):
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    rotate = rotation.rotate_half_split if layout == "half_split" else rotation.rotate_interleaved
    out = [rotate(t, cos.double(), sin.double()) for t in exact]
    return (*out, *torch.autograd.grad(out, exact, [t.double() for t in upstream]))


kernel_sizes = st.tuples(
    st.integers(0, 2), st.integers(0, 4), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from([2, 6, 16, 40]),
)  # fmt: skip


@given(
    kernel_sizes, st.sampled_from(kernel.LAYOUTS), st.sampled_from(kernel.DTYPES), st.booleans(),
    st.sampled_from(["BSHD", "BHSD", "sliced"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_kernel_forward_and_backward_against_float64(shape, layout, dtype, per_batch, strides):
    batch, tokens, q_heads, k_heads, d = shape

    def make(heads, seed):
        if strides == "BHSD":
            return randn(batch, heads, tokens, d, seed=seed).to(dtype).transpose(1, 2).requires_grad_()
        if strides == "sliced":
            return randn(batch, tokens, heads, d + 5, seed=seed).to(dtype)[..., 3 : 3 + d].requires_grad_()
        return randn(batch, tokens, heads, d, seed=seed).to(dtype).requires_grad_()

    q, k = make(q_heads, 0), make(k_heads, 1)
    at = torch.arange(1000, 1000 + tokens)
    at = at + torch.arange(batch)[:, None] * 7 if per_batch else at
    cos, sin = wide(at, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = [make(heads, 5).detach() for heads in (q_heads, k_heads)]
    out = kernel.rope(q, k, cos, sin, layout)
    grads = torch.autograd.grad(out, (q, k), upstream)
    unit = torch.finfo(dtype).eps
    for mine, exact in zip((*out, *grads), reference(q, k, cos, sin, layout, upstream), strict=True):
        assert mine.dtype == dtype
        # One rounding at the store, and the sums' own roundings in the tables' precision.
        bound = unit * exact.abs() + 4 * torch.finfo(cos.dtype).eps * 6 + torch.finfo(dtype).tiny
        assert ((mine.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", kernel.LAYOUTS)
def test_kernel_gradcheck(layout):
    q, k = randn(1, 2, 2, 4).requires_grad_(), randn(1, 2, 1, 4, seed=1).requires_grad_()
    tables = wide(torch.arange(2), 4)
    assert torch.autograd.gradcheck(lambda q, k: kernel.rope(q, k, *tables, layout), (q, k))
    # A gradient that PyTorch hands over as an expanded view, and a key that nobody uses.
    kernel.rope(q, k, *tables, layout)[0].sum().backward()
    assert k.grad is not None
    assert not k.grad.any()


def test_kernel_keeps_yarns_factor_in_both_directions():
    q = randn(1, 3, 2, 8, dtype=torch.float32).requires_grad_()
    factor = scaling.yarn_attention_factor(4.0)
    cos, sin = rotation.tables(torch.arange(3), rotation.frequencies(8), attention_factor=factor)
    out, _ = kernel.rope(q, q.detach(), cos, sin)
    (grad,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(grad, factor**2 * q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "neox"}, "layout must be one of"),
        ({"q": randn(2, 3, 4)}, r"q and k must be \[B, S, Hq, d\]"),
        ({"k": randn(1, 4, 1, 8)}, "q and k must be"),
        ({"q": randn(1, 3, 2, 7), "k": randn(1, 3, 1, 7)}, "must be even and from 2 to 2048, not 7"),
        ({"cos": randn(3, 8)}, r"cos and sin must both be \[3, 4\] or \[1, 3, 4\]"),
        ({"cos": randn(3, 4).float()}, "cos and sin must be torch.float64"),
        ({"q": randn(1, 3, 2, 8).float()}, "must share one of"),
        ({"q": randn(1, 3, 2, 8).long(), "k": randn(1, 3, 1, 8).long()}, "must share one of"),
        ({"cos": randn(3, 4).requires_grad_()}, "constants here"),
        ({"q": randn(1, 3, 2, 8).to("meta")}, "tensors are on"),
    ],
)
def test_kernel_refuses_in_one_sentence(change, words):
    cos, sin = wide(torch.arange(3), 8)
    good = {"q": randn(1, 3, 2, 8), "k": randn(1, 3, 1, 8), "cos": cos, "sin": sin, "layout": "half_split"}
    with pytest.raises(ValueError, match=words):
        kernel.rope(**{**good, **change})


def test_builds_name_every_argument():
    for build in kernel.BUILDS:
        named = set(build.signature) | set(build.constants(80))
        assert named == set(build.kernel.arg_names)


# Benchmark, exercises, figures


def test_benchmark_cases_are_right_and_their_peers_run():
    small = tuple(
        size._replace(batch=min(size.batch, 2), tokens=min(size.tokens, 3), q_heads=4, k_heads=2)
        for size in benchmark.SIZES
    )
    for case in benchmark.cases(torch.device("cpu"), small):
        error, allowed = case.error(case.run())
        assert 0 < error <= allowed
        for name in ("eager PyTorch", "copy of the same bytes"):
            case.peers[name]()
        wrong = tuple(-t for t in case.run())
        assert case.error(wrong)[0] > allowed
    timed = measure.measure(case, timer=lambda call: [1.0, 1.0, 1.0])
    assert timed["bytes"] == case.bytes > 0


def solution_permute(w, heads):
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def solution_renumber(keys, by, base):
    return turned(keys, torch.full((len(keys),), -by), base)


def turned(keys, at, base, rotate=rotation.rotate_half_split):
    return rotate(keys, *wide(at, keys.shape[-1], base))


ANSWERS = {
    "unfinished_pair": (35, [34, 36, 68, 63, 64, 45, 0, 100, 34.0]),
    "permute_weights": (
        solution_permute,
        [
            lambda w, heads: w, lambda w, heads: w[: len(w) // 2],
            lambda w, heads: rotation.to_interleaved(w, heads), lambda w, heads: rotation.to_half_split(w, 1),
            lambda w, heads: w.flip(0), lambda w, heads: w * 2, lambda w, heads: None,
        ],
    ),
    "renumber_cache": (
        solution_renumber,
        [
            lambda k, by, base: k, lambda k, by, base: k[1:],
            lambda k, by, base: turned(k, torch.full((len(k),), by), base),
            lambda k, by, base: turned(k, -torch.arange(by, by + len(k)), base),
            lambda k, by, base: turned(k, torch.full((len(k),), -by), base, rotation.rotate_interleaved),
            lambda k, by, base: turned(k, -torch.arange(len(k)), base),
            lambda k, by, base: turned(k, torch.full((len(k),), -by), 500.0),
        ],
    ),
    "derive_ntk_base": (
        lambda d, base, s: base * s ** (d / (d - 2)),
        [
            lambda d, base, s: base * s, lambda d, base, s: base * s ** ((d - 2) / d),
            lambda d, base, s: base, lambda d, base, s: base / s ** (d / (d - 2)),
            lambda d, base, s: -base,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_checkers_accept_the_solution_and_reject_wrong_answers(name, capsys):
    check = getattr(exercises, name)
    right, wrong = ANSWERS[name]
    assert check(right), capsys.readouterr().out
    messages = set()
    for answer in wrong:
        assert not check(answer), answer
        messages.add(capsys.readouterr().out)
    assert len(messages) >= 3  # they say what is wrong, not only that it is
    assert not check(...)


@pytest.mark.parametrize("name", figures.EXPLORERS)
def test_explorers_draw_their_corners(name):
    draw, caption, choices = figures.EXPLORERS[name]
    total = 1
    for values in choices.values():
        total *= len(values)
    for end in (0, -1):
        chosen = {key: values[end] for key, values in choices.items()}
        assert len(picture(draw, caption, chosen)) * total < MAX_BYTES
