"""The two-level model against closed forms and counted operations, the cache against a stack-distance oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmbook.gpu.attention_on_the_roofline import benchmark, exercises, figures, model
from llmbook.gpu.attention_on_the_roofline.at_scale import gain_replayed, replayed
from llmbook.gpu.attention_on_the_roofline.cache import L2, Program, Tile, counts, launch, replay
from llmbook.gpu.attention_on_the_roofline.model import (
    CHIPS,
    KINDS,
    MEASURED,
    NOTES,
    Attention,
    Cost,
    chip,
    cost,
    flops,
    gain,
    predicted,
    traffic,
)
from llmbook.kit.hardware import gpu
from tests.checkers import checker_tests

SIZES = st.integers(1, 6)


# --- the cache


def by_stack_distance(stream, capacity):
    """Misses of a least-recently-used cache, without one: a read hits if fewer than `capacity` others came between."""
    misses = 0
    for i, tile in enumerate(stream):
        before = [j for j in range(i) if stream[j] == tile]
        hit = before and len(set(stream[before[-1] + 1 : i])) < capacity
        misses += not hit
    return misses


@given(SIZES, SIZES, st.integers(0, 6), SIZES, SIZES, st.integers(1, 5), st.integers(0, 20), st.booleans())
def test_replay_counts_what_stack_distances_say(kv, group, tiles, rows, splits, sms, capacity, together):
    programs = launch(kv, group, tiles, rows, splits, together)
    moments = list(replay(programs, sms, capacity))
    stream = [turn[1] for moment in moments for turn in moment.running if turn]
    hbm, l2 = counts(programs, sms, capacity)
    assert l2 == len(stream) == kv * math.ceil(group / rows) * tiles
    assert hbm == by_stack_distance(stream, capacity)
    assert all(len(moment.held) <= capacity for moment in moments)
    # Every program's reads come in its own order, whole.
    assert sorted(stream) == sorted(tile for program in programs for tile in program.reads)


@given(SIZES, SIZES, SIZES, SIZES, SIZES, st.booleans())
def test_a_launch_gives_every_query_head_every_tile_once(kv, group, tiles, rows, splits, together):
    seen = [(h, t) for p in launch(kv, group, tiles, rows, splits, together) for h in p.heads for t in p.reads]
    assert sorted(seen) == [(h, Tile(h // group, t)) for h in range(kv * group) for t in range(tiles)]


@given(SIZES, SIZES, SIZES, st.integers(1, 6))
def test_what_fits_is_read_from_hbm_once(kv, group, tiles, sms):
    for together in (True, False):
        assert counts(launch(kv, group, tiles, together=together), sms, kv * tiles)[0] == kv * tiles


@pytest.mark.parametrize(("kv", "group", "tiles"), [(4, 4, 8), (8, 2, 5), (12, 3, 4)])
def test_groups_apart_fall_off_the_cliff_and_groups_together_do_not(kv, group, tiles):
    apart, together = launch(kv, group, tiles, together=False), launch(kv, group, tiles)
    assert counts(apart, 4, kv * tiles)[0] == kv * tiles
    assert counts(apart, 4, 4 * tiles)[0] == kv * tiles * (group if kv > 4 else 1)
    assert counts(apart, 4, 4)[0] == kv * tiles * group  # as if there were no cache
    # Side by side, a group is one wave: a few tiles of L2 are enough.
    if group in (2, 4):
        assert counts(together, 4, 4)[0] == kv * tiles


def test_nothing_to_read_and_idle_multiprocessors():
    assert counts([], 4, 4) == (0, 0)
    assert counts(launch(2, 2, 0), 4, 4) == (0, 0)
    first = next(replay([Program(0, (0,), (Tile(0, 0),))], 3, 0))
    assert first.running[1:] == (None, None)
    assert first.held == ()
    cache = L2(1)
    assert [cache.read(Tile(0, t)) for t in (0, 0, 1, 0)] == [False, True, False, False]
    with pytest.raises(ValueError, match="1 or more multiprocessors"):
        counts([], 0, 4)
    with pytest.raises(ValueError, match="rows, splits must be 1 or more, tiles 0"):
        launch(2, 0, 4)


# --- the model


@given(st.sampled_from(list(KINDS.values())), st.integers(1, 9), st.sampled_from((1, 16, 32, 64)))
def test_bytes_are_what_the_replay_reads(a, tiles, rows):
    programs = launch(a.kv_heads, a.group, tiles, rows)
    per_tile = 64 * a.token // a.kv_heads
    hbm, l2 = counts(programs, 7, a.kv_heads * tiles)
    assert (hbm * per_tile, l2 * per_tile) == traffic(a, 64 * tiles, rows)
    hbm, l2 = counts(programs, 7, 0)
    assert (hbm * per_tile, l2 * per_tile) == traffic(a, 64 * tiles, rows, cached=False)


def test_bytes_are_the_tensors_bytes():
    for a in KINDS.values():
        cache = torch.empty(a.kv_heads, 100, a.d + (0 if a.shared else a.d_v), dtype=torch.float16)
        assert traffic(a, 100)[0] == cache.numel() * cache.element_size()


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_what_pytorch_counts(kind):
    a, n = KINDS[kind], 10
    q, k = torch.randn(a.kv_heads, a.group, a.d), torch.randn(a.kv_heads, n, a.d)
    with FlopCounterMode(display=False) as counter:
        (q @ k.mT).softmax(-1) @ k[..., : a.d_v]
    assert counter.get_total_flops() == flops(a, n)
    assert flops(a, n, 16) == flops(a, n) * math.ceil(a.group / 16) * 16 // a.group


@given(st.integers(1, 300), st.sampled_from((1, 16, 64)), st.sampled_from(list(CHIPS.values())))
def test_gain_is_the_smaller_bound(group, rows, on):
    loads = math.ceil(group / rows)
    ideal = on._replace(tensor=math.inf, vector=math.inf)
    assert gain(group, ideal, rows) == pytest.approx(min(group, on.l2 / on.hbm * group / loads))
    assert gain(group, on, rows) <= gain(group, ideal, rows) * (1 + 1e-12)
    assert gain(group, ideal, rows, cached=False) == pytest.approx(
        min(group / loads, on.l2 / on.hbm * group / loads)
    )


def test_the_notes_numbers_give_their_two():
    assert [gain(g, NOTES) for g in (1, 2, 4, 8, 32)] == pytest.approx([1, 2, 2, 2, 2])
    assert [gain(g, NOTES, 16) for g in (1, 2, 4, 8, 16)] == pytest.approx([1, 2, 4, 8, 16])
    # "Estimate GQA by L2's bandwidth and MHA's KV size": the per-head kernel's time, exactly.
    mha, gqa = Attention(32, 32), Attention(32, 4)
    assert max(cost(gqa, 1000, NOTES)) == pytest.approx(traffic(mha, 1000)[0] / NOTES.l2)


def test_mla_lies_by_the_ridge():
    a = KINDS["MLA, 128 heads on 1"]
    intensity = flops(a, 1) / traffic(a, 1)[0]
    assert intensity == pytest.approx(2 * 128 * (576 + 512) / (576 * 2))
    for name in ("A100-80 SXM", "H200 SXM"):
        assert cost(a, 1, chip(name), 64).binds == "compute"
        assert intensity > gpu(name).ridge
    assert 0.8 < intensity / gpu("H100 SXM").ridge < 1


def test_one_row_has_no_use_for_tensor_cores():
    a = Attention(4, 1)
    assert cost(a, 100, NOTES).compute == pytest.approx(4 * 4 * 100 * 128 / NOTES.vector)
    assert cost(a, 100, NOTES, 16).compute == pytest.approx(4 * 16 * 100 * 128 / NOTES.tensor)


def test_binds_names_the_longest():
    assert [Cost(*t).binds for t in ((3, 2, 1), (2, 3, 1), (1, 2, 3), (2, 2, 2))] == ["HBM", "L2", "compute", "HBM"]


def test_measured_bandwidths_lie_between_memory_and_peak():
    assert all(m.source.startswith("https://") and m.memory < m.l2 for m in MEASURED.values())
    assert MEASURED["A100-80 SXM"].l2 < 5120 * 1.41  # NVIDIA's peak, bytes per clock × GHz
    for name in ("A100-80 SXM", "H200 SXM"):
        assert MEASURED[name].memory < gpu(name).bandwidth


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(32, 5), "5 do not divide 32"), (lambda: Attention(32, 0), "0 do not divide 32"),
        (lambda: traffic(Attention(2, 1), -1), "keys must be 0 or more and rows 1 or more, but are -1 and 1"),
        (lambda: traffic(Attention(2, 1), 1, 0), "but are 1 and 0"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_chip_without_a_measurement_is_refused():
    with pytest.raises(KeyError, match="no measured L2 bandwidth of 'T4'"):
        chip("T4")


def test_prediction_beside_a_record():
    size = {"batch": 4, "heads": 32, "group": 8, "N": 4096, "d": 128, "dtype": "bfloat16"}
    run = {"device": "NVIDIA H100 80GB HBM3", "cases": [
        {"name": "per head", "sizes": {**size, "rows": 1}, "ms": 0.5},
        {"name": "packed", "sizes": {**size, "rows": 16}, "ms": 0.25},
    ]}
    one, two = predicted(run)
    kv = 4 * 4 * 4096 * 2 * 128 * 2
    assert f"{1e3 * 8 * kv / 6650e9:8.4f} ms (L2 binds), measured   0.5000" in one
    assert f"{1e3 * kv / 3350e9:8.4f} ms (HBM binds), measured   0.2500" in two
    assert set(model.DEVICES.values()) <= set(MEASURED)
    (alone,) = predicted({"device": "NVIDIA X", "cases": [{}]})
    assert alone.startswith("no measured L2 bandwidth of 'NVIDIA X' is known")


def test_replays_at_scale():
    assert replayed(1, 4096, 108, 40, True) == 1
    assert replayed(4, 4096, 108, 0, True) == 4
    assert replayed(4, 4096, 108, 8, True) == 1  # groups side by side need no room
    assert gain_replayed(8, 4096, NOTES.name, True) == pytest.approx(2)
    assert gain_replayed(2, 32_768, NOTES.name, False) == pytest.approx(1)  # nothing left of GQA


# --- exercises, figures, benchmark


def split(kv_heads, tiles, sms):
    shares = math.ceil(sms / kv_heads)
    per = math.ceil(tiles / shares)
    return [
        [(kv, t) for t in range(first, min(first + per, tiles))]
        for kv in range(kv_heads) for first in range(0, tiles, per)
    ]


SOLUTIONS = {
    "gain_of_a_group": lambda g, rows, l2, hbm: min(g, l2 / hbm * g / math.ceil(g / rows)),
    "compute_bound_from": lambda tflops, tbs: int(tflops / tbs) // 16 * 16 + 1,
    "split_the_keys": split,
}
WRONG = {
    "gain_of_a_group": [
        (lambda g, rows, l2, hbm: g, "L2 delivers 8 times the cache: at most 2"),
        (lambda g, rows, l2, hbm: l2 / hbm, "at most 2"),
        (lambda g, rows, l2, hbm: min(g, l2 / hbm), "it is 16, the smaller"),
    ],
    "compute_bound_from": [
        (lambda tflops, tbs: int(tflops / tbs) + 1, "rows without a head are computed too"),
        (lambda tflops, tbs: int(tflops / tbs) // 16 * 16, "still bound by HBM"),
        (lambda tflops, tbs: tflops / tbs, "whole number of heads"),
    ],
    "split_the_keys": [
        (lambda kv, tiles, sms: [[(h, t) for t in range(tiles)] for h in range(kv)], "some SMs idle"),
        (lambda kv, tiles, sms: split(kv, tiles, sms) * 2, "64 tiles are read, though there are 32"),
        (lambda kv, tiles, sms: split(kv, tiles, sms)[1:], "never read"),
        (lambda kv, tiles, sms: [[(h, t) for h in range(kv)] for t in range(tiles)], "reads two KV heads"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


@pytest.mark.parametrize("name", figures.EXPLORERS)
def test_every_picture_differs_and_says_so(name):
    from llmbook.kit.explore import _combinations, picture

    draw, caption, choices = figures.EXPLORERS[name]
    combinations = _combinations(choices)
    pictures = [picture(draw, caption, chosen) for chosen in combinations]
    assert len(set(pictures)) == len({caption(**chosen) for chosen in combinations}) == len(combinations)
    assert sum(map(len, pictures)) < 2e6


def test_the_pictures_end_with_the_closed_forms():
    for group in (1, 2, 4, 8):
        for kernel, (rows, _) in figures.KERNELS.items():
            last = figures.recording(group, kernel, 8)[-1]
            assert last.l2 == 16 // group * 8 * math.ceil(group / rows)


def test_benchmark_cases_say_what_they_count():
    names = []
    for case in benchmark.cases(**benchmark.SMALL):
        assert case.flops == flops(Attention(4, 4 // case.sizes["group"], 64, 64), 140)
        names.append(case.name)
        work = case.make()
        out = work.run()
        assert not work.error(out * 1.05)[0] <= work.error(out)[1]
    assert names == ["per head", "packed"] * 2
