"""The assembled Llama against Hugging Face's, whole and token by token, and its counts against what runs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llmbook.block.attention_and_kv_cache.cache import PagedCache
from llmbook.block.llama.config import PUBLISHED, Config, Longer, from_hugging_face, swiglu_width, to_hugging_face
from llmbook.block.llama.counts import forward_flop, kv_bytes, parameters, times, training_flop, walk
from llmbook.block.llama.model import Llama, SwiGLU
from llmbook.foundations.tokens_to_logits.tracer import Tracer

SMALL = Config(40, 32, 3, 4, 2, 48, theta=500.0, eps=1e-6, context=64)
ODD = Config(17, 24, 1, 3, 1, 40, context=32, tied=True)
WIDE_HEADS = Config(29, 24, 2, 6, 3, 8, context=32, head_dim=10)
MHA = Config(23, 16, 2, 4, 4, 32, context=32)
SHAPES = (SMALL, ODD, WIDE_HEADS, MHA)


def pair(c, dtype=torch.float64, seed=0):
    """Our model, and Hugging Face's with the same weights, norms' gains random too."""
    torch.manual_seed(seed)
    ours = Llama(c).to(dtype)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    theirs = LlamaForCausalLM(LlamaConfig(**to_hugging_face(c))).to(dtype)
    theirs.model.rotary_emb.inv_freq = ours.model.layers[0].self_attn.theta.clone()
    missing = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not missing.missing_keys
    return ours, theirs.eval()


def ids_for(c, B=2, S=19, seed=1):
    return torch.randint(c.vocab, (B, S), generator=torch.Generator().manual_seed(seed))


def in_float64(theirs, theta):
    """Hugging Face's model without its roundings to float32: PyTorch's RMSNorm, and angles in float64."""

    def exact_angles(x, position_ids):
        angle = (position_ids[..., None].double() * theta).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    for name, norm in list(theirs.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
            exact.weight = norm.weight
            theirs.set_submodule(name, exact)
    theirs.model.rotary_emb.forward = exact_angles
    return theirs


@pytest.mark.parametrize("c", SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_logits_and_gradients_equal_hugging_faces(c, dtype, close):
    ours, theirs = pair(c, dtype)
    if dtype == torch.float64:
        theirs = in_float64(theirs, ours.model.layers[0].self_attn.theta)
    ids = ids_for(c)
    a, b = ours(ids), theirs(ids).logits
    torch.testing.assert_close(a, b, rtol=0, atol=close * float(b.detach().abs().max()))
    a.logsumexp(-1).sum().backward()
    b.logsumexp(-1).sum().backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, mine in ours.named_parameters():
        assert float((mine.grad - wanted[name]).norm() / wanted[name].norm()) < 100 * close, name


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(SHAPES), st.booleans())
def test_a_cache_filled_in_any_chunks_gives_the_logits_of_the_whole(chunks, c, paged):
    ours, _ = pair(c)
    ids = ids_for(c, 2, sum(chunks))
    cache = ours.cache(2)
    if paged:
        cache = PagedCache(2, c.kv_heads, 32, 3, c.head_dim, layers=c.layers, dtype=torch.float64)
    with torch.no_grad():
        parts = [ours(part, cache) for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), ours(ids), rtol=1e-10, atol=1e-10)


def test_cached_logits_equal_hugging_faces_token_by_token():
    ours, theirs = pair(SMALL)
    ids, cache, past = ids_for(SMALL), ours.cache(2), None
    for i in range(ids.shape[1]):
        with torch.no_grad():
            a = ours(ids[:, i : i + 1], cache)
            out = theirs(ids[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        torch.testing.assert_close(a, out.logits, rtol=1e-5, atol=1e-5)


def test_padded_rows_are_as_if_alone():
    ours, _ = pair(SMALL)
    ids, counts = ids_for(SMALL, 3, 9), torch.tensor([9, 4, 1])
    cache = ours.cache(3)
    with torch.no_grad():
        whole = ours(ids, cache, counts)
        more = ours(ids[:, :2], cache)
        for b, n in enumerate(counts):
            alone = ours(torch.cat((ids[b : b + 1, :n], ids[b : b + 1, :2]), 1))
            torch.testing.assert_close(torch.cat((whole[b, :n], more[b])), alone[0], rtol=1e-10, atol=1e-10)


def test_swiglu_has_hugging_faces_gradient():
    torch.manual_seed(0)
    mlp = SwiGLU(4, 6).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, x)
    gate, up, down = (w.weight for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = x @ gate.T
    torch.testing.assert_close(mlp(x), (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T)


def test_nothing_of_the_future_leaks():
    ours, _ = pair(SMALL)
    ids = ids_for(SMALL, 1)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % SMALL.vocab
    a, b = ours(ids), ours(other)
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_a_half_precision_model_keeps_its_angles():
    theta = Llama(SMALL).to(torch.bfloat16).model.layers[0].self_attn.theta
    assert theta.dtype == torch.float64
    assert torch.equal(theta, Llama(SMALL).model.layers[0].self_attn.theta)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    c = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = Llama(c), LlamaForCausalLM(LlamaConfig(**to_hugging_face(c)))
    count = sum(p.numel() for p in ours.parameters())
    assert count == parameters(c) == theirs.num_parameters()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    # The totals on the models' pages, in 10⁹.
    published = {"Llama-2-7B": 6.74, "Llama-2-70B": 68.98, "Llama-3-8B": 8.03, "Llama-3-70B": 70.55}
    assert round(count / 1e9, 2) == published.get(name, 405.85)


@pytest.mark.parametrize(("name", "multiple", "factor"), [
    ("Llama-2-7B", 256, 1), ("Llama-2-70B", 4096, 1.3), ("Llama-3-8B", 1024, 1.3), ("Llama-3-70B", 4096, 1.3),
    ("Llama-3.1-405B", 4096, 1.2),
])
def test_published_swiglu_widths_follow_metas_rule(name, multiple, factor):
    c = PUBLISHED[name]
    assert swiglu_width(c.dim, multiple, factor) == c.ffn


@pytest.mark.parametrize("c", SHAPES)
@pytest.mark.parametrize("past", [0, 5])
def test_every_point_of_the_walk_is_what_runs(c, past):
    ours, (B, S) = Llama(c), (2, 3)
    cache = ours.cache(B)
    with torch.no_grad():
        ours(ids_for(c, B, past), cache)
        with Tracer(ours) as log:
            ours(ids_for(c, B, S), cache)
    assert log.flop == forward_flop(c, B, S, past)
    calls = {call.module: call for call in log.calls}
    for p in walk(c, B, S, past):
        if not p.module or p.name in ("RoPE", "scores", "softmax · V", "SiLU · up"):
            continue
        path = p.module if p.module == "lm_head" else f"model.{p.module}"
        path = f"model.layers.0.{p.module}" if p.in_block else path
        assert calls[path].outputs[0].shape == p.out
        assert sum(op.flop for op in log.ops if op.module == path) == p.flop
        if not (c.tied and path == "lm_head"):
            assert sum(w.numel() for w in ours.get_submodule(path).parameters()) == p.weights
    inner = [p for p in walk(c, B, S, past) if p.module == "self_attn"]
    assert sum(op.flop for op in log.ops if op.module == "model.layers.0.self_attn") == sum(p.flop for p in inner)
    assert cache.k.nbytes + cache.v.nbytes == kv_bytes(c, B * c.context, 4)
    assert sum(times(c, p) * p.weights for p in walk(c, 1, 1)) == parameters(c)


@pytest.mark.parametrize("c", SHAPES)
def test_training_flop_is_what_forward_and_backward_run(c):
    ours, (B, S) = Llama(c), (2, 7)
    with Tracer(ours) as log:
        ours(ids_for(c, B, S)).sum().backward()
    assert log.flop == training_flop(c, B, S)
    multiplying = parameters(c) - c.dim * (2 * c.layers + 1) - (0 if c.tied else c.vocab * c.dim)
    attention = 12 * B * S * S * c.heads * c.head_dim * c.layers
    assert log.flop == 6 * multiplying * B * S + attention


def test_llama_3_1s_stretched_context_is_hugging_faces():
    c = Config(40, 64, 2, 2, 1, 48, theta=500.0, context=512, longer=Longer(factor=8.0, trained=64))
    theirs = LlamaForCausalLM(LlamaConfig(**to_hugging_face(c)))
    angles = theirs.model.rotary_emb.inv_freq
    ours, _ = pair(c, torch.float32)
    theirs.load_state_dict(ours.state_dict())
    theta = ours.model.layers[0].self_attn.theta
    torch.testing.assert_close(angles.double(), theta, rtol=1e-6, atol=0)
    plain = Llama(replace(c, longer=None))
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(40, (1, 400))
    with torch.no_grad():
        a, b, other = ours(ids), theirs(ids).logits, plain(ids)
    scale = float(b.abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * scale)
    assert (a - other).abs().max() > 0.1 * scale


@pytest.mark.parametrize("c", [*SHAPES, *PUBLISHED.values()])
def test_config_there_and_back(c):
    assert from_hugging_face(to_hugging_face(c)) == c
    assert from_hugging_face(LlamaConfig(**to_hugging_face(c)).to_dict()) == c


def test_an_old_config_is_read():
    fields = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
              "num_attention_heads": 32, "intermediate_size": 11008, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 4096, "rope_scaling": None}
    assert from_hugging_face(fields) == PUBLISHED["Llama-2-7B"]


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but this Llama knows 'silu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"model_type": "mistral"}, "model_type = 'mistral'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "its RoPE lacks high_freq_factor"),
    ({"vocab_size": None}, "lacks vocab_size"),
])
def test_a_foreign_config_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_hugging_face(to_hugging_face(SMALL) | change)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 5}, "5 query heads cannot share 2"), ({"kv_heads": 3}, "cannot share 3 KV heads evenly"),
    ({"dim": 30}, "width of 30 does not divide"), ({"layers": 0}, "layers must be at least 1, not 0"),
    ({"context": 0}, "context must be at least 1"),
])
def test_sizes_that_do_not_go_together_are_refused(change, words):
    fields = {"vocab": 40, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 48}
    with pytest.raises(ValueError, match=words):
        Config(**(fields | change))


def test_ids_that_cannot_be_read_are_refused():
    ours = Llama(SMALL)
    with pytest.raises(ValueError, match=r"whole numbers \[B, S\], not torch.float32"):
        ours(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"not torch.int64 of shape \[3\]"):
        ours(torch.zeros(3, dtype=torch.int64))
    for bad in (40, -1):
        with pytest.raises(ValueError, match=rf"token {bad} is not in \[0, 40\)"):
            ours(torch.tensor([[3, bad]]))
    with pytest.raises(ValueError, match="need 65 positions, but the model has 64"):
        ours(torch.zeros(1, 65, dtype=torch.int64))
    cache = ours.cache(1, 100)
    ours(torch.zeros(1, 60, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="60 tokens in the cache and 5 new ones need 65"):
        ours(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_no_tokens_and_no_sequences_give_no_logits():
    ours = Llama(SMALL)
    assert ours(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 40)
    assert ours(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 40)
