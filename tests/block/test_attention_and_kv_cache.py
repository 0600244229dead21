"""Attention with and without a cache against PyTorch and Hugging Face; caches against each other; head arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig
from transformers import StaticCache as TheirStaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from llmbook.block.attention_and_kv_cache import cost
from llmbook.block.attention_and_kv_cache.attention import Attention, attend, visible
from llmbook.block.attention_and_kv_cache.cache import PagedCache, StaticCache
from llmbook.block.attention_and_kv_cache.heads import Heads
from llmbook.block.rope.rotation import tables

GQA = Heads(24, 6, 2, 8)
SHAPES = [Heads(24, 4, 4), Heads(24, 4, 1), GQA]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def module(heads, seed=0):
    torch.manual_seed(seed)
    return Attention(heads).double()


def static(batch, heads, room=40, dtype=torch.float64, layers=1):
    return StaticCache(batch, heads.kv_heads, room, heads.head_dim, dtype=dtype, layers=layers)


def paged(batch, heads, pages=64, page=3, dtype=torch.float64, layers=1):
    return PagedCache(batch, heads.kv_heads, pages, page, heads.head_dim, dtype=dtype, layers=layers)


MADE = {"static": static, "paged": paged}


# Attention alone


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 9), (1, 1), (0, 4), (3, 0)])
def test_attend_equals_sdpa(heads, batch, tokens):
    q = randn(batch, heads.heads, tokens, heads.head_dim)
    k, v = (randn(batch, heads.kv_heads, tokens, heads.head_dim, seed=s) for s in (1, 2))
    seen = visible(torch.zeros(batch).long(), torch.full((batch,), tokens), tokens, tokens)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, seen), theirs, rtol=0, atol=1e-12)


def test_a_continuation_is_causal_from_the_bottom_right():
    """SDPA's is_causal is from the top left: with more keys than queries it needs the mask itself."""
    q, k, v = randn(1, 6, 2, 8), randn(1, 2, 5, 8, seed=1), randn(1, 2, 5, 8, seed=2)
    seen = visible(torch.tensor([3]), torch.tensor([2]), 2, 5)
    assert seen.tolist() == [[[True] * 4 + [False], [True] * 5]]
    mine = attend(q, k, v, seen)
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    wrong = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)
    assert (mine - wrong).abs().max() > 0.1


def test_gradients_are_right_also_beside_padding():
    seen = visible(torch.tensor([0, 0]), torch.tensor([3, 0]), 3, 3)
    tensors = [randn(2, n, 3, 4, seed=n).requires_grad_() for n in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, seen), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    q, k, v = (randn(1, 2, 6, 8, seed=s).to(dtype) * 20 for s in range(3))
    seen = visible(torch.tensor([0]), torch.tensor([4]), 6, 6)
    out = attend(q, k, v, seen)
    assert out.isfinite().all()
    assert not out[:, :, 4:].any()


# Hugging Face


def theirs(heads):
    config = LlamaConfig(
        hidden_size=heads.dim, num_attention_heads=heads.heads, num_key_value_heads=heads.kv_heads,
        head_dim=heads.head_dim, num_hidden_layers=1, attn_implementation="sdpa",
    )
    return config, LlamaAttention(config, 0).double()


def test_the_angles_are_not_rounded_with_the_weights():
    heads = SHAPES[0]
    plain, half = module(heads), module(heads).bfloat16()
    assert half.q_proj.weight.dtype == torch.bfloat16
    assert half.theta.dtype == torch.float64
    assert torch.equal(half.theta, plain.theta)


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_equals_hugging_face_in_prefill_and_token_by_token(heads, kind):
    config, other = theirs(heads)
    ours = module(heads)
    ours.load_state_dict(other.state_dict())
    x, room = randn(2, 9, heads.dim), 12
    their_cache = DynamicCache(config=config) if kind == "dynamic" else TheirStaticCache(config, max_cache_len=room)
    our_cache = static(2, heads, room)
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 9))]:
        cos, sin = tables(torch.arange(start, end)[None], ours.theta, torch.float64)
        angles = cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)
        keys = end if kind == "dynamic" else room
        seen = torch.arange(keys) <= torch.arange(start, end)[:, None]
        mask = torch.zeros(1, 1, end - start, keys, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        right, _ = other(x[:, start:end], angles, mask, past_key_values=their_cache)
        torch.testing.assert_close(ours(x[:, start:end], our_cache), right, rtol=0, atol=1e-12)
    layer = their_cache.layers[0]
    for mine, their in zip(our_cache.read(), (layer.keys, layer.values), strict=True):
        torch.testing.assert_close(mine, their[:, :, :9], rtol=0, atol=1e-12)


def test_query_heads_share_as_repeat_kv_repeats():
    k = randn(1, 2, 3, 4)
    q, v, seen = randn(1, 6, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2), torch.ones(1, 3, 3, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, seen), attend(q, repeat_kv(k, 3), repeat_kv(v, 3), seen))


