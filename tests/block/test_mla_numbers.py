"""Counted FLOPs and bytes against the closed forms, and published numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config

from llmbook.block.attention_and_kv_cache.calculator import MODELS
from llmbook.block.mla.attention import LatentAttention, Yarn
from llmbook.block.mla.cost import (
    FORMS,
    absorbed_is_cheaper,
    cheaper_below,
    faster_below,
    flop,
    intensity,
    least_time,
    traffic,
)
from llmbook.block.mla.counting import count
from llmbook.block.mla.sizes import PUBLISHED, V2, V2_LITE, V3, Sizes
from llmbook.foundations.tokens_to_logits.tracer import Tracer
from llmbook.kit.hardware import gpu

ODD = Sizes(7, 3, 11, 5, 2, 13)
# Widths of at least 2: einsum multiplies vectors of one element without a matrix product.
widths = st.builds(
    Sizes, st.just(16), st.integers(1, 5), st.integers(2, 40), st.integers(2, 20), st.sampled_from([2, 4]),
    st.integers(2, 20),
)


@given(widths, st.integers(1, 6), st.integers(1, 40), st.integers(1, 3), st.sampled_from(FORMS[:2]))
@settings(max_examples=20, deadline=None)
def test_counted_equals_the_closed_forms(s, queries, more, batch, form):
    keys = queries + more
    counted = count(s, form, queries, keys, batch)
    assert counted.flop == sum(flop(s, form, queries, keys, batch).values())
    moved = traffic(s, form, queries, keys, batch, 8)
    # Plain PyTorch reads the latent a second time, as the value; a kernel does not.
    again = 8 * batch * keys * s.latent if form == "absorbed" else 0
    assert counted.bytes == sum(moved.values()) + again


def test_the_published_layer_counted_without_its_memory():
    """DeepSeek-V3's own module on the meta device: no weights, but all its operations."""
    with torch.device("meta"):
        module = LatentAttention(V3)
        x = torch.empty(1, 256, V3.dim)
        for absorb in (True, False):
            with Tracer(module) as log:
                module(x, absorb=absorb)
            around = 2 * 256 * sum(
                m.weight.numel() for name, m in module.named_modules()
                if isinstance(m, nn.Linear) and name != "kv_b_proj"
            )
            form = "absorbed" if absorb else "rebuilt"
            assert log.flop == around + sum(flop(V3, form, 256, 256).values())


def test_bytes_per_token_that_deepseek_published():
    assert 2 * V3.elements_per_token() == 70_272 == MODELS["DeepSeek-V3"].bytes_per_token()
    assert V2.elements_per_token() == 34_560
    assert V2.elements_per_token("MHA") == 1_966_080
    assert V2.like_gqa == V3.like_gqa == 2.25
    assert V2_LITE.elements_per_token() == 27 * 576


def test_widths_are_hugging_faces_defaults():
    c = DeepseekV3Config()
    assert Sizes(
        c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        c.q_lora_rank, c.num_hidden_layers,
    ) == V3
    c = DeepseekV2Config()
    assert (V2.latent, V2.nope, V2.rope, V2.v, V2.q_rank) == (
        c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.q_lora_rank,
    )


def test_the_softmax_scale():
    with torch.device("meta"):
        assert LatentAttention(V3).scale == 192**-0.5
        stretched = LatentAttention(V3, long=Yarn(40, 4096)).scale
    assert stretched == pytest.approx(192**-0.5 * 1.3688879454113936**2)  # (0.1 ln 40 + 1)², DeepSeek's own code


@given(widths, st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_the_crossover_is_where_the_flops_cross(s, keys):
    border = cheaper_below(s, keys)
    for queries in (1, 2, 5, 17, 100, 170, 171, 172, 5000):
        if abs(queries - border) > 1e-9 * border:
            assert absorbed_is_cheaper(s, queries, keys) == (queries < border)


def test_crossovers_of_deepseek():
    assert cheaper_below(V3, 10**9) == pytest.approx(131_072 / 768, rel=1e-5)
    assert not absorbed_is_cheaper(V3, 1, 1)
    assert absorbed_is_cheaper(V3, 1, 2)
    assert absorbed_is_cheaper(V3, 163, 4096)
    assert not absorbed_is_cheaper(V3, 164, 4096)
    assert cheaper_below(V3, 0) == 0
    assert cheaper_below(Sizes(8, 1, 4, 8, 2, 8), 10**9) == float("inf")  # a latent no wider than what it replaces
    for S in (1, 17, 4096):  # a whole prompt is never cheaper absorbed
        assert not absorbed_is_cheaper(V3, S, S)


@pytest.mark.parametrize("rival", ["rebuilt", "kept"])
@pytest.mark.parametrize(("keys", "batch"), [(128, 1), (1024, 8), (4096, 1), (4096, 64), (131_072, 8)])
def test_the_roofline_crosses_once_and_there(keys, batch, rival):
    chip = gpu("H100 SXM")
    border = faster_below(V3, keys, batch, chip, rival)
    for queries in [*range(1, 400), 600, 1000, 4095]:
        lead = least_time(V3, "absorbed", queries, keys, batch, chip) < least_time(
            V3, rival, queries, keys, batch, chip
        )
        assert lead == (queries < border), queries


def test_intensity_by_hand():
    assert intensity(V3, "absorbed", 1, 4096) == pytest.approx(128 * 1088 / 576)
    assert intensity(V3, "kept", 1, 4096) == pytest.approx(1)
    assert intensity(V3, "absorbed", 1, 9) < gpu("H100 SXM").ridge < intensity(V3, "absorbed", 2, 9)


def test_an_unknown_form_is_refused():
    for call in (flop, traffic):
        with pytest.raises(ValueError, match="form is one of"):
            call(ODD, "merged", 1, 1)
    with pytest.raises(ValueError, match="form is one of"):
        count(ODD, "kept", 1, 1)


def test_published_models():
    assert [s.row for s in PUBLISHED.values()] == [576, 576, 576]
