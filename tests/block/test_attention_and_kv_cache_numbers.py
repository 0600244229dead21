"""Head arithmetic and the cache calculator against published tables and Hugging Face's own models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV3Config, GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

from llmbook.block.attention_and_kv_cache.cache import StaticCache
from llmbook.block.attention_and_kv_cache.calculator import (
    MODELS,
    devices_for_weights,
    kv_bytes,
    sequences_that_fit,
    with_other_heads,
)
from llmbook.block.attention_and_kv_cache.heads import Heads, Local, places


def test_the_notes_example():
    assert Heads(512, 8, 4).local(2) == Local(4, 2, 2, 64, 1)


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_every_query_head_lives_once_beside_its_kv_head(kv_heads, group, devices):
    heads = Heads(4, kv_heads * group, kv_heads, 2)
    if heads.heads % devices:
        with pytest.raises(ValueError, match="do not divide among"):
            places(heads, devices)
        return
    if kv_heads % devices and devices % kv_heads:
        with pytest.raises(ValueError, match="one must be a multiple"):
            places(heads, devices)
        return
    everywhere, share = places(heads, devices), heads.local(devices)
    assert [q for place in everywhere for q in place.query_heads] == list(range(heads.heads))
    for place in everywhere:
        assert {q // group for q in place.query_heads} == set(place.kv_heads)
        assert len(place.kv_heads) == share.n_local_kv_heads
        assert len(place.query_heads) == share.n_local_heads == share.n_rep * share.n_local_kv_heads
    for head in range(kv_heads):
        assert sum(head in place.kv_heads for place in everywhere) == share.copies


@pytest.mark.parametrize(("sizes", "words"), [
    ((512, 8, 3), "8 query heads cannot share 3 KV heads evenly"),
    ((512, 7, 7), "a width of 512 does not divide into 7 heads"),
    ((512, 0, 1), "must be at least 1"),
    ((512, 8, 0), "must be at least 1"),
    ((24, 8, 8), "head_dim must be even"),
    ((512, 8, 8, -2), "head_dim must be even"),
])
def test_heads_that_do_not_divide_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        Heads(*sizes)


@pytest.mark.parametrize(("devices", "words"), [
    (0, "do not divide among 0"), (5, "12 query heads do not divide among 5"), (4, "6 KV heads and 4 devices"),
])
def test_devices_that_do_not_divide_are_refused(devices, words):
    with pytest.raises(ValueError, match=words):
        Heads(96, 12, 6).local(devices)


@pytest.mark.parametrize(("name", "kilobytes", "kind"), [
    ("DeepSeek-V3", 70.272, "MLA"), ("Qwen-2.5-72B", 327.680, "GQA"), ("Llama-3.1-405B", 516.096, "GQA"),
])
def test_the_bytes_per_token_that_deepseek_published(name, kilobytes, kind):
    assert MODELS[name].bytes_per_token() == pytest.approx(1000 * kilobytes, abs=0)
    assert MODELS[name].kind == kind


def test_llama_2_70b_by_hand_and_its_pieces():
    model = MODELS["Llama-2-70B"]
    assert model.bytes_per_token() == 2 * 80 * 8 * 128 * 2
    assert [model.bytes_per_token(n) for n in (2, 8, 16, 64)] == [163_840, 40_960, 40_960, 40_960]
    assert MODELS["DeepSeek-V3"].bytes_per_token(8) == 70_272
    assert MODELS["Llama-2-7B"].kind == "MHA"
    assert MODELS["Gemma-2B"].kind == "MQA"


def llama(layers, dim, heads, kv_heads, ffn, vocab):
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=vocab,
    )


CONFIGS = {
    "Llama-2-7B": llama(32, 4096, 32, 32, 11_008, 32_000),
    "Llama-2-70B": llama(80, 8192, 64, 8, 28_672, 32_000),
    "Llama-3-8B": llama(32, 4096, 32, 8, 14_336, 128_256),
    "Llama-3-70B": llama(80, 8192, 64, 8, 28_672, 128_256),
    "Llama-3.1-405B": llama(126, 16_384, 128, 8, 53_248, 128_256),
    "Qwen-2.5-72B": Qwen2Config(
        num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=29_568, vocab_size=152_064, tie_word_embeddings=False,
    ),
    "Qwen3-32B": Qwen3Config(
        num_hidden_layers=64, hidden_size=5120, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
        intermediate_size=25_600, vocab_size=151_936, tie_word_embeddings=False,
    ),
    "Gemma-2B": GemmaConfig(
        num_hidden_layers=18, hidden_size=2048, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
        intermediate_size=16_384, vocab_size=256_000,
    ),
    "DeepSeek-V3": DeepseekV3Config(),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_parameters_are_those_of_hugging_faces_models(name):
    config, model = CONFIGS[name], MODELS[name]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    gate_bias = 58 * 256 if name == "DeepSeek-V3" else 0  # a buffer there, a trained number in the paper
    assert sum(p.numel() for p in built.parameters()) + gate_bias == model.parameters
    assert (config.num_hidden_layers, config.num_attention_heads) == (model.layers, model.attention.heads)
    if not model.latent:
        projection = built.model.layers[0].self_attn.k_proj
        assert projection.out_features == model.attention.kv_heads * model.attention.head_dim
    else:
        assert model.latent == config.kv_lora_rank + config.qk_rope_head_dim


@given(st.sampled_from(list(MODELS)), st.integers(0, 4), st.integers(0, 300))
def test_kv_bytes_are_those_of_a_cache_that_is_made(name, batch, tokens):
    model = MODELS[name]
    if model.latent:
        assert kv_bytes(model, batch, tokens) == batch * tokens * model.layers * 576 * 2
        return
    a = model.attention
    cache = StaticCache(
        batch, a.kv_heads, tokens, a.head_dim, layers=model.layers, dtype=torch.bfloat16, device="meta"
    )
    assert kv_bytes(model, batch, tokens) == cache.k.nbytes + cache.v.nbytes


def test_what_fits_is_the_most_that_fits():
    for name, model in MODELS.items():
        for devices in (1, 8, 16):
            if model.attention.heads % devices:
                continue
            n, left = sequences_that_fit(model, 8192, 80e9, devices), 80e9 - 2 * model.parameters / devices
            assert n == 0 or kv_bytes(model, n, 8192, devices) <= left, name
            assert kv_bytes(model, n + 1, 8192, devices) > left
    assert sequences_that_fit(MODELS["Llama-3-8B"], 8192, 80e9) == 59
    assert sequences_that_fit(MODELS["Llama-3-70B"], 8192, 80e9) == 0


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="batch and tokens count things"):
        kv_bytes(MODELS["Llama-3-8B"], -1, 5)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        sequences_that_fit(MODELS["Llama-3-8B"], 0, 80e9)


def test_the_fewest_gpus_that_hold_the_weights_and_the_other_heads():
    assert {name: devices_for_weights(model, 80e9) for name, model in MODELS.items()} == {
        "Llama-2-7B": 1, "Llama-2-70B": 2, "Llama-3-8B": 1, "Llama-3-70B": 2, "Llama-3.1-405B": 16, "Qwen-2.5-72B": 4,
        "Qwen3-32B": 1, "Gemma-2B": 1, "DeepSeek-V3": 32,
    }
    for name, model in MODELS.items():
        forms = with_other_heads(model)
        assert [form.kind for form in forms.values()] == ["MHA", "GQA", "MQA", "MLA"]
        assert model in forms.values(), name