# Caches


@given(st.sampled_from(SHAPES), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from(list(MADE)))
@settings(max_examples=40, deadline=None)
def test_any_chunks_give_what_the_whole_gives(heads, chunks, kind):
    attention, x = module(heads), randn(2, sum(chunks), heads.dim)
    cache, parts = MADE[kind](2, heads), x.split(chunks, 1)
    out = torch.cat([attention(part, cache) for part in parts], 1)
    torch.testing.assert_close(out, attention(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("heads", SHAPES)
def test_cached_decode_equals_full_recompute_token_by_token(heads, kind):
    attention, x = module(heads), randn(2, 12, heads.dim)
    cache = MADE[kind](2, heads)
    attention(x[:, :4], cache)
    for t in range(4, 12):
        one, whole = attention(x[:, t : t + 1], cache), attention(x[:, : t + 1])
        torch.testing.assert_close(one[:, 0], whole[:, -1], rtol=0, atol=1e-12)


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_ragged_batch_gives_each_sequence_what_it_gets_alone(rounds):
    """Prefill, decode and nothing at all side by side; padding comes out as zeros, in both caches alike."""
    attention, caches = module(GQA), [static(3, GQA), paged(3, GQA)]
    counts = torch.tensor(rounds)
    x = [randn(int(n), 24, seed=b) for b, n in enumerate(counts.sum(0))]
    out = [[] for _ in x]
    done = torch.zeros(3).long()
    for new in counts:
        padded = randn(3, int(new.max()) + 1, 24, seed=9)  # padding holds noise
        for b in range(3):
            padded[b, : new[b]] = x[b][done[b] : done[b] + new[b]]
        one, other = (attention(padded, cache, new) for cache in caches)
        assert torch.equal(one, other)
        for b in range(3):
            out[b].append(one[b, : new[b]])
            assert not one[b, new[b] :].any()
        done += new
    for b, alone in enumerate(x):
        torch.testing.assert_close(torch.cat(out[b]), attention(alone[None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MADE)
def test_a_freed_place_is_as_good_as_new(kind):
    attention, cache = module(GQA), MADE[kind](2, GQA)
    attention(randn(2, 7, 24), cache)
    cache.free(0)
    assert cache.lengths.tolist() == [[0, 7]]
    fresh = randn(2, 5, 24, seed=3)
    out = attention(fresh, cache, torch.tensor([5, 0]))
    torch.testing.assert_close(out[:1], attention(fresh[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MADE)
def test_layers_share_lengths_of_their_own_and_one_page_table(kind):
    cache = MADE[kind](1, GQA, layers=2)
    layers = [module(GQA, seed) for seed in (0, 1)]
    layers[1].layer = 1
    x = randn(1, 6, 24)
    for part in x.split([4, 1, 1], 1):
        y = layers[0](part, cache)
        last = layers[1](y, cache)
    torch.testing.assert_close(last, layers[1](layers[0](x))[:, -1:], rtol=0, atol=1e-12)
    if kind == "paged":
        assert len(cache.pages.tables[0]) == 2


def test_a_cache_holds_no_gradient():
    cache = static(1, GQA)
    module(GQA)(randn(1, 3, 24), cache).sum().backward()
    assert not cache.k.requires_grad


def test_pages_are_handed_out_in_order_and_come_back():
    cache, attention = paged(2, GQA, pages=4, page=3), module(GQA)
    attention(randn(2, 4, 24), cache, torch.tensor([4, 1]))
    assert cache.pages.tables == [[0, 1], [2]]
    cache.free(0)
    attention(randn(2, 3, 24), cache, torch.tensor([0, 3]))
    assert cache.pages.tables == [[], [2, 0]]
    assert cache.page_table().tolist() == [[0, 0], [2, 0]]


class Pool(RuleBasedStateMachine):
    """Whatever comes, every page has one owner, and what was written is read back."""

    def __init__(self):
        super().__init__()
        self.cache = PagedCache(3, 1, 6, 2, 2, dtype=torch.float64)
        self.held = [[], [], []]
        self.written = 0

    @rule(counts=st.lists(st.integers(0, 5), min_size=3, max_size=3))
    def append(self, counts):
        k = self.written + torch.arange(3 * 5 * 2.0, dtype=torch.float64).view(3, 1, 5, 2)
        self.written += 30
        before = [list(table) for table in self.cache.pages.tables]
        pages = [-(-(len(held) + n) // 2) for held, n in zip(self.held, counts, strict=True)]
        if sum(pages) > 6:
            with pytest.raises(ValueError, match="out of pages"):
                self.cache.append(k, -k, torch.tensor(counts))
            assert self.cache.pages.tables == before
            return
        self.cache.append(k, -k, torch.tensor(counts))
        for b, n in enumerate(counts):
            self.held[b] += k[b, 0, :n].tolist()

    @rule(b=st.integers(0, 2))
    def free(self, b):
        self.cache.free(b)
        self.held[b] = []

    @invariant()
    def every_page_is_somewhere_once(self):
        everywhere = [page for table in self.cache.pages.tables for page in table] + self.cache.pages.unused
        assert sorted(everywhere) == list(range(6))
        k, v = self.cache.read()
        for b, held in enumerate(self.held):
            assert int(self.cache.lengths[0, b]) == len(held)
            assert k[b, 0, : len(held)].tolist() == held
            assert torch.equal(v, -k)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# What is refused


@pytest.mark.parametrize("kind", MADE)
def test_no_room_is_refused_and_nothing_is_written(kind):
    cache = static(2, GQA, room=4) if kind == "static" else paged(2, GQA, pages=3, page=2)
    attention = module(GQA)
    attention(randn(2, 2, 24), cache)
    before = [t.clone() for t in (cache.k, cache.v, cache.lengths)]
    words = "sequence 1 would hold 5 tokens" if kind == "static" else "out of pages: 3 more are needed and 1 are free"
    with pytest.raises(ValueError, match=words):
        attention(randn(2, 3, 24), cache, torch.tensor([1, 3]))
    for was, now in zip(before, (cache.k, cache.v, cache.lengths), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("kind", MADE)
def test_an_empty_batch_and_empty_sequences_are_defined(kind):
    attention = module(GQA)
    assert attention(randn(0, 5, 24), MADE[kind](0, GQA)).shape == (0, 5, 24)
    cache = MADE[kind](2, GQA)
    assert attention(randn(2, 0, 24), cache).shape == (2, 0, 24)
    assert not attention(randn(2, 3, 24), cache, torch.tensor([0, 0])).any()
    assert cache.read()[0].shape == (2, 2, 0, 8)
    if kind == "paged":
        assert cache.pages.tables == [[], []]


@pytest.mark.parametrize("kind", MADE)
def test_the_wrong_kind_of_keys_is_refused(kind):
    cache, counts = MADE[kind](2, GQA), torch.tensor([1, 1])
    good = randn(2, 2, 1, 8)
    for k, v in ((good[:1], good[:1]), (good[:, :1], good[:, :1]), (good, good[..., :4]), (good[0], good[0])):
        with pytest.raises(ValueError, match=r"k and v must both be \[2, 2, S, 8\]"):
            cache.append(k, v, counts)
    with pytest.raises(ValueError, match=r"the cache holds torch.float64"):
        cache.append(good.float(), good.float(), counts)
    for b in (-1, 2):
        with pytest.raises(ValueError, match="there are sequences 0 to 1"):
            cache.free(b)


@pytest.mark.parametrize("counts", [[1], [1, 4], [-1, 1], [0.5, 1.0]])
def test_counts_that_count_nothing_are_refused(counts):
    with pytest.raises(ValueError, match="counts must be 2 whole numbers from 0 to 3"):
        module(GQA)(randn(2, 3, 24), counts=torch.tensor(counts))


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        PagedCache(1, 1, 4, 0, 8)


# Cost


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize(("prompt", "new"), [(5, 7), (1, 1), (8, 3)])
def test_flops_are_the_closed_forms(heads, prompt, new):
    attention, x = module(heads), randn(1, prompt + new, heads.dim)
    with FlopCounterMode(display=False) as counted:
        cache = static(1, heads)
        attention(x[:, :prompt], cache)
        for t in range(prompt, prompt + new - 1):
            attention(x[:, t : t + 1], cache)
    assert counted.get_total_flops() == cost.generate_flop(heads, prompt, new, True)
    with FlopCounterMode(display=False) as counted:
        for end in range(prompt, prompt + new):
            attention(x[:, :end])
    assert counted.get_total_flops() == cost.generate_flop(heads, prompt, new, False)


def test_decode_bytes_are_those_of_what_is_read():
    cache = static(1, GQA, dtype=torch.bfloat16)
    k, v = cache.append(*2 * [randn(1, 2, 11, 8).bfloat16()], torch.tensor([11]))
    assert cost.decode_bytes(GQA, 11) == k.nbytes + v.nbytes
