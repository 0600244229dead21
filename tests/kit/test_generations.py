"""The table of generations, and that every chapter's tiles follow it."""

import itertools

import pytest

from llmbook.block.attention_and_kv_cache import kernel as split_kv
from llmbook.block.deepseek_moe.kernel import tiles_for as moe
from llmbook.block.mla.tiles import tiles_for as mla
from llmbook.gpu.attention_on_the_roofline.tiles import tiles_for as decode
from llmbook.gpu.flash_attention.kernel import block_rows
from llmbook.gpu.flash_attention_2.tiles import tiles_for as flash_2
from llmbook.kit import ahead
from llmbook.kit.generations import FAMILIES, KNOWN, family, generation
from llmbook.kit.hardware import GPUS, SHARED_PER_BLOCK


def test_shared_memory_is_the_programming_guides():
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", KiB per thread block."""
    guide = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
    assert {sm: generation(sm).shared // 1024 for sm in KNOWN} == guide
    assert all(g.sm in KNOWN and generation(g.sm).bf16 == g.bf16 for g in GPUS)


@pytest.mark.parametrize("sm", [*range(70, 76), *range(80, 130)])
def test_no_gpu_takes_the_tiles_of_one_that_has_more(sm):
    of, model = generation(sm), generation(family(sm))
    assert family(sm) in FAMILIES
    assert of.shared >= model.shared
    assert of.shared <= SHARED_PER_BLOCK.get(sm, 99 * 1024)
    assert of.product == model.product
    if sm not in KNOWN:
        assert family(sm) == (75 if sm < 80 else 89)


def test_what_a_generation_has():
    assert [generation(sm).product for sm in (75, 80, 86, 90, 100, 103, 120)] == [
        "", "mma.sync", "mma.sync", "wgmma", "tcgen05", "tcgen05", "mma.sync"
    ]
    assert [generation(sm).tma for sm in (75, 89, 90, 100, 120)] == [False, False, True, True, True]
    assert [generation(sm).bf16 for sm in (75, 80, 120)] == [False, True, True]
    with pytest.raises(ValueError, match=r"kernels need compute capability 7.0 or newer, and this GPU has 6.1"):
        generation(61)


def test_a_gpu_that_is_like_another_takes_its_tiles_in_every_chapter():
    def every(sm):
        return [
            [split_kv.tiles(d, rows, sm) for d, rows in itertools.product((64, 128, 256), (16, 64))],
            split_kv.most_rows(128, sm),
            [mla(heads, element, sm) for heads, element in itertools.product((1, 16, 128), (2, 4))],
            [moe(kind, size, sm, 32) for kind, size in itertools.product(("grouped", "weight"), (2, 4))],
            [decode("packed", d, 16, sm) for d in (64, 128, 576)],
            [block_rows(d, sm) for d in (64, 128, 256)],
            [flash_2(kind, d, sm) for kind, d in itertools.product(("forward", "dkdv", "dq"), (64, 128, 256))],
        ]

    for sm, like in ((70, 75), (86, 89), (87, 80), (103, 100), (110, 89), (120, 89), (121, 89), (130, 89)):
        assert every(sm) == every(like), sm
    assert len({str(every(sm)) for sm in FAMILIES}) == len(FAMILIES)
    assert set(FAMILIES) | {120} == set(ahead.TARGETS)
