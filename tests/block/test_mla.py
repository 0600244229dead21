"""The ladder, the module and its cache against closed forms and Hugging Face's DeepseekV3Attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from llmbook.block.mla.attention import LatentAttention, Yarn, attend_absorbed, attend_rebuilt
from llmbook.block.mla.cache import LatentCache
from llmbook.block.mla.entangled import (
    best_single,
    between,
    misses,
    rotation,
    scores_absorbed_anyway,
    scores_turned_latent,
    scores_with_rope,
)
from llmbook.block.mla.ladder import absorbed, decoupled, draw_factors, low_rank, mha
from llmbook.block.mla.product import descend, elements
from llmbook.block.mla.sizes import V3, Sizes
from llmbook.block.rope.rotation import tables

SMALL = Sizes(32, 6, 12, 8, 4, 10, 16)
NO_Q_RANK = Sizes(32, 3, 12, 8, 4, 5)


def stream(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(sizes=SMALL, long=None, seed=0):
    torch.manual_seed(seed)
    module = LatentAttention(sizes, long=long).double()
    for norm in (module.kv_a_layernorm, getattr(module, "q_a_layernorm", None)):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return module


def near(a, b, bound=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() < bound


# --- the ladder


@given(st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(1, 9), st.integers(1, 12), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_neighbouring_rungs_are_equal(heads, d, d_c, D, S):
    w, r = draw_factors(heads, d, d_c, D, seed=S, rope=4)
    h = stream(S, D, seed=D)
    near(mha(h, w.q, w.up_k @ w.down, w.up_v @ w.down, w.o), low_rank(h, w))
    near(low_rank(h, w), absorbed(h, w))
    near(decoupled(h, w, r, absorb=False), decoupled(h, w, r, absorb=True))


def test_mha_is_pytorchs():
    w, _ = draw_factors(4, 8, 8, 32)
    k, v = w.up_k @ w.down, w.up_v @ w.down
    h = stream(7, 32)
    theirs = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = torch.cat([t.flatten(0, 1) for t in (w.q, k, v)])
    theirs.out_proj.weight.data = w.o.transpose(0, 1).flatten(1)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    near(theirs(h[None], h[None], h[None], attn_mask=mask, need_weights=False)[0][0], mha(h, w.q, k, v, w.o))


def test_gradients_of_the_rungs_agree():
    w, _ = draw_factors(3, 4, 5, 8)
    for leaf in w:
        leaf.requires_grad_()
    h = stream(5, 8)
    one, other = (torch.autograd.grad(rung(h, w).sin().sum(), list(w)) for rung in (low_rank, absorbed))
    for a, b in zip(one, other, strict=True):
        near(a, b)


def test_decoupled_without_a_rotary_part_in_the_weights_is_low_rank():
    w, r = draw_factors(3, 4, 5, 8, rope=2)
    still = r._replace(q=torch.zeros_like(r.q))
    h = stream(6, 8)
    wider = w._replace(q=w.q * (6 / 4) ** 0.5)  # the divisor is √(d + d_r)
    near(decoupled(h, wider, still, absorb=True), low_rank(h, w))


# --- why rotated keys cannot be absorbed


def test_rotations_match_the_rope_chapter_and_compose():
    near(rotation(8, 3) @ rotation(8, 4), rotation(8, 7))
    near(rotation(8, 5).T, rotation(8, -5))


def test_the_matrix_between_depends_on_the_offset_and_gives_the_scores():
    w, _ = draw_factors(1, 8, 12, 16)
    h = stream(9, 16)
    c, up_q, up_k = h @ w.down.T, w.q[0], w.up_k[0]
    scores = scores_with_rope(h, c, up_q, up_k)
    one_by_one = [[h[m] @ between(up_q, up_k, n - m) @ c[n] for n in range(9)] for m in range(9)]
    near(scores, torch.tensor(one_by_one, dtype=torch.float64))
    wrong = scores_absorbed_anyway(h, c, up_q, up_k)
    assert (scores - wrong).norm() / scores.norm() > 0.3


def test_no_single_matrix_is_nearer_than_the_mean():
    w, _ = draw_factors(1, 8, 12, 16)
    offsets = range(-31, 1)
    best = best_single(w.q[0], w.up_k[0], offsets)

    def loss(matrix):
        return sum(float((between(w.q[0], w.up_k[0], n) - matrix).pow(2).sum()) for n in offsets)

    assert misses(w.q[0], w.up_k[0], best, offsets).mean() > 0.5
    for seed in range(20):
        assert loss(best + 0.01 * stream(16, 12, seed=seed)) > loss(best)


def test_a_turned_latent_is_relative_but_another_model():
    w, _ = draw_factors(1, 8, 12, 16)
    h = stream(9, 16)
    args = (h, h @ w.down.T, w.q[0], w.up_k[0])
    near(scores_turned_latent(*args), scores_turned_latent(*args, start=1000), 1e-11)
    assert (scores_turned_latent(*args) - scores_with_rope(*args)).norm() > 0.3


# --- the module


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0}


def theirs_for(sizes, rope=None):
    config = DeepseekV3Config(
        hidden_size=sizes.dim, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        q_lora_rank=sizes.q_rank, kv_lora_rank=sizes.latent, qk_rope_head_dim=sizes.rope, v_head_dim=sizes.v,
        qk_nope_head_dim=sizes.nope, num_hidden_layers=1, max_position_embeddings=2560, attn_implementation="sdpa",
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e4},
    )
    theirs = DeepseekV3Attention(config, 0).double()
    for name in ("q_a_layernorm", "kv_a_layernorm"):  # theirs computes in float32 whatever comes in
        if getattr(theirs, name, None) is not None:
            setattr(theirs, name, torch.nn.RMSNorm(len(getattr(theirs, name).weight), eps=1e-6).double())
    return config, theirs


def half_split(cos, sin):
    return tuple(torch.cat((t, t), -1)[None] for t in (cos, sin))


@pytest.mark.parametrize("long", [None, Yarn(40, 64)], ids=["plain", "yarn"])
def test_the_angles_are_not_rounded_with_the_weights(long):
    plain, half = LatentAttention(SMALL, long=long), LatentAttention(SMALL, long=long).bfloat16()
    assert half.o_proj.weight.dtype == torch.bfloat16
    assert half.theta.dtype == torch.float64
    assert torch.equal(half.theta, plain.theta)


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("sizes", [SMALL, NO_Q_RANK], ids=["q rank", "no q rank"])
@pytest.mark.parametrize("absorb", [True, False])
def test_equals_hugging_face(rope, sizes, absorb):
    long = Yarn(40, 64, mscale=0.707) if rope else None
    config, theirs = theirs_for(sizes, rope)
    ours = layer(sizes, long)
    theirs.load_state_dict(ours.state_dict())
    rotary, x = DeepseekV3RotaryEmbedding(config), stream(2, 9, 32)
    factor = long.of_tables if long else 1.0
    at = torch.arange(9)
    torch.testing.assert_close(rotary.inv_freq.double(), ours.theta, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor)
    assert theirs.scaling == pytest.approx(ours.scale)
    cos, sin = half_split(*tables(at, ours.theta, torch.float64, factor))
    wanted = theirs(x, (cos, sin), None)[0]
    near(ours(x, absorb=absorb), wanted)
    # token by token, each with its own cache, which holds latents and rotary keys alone
    cache, their_cache = LatentCache(2, 6, 4, sizes.row, dtype=torch.float64), DynamicCache(config=config)
    for t in range(9):
        now = slice(t, t + 1)
        step = theirs(x[:, now], (cos[:, now], sin[:, now]), None, past_key_values=their_cache)[0]
        near(ours(x[:, now], cache, absorb=absorb), step)
        near(step, wanted[:, now])
    held = their_cache.layers[0]
    rows = cache.read()
    near(rows[..., : sizes.latent], held.keys[:, 0])
    order = [*range(0, sizes.rope, 2), *range(1, sizes.rope, 2)]  # they keep the pairs' halves apart
    near(rows[..., sizes.latent :][..., order], held.values[:, 0])


def test_float32_with_their_own_rotary_embedding():
    config, _ = theirs_for(SMALL, YARN)
    ours = layer(long=Yarn(40, 64, mscale=0.707))
    theirs = DeepseekV3Attention(config, 0)  # with its own norms
    theirs.load_state_dict(ours.state_dict())
    theirs, ours, x = theirs.float(), ours.float(), stream(1, 50, 32).float()
    wanted = theirs(x, DeepseekV3RotaryEmbedding(config)(x, torch.arange(50)[None]), None)[0]
    torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([1, 3, 16]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_chunks_equal_the_whole(chunks, page, absorb):
    total = sum(chunks)
    x, module = stream(2, total, 32, seed=total), layer()
    cache = LatentCache(2, 40, page, SMALL.row, dtype=torch.float64)
    parts = [module(part, cache, absorb=absorb) for part in x.split(chunks, 1)]
    near(torch.cat(parts, 1), module(x, absorb=not absorb)) if total else None
    assert cache.lengths.tolist() == [[total, total]]


def test_ragged_batches_and_padding():
    x, module = stream(3, 5, 32), layer()
    counts = torch.tensor([5, 0, 3])
    cache = LatentCache(3, 9, 4, SMALL.row, dtype=torch.float64)
    out = module(x, cache, counts)
    near(out[2, :3], module(x[2:, :3])[0])
    assert not out[1].any()
    assert not out[2, 3:].any()
    cache.free(0)
    assert cache.lengths.tolist() == [[0, 0, 3]]
    near(module(x[2:, 3:4].expand(3, 1, 32), cache, torch.tensor([0, 0, 1]))[2], module(x[2:, :4])[0, 3:])


def test_layers_do_not_see_each_other():
    torch.manual_seed(0)
    layers = [LatentAttention(NO_Q_RANK, layer=i).double() for i in range(2)]
    x, cache = stream(1, 4, 32), LatentCache(1, 1, 8, NO_Q_RANK.row, layers=2, dtype=torch.float64)
    for module in layers:
        steps = [module(x[:, t : t + 1], cache) for t in range(4)] if module.layer == 1 else [module(x, cache)]
        near(torch.cat(steps, 1), module(x))


def test_gradients():
    module, x = layer(NO_Q_RANK), stream(1, 3, 32).requires_grad_()
    for absorb in (True, False):
        assert torch.autograd.gradcheck(lambda x, a=absorb: module(x, absorb=a), x)
    grads = [torch.autograd.grad(module(x, absorb=a).sin().sum(), list(module.parameters())) for a in (True, False)]
    for a, b in zip(*grads, strict=True):
        near(a, b)
    assert all(g.abs().max() > 0 for g in grads[0])


@pytest.mark.parametrize("attend", [attend_absorbed, attend_rebuilt])
def test_a_nan_stays_in_its_own_sequence_and_head(attend):
    q, q_r, rows, up = stream(2, 3, 1, 8), stream(2, 3, 1, 4), stream(2, 5, 16), stream(3, 18, 12)
    q[0, 1] = torch.nan
    seen = torch.ones(2, 1, 5, dtype=torch.bool)
    out = attend(q, q_r, rows, up, 0.3, seen)
    assert out[0, 1].isnan().all()
    assert not out[1].isnan().any()
    assert not out[0, [0, 2]].isnan().any()


def test_no_tokens_and_no_sequences():
    module = layer()
    assert module(stream(2, 0, 32)).shape == (2, 0, 32)
    assert module(stream(0, 3, 32)).shape == (0, 3, 32)
    cache = LatentCache(2, 4, 4, SMALL.row, dtype=torch.float64)
    assert module(stream(2, 0, 32), cache).shape == (2, 0, 32)


def cache_of(width=SMALL.row, dtype=torch.float64, batch=1):
    return LatentCache(batch, 2, 4, width, dtype=dtype)


BAD = [
    (lambda: Sizes(32, 0, 12, 8, 4, 10), "must be at least 1"),
    (lambda: Sizes(32, 2, 12, 8, 3, 10), "rope must be even"),
    (lambda: Sizes(32, 2, 12, 8, 4, 10, 0), "q_rank"),
    (lambda: V3.elements_per_token("GQA"), "one of"),
    (lambda: layer()(stream(1, 3, 31)), r"x must be \[B, S, 32\]"),
    (lambda: layer()(stream(3, 32)), r"x must be \[B, S, 32\]"),
    (lambda: layer()(stream(1, 3, 32), counts=torch.tensor([4])), "counts must be"),
    (lambda: layer()(stream(1, 3, 32), cache_of(12)), r"rows \[1, S, 12\]"),
    (lambda: layer()(stream(2, 3, 32), cache_of()), "counts|batch|rows"),
    (lambda: layer()(stream(1, 3, 32), cache_of(dtype=torch.float32)), "holds torch.float32"),
    (lambda: layer()(stream(1, 9, 32), cache_of()), "out of pages"),
    (lambda: cache_of().free(1), "no 1"),
    (lambda: LatentAttention(SMALL, long=Yarn(0.5, 64)), "at least 1"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_refused_append_leaves_the_cache_as_it_was():
    module, cache, x = layer(), cache_of(), stream(1, 12, 32)
    module(x[:, :6], cache)
    before = cache.read().clone()
    with pytest.raises(ValueError, match="out of pages"):
        module(x[:, 6:], cache)
    assert torch.equal(cache.read(), before)
    near(module(x[:, 6:8], cache), module(x[:, :8])[:, 6:])


# --- factors and product


def test_the_product_has_more_numbers_and_goes_elsewhere():
    assert elements(V3) == {"scores": (33_554_432, 100_663_296), "output": (125_829_120, 469_762_048)}
    up_q, up_k = stream(3, 10), stream(3, 8, seed=1)
    target = stream(10, 8, seed=2)
    pair = descend([up_q, up_k], lambda a, b: a.T @ b, target, 200, 0.01)
    one = descend([up_q.T @ up_k], lambda m: m, target, 200, 0.01)
    near(pair[0], one[0])
    g = pair[0] - target  # the first step by hand
    near(pair[1], (up_q - 0.01 * up_k @ g.T).T @ (up_k - 0.01 * up_q @ g))
    near(one[1], one[0] - 0.01 * g)
    assert torch.linalg.matrix_rank(pair[-1]) == 3
    assert torch.linalg.matrix_rank(one[-1]) == 8
