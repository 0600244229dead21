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

from llmbook.block.rope import cost, decay, rotation, scaling

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
    )


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
        (lambda: scaling.ntk_base(2, 10_000.0, 2.0), "needs d ≥ 4, not 2"),
        (lambda: scaling.extended("magic", 8, 10_000.0, 2.0, 4096), "method must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Longer contexts

models = st.tuples(
    st.sampled_from([16, 64, 128]), st.sampled_from([1e4, 5e5]), st.sampled_from([1.0, 2.0, 8.0, 40.0]),
    st.sampled_from([512, 4096, 8192]),
)


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
    }
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


def test_what_each_method_leaves_unseen():
    theta, trained, factor = rotation.frequencies(128), 4096, 8

    def unseen(method):
        new = scaling.extended(method, 128, 10_000.0, factor, trained)
        return int(scaling.unseen(theta, new, trained, factor * trained).sum())

    slow = int((2 * math.pi / theta > trained).sum())
    assert unseen("none") == slow
    assert unseen("NTK-aware") == slow - 1  # the last pair alone is mended exactly
    assert {unseen(m) for m in ("position interpolation", "by parts (Llama 3.1)", "YaRN")} == {0}


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
