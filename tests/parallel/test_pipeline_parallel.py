"""Pipeline schedules against closed forms, torch's own pipelining, and the sequential model."""

import itertools
import re
from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from llmbook.kit import explore
from llmbook.parallel.pipeline_parallel import closed_forms, figures
from llmbook.parallel.pipeline_parallel.runtime import split_layers
from llmbook.parallel.pipeline_parallel.schedules import (
    Op,
    Schedule,
    ScheduleError,
    crossings,
    gpipe,
    interleaved,
    naive,
    needs,
    one_f_one_b,
    with_recompute,
)
from llmbook.parallel.pipeline_parallel.simulate import memory, peaks, simulate

COST = {"F": 1.0, "B": 2.0}
small = st.integers(1, 9)
costs = st.integers(1, 7)


def any_schedule(p: int, m: int, v: int, which: str) -> Schedule:
    base = {"naive": lambda: naive(p), "gpipe": lambda: gpipe(p, m), "1f1b": lambda: one_f_one_b(p, m),
            "interleaved": lambda: interleaved(p, p * m, v)}[which.removesuffix("+R")]()
    return with_recompute(base) if which.endswith("+R") else base


names = st.sampled_from([n + r for n in ("naive", "gpipe", "1f1b", "interleaved") for r in ("", "+R")])


@settings(deadline=None)
@given(small, st.integers(1, 5), st.integers(2, 4), names)
def test_every_schedule_is_complete_and_in_order(p, m, v, which):
    schedule = any_schedule(p, m, v, which)
    timeline = simulate(schedule, COST)
    kinds = "FRB" if schedule.recompute else "FB"
    every = [(k, s, i) for k in kinds for s in range(schedule.stages) for i in range(schedule.micros)]
    assert sorted(op for mine in schedule.ops for op in mine) == sorted(every)
    end = {span.op: span.end for mine in timeline.spans for span in mine}
    start = {span.op: span.start for mine in timeline.spans for span in mine}
    for k, s, i in every:  # restated here, without `needs`
        if k == "F" and s:
            assert start[k, s, i] >= end["F", s - 1, i]
        if k == "B":
            assert start[k, s, i] >= end["F", s, i]
            assert s == schedule.stages - 1 or start[k, s, i] >= end["B", s + 1, i]
        if k == "R":
            assert end["F", s, i] <= start[k, s, i] <= end[k, s, i] <= start["B", s, i]
    for mine in timeline.spans:
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


@settings(deadline=None)
@given(small, small, costs, costs, st.booleans())
def test_bubble_of_gpipe_and_1f1b_is_the_closed_form(p, m, f, b, again):
    for make in (gpipe, one_f_one_b):
        schedule = with_recompute(make(p, m)) if again else make(p, m)
        line = simulate(schedule, {"F": f, "B": b})
        assert line.bubble == closed_forms.bubble(p, f, b)
        assert line.ideal == m * (f + b + again * f)
        if not again:
            assert line.bubble_of_ideal == pytest.approx(closed_forms.bubble_of_ideal(p, m))
            assert line.bubble_of_total == pytest.approx(closed_forms.bubble_of_total(p, m))
    whole = simulate(naive(p), {"F": m * f, "B": m * b})
    assert whole.bubble_of_total == pytest.approx(1 - 1 / p)


@settings(deadline=None)
@given(small, st.integers(1, 4), st.integers(2, 5), costs, costs)
def test_bubble_of_interleaved_is_divided_by_its_chunks(p, groups, v, f, b):
    line = simulate(interleaved(p, p * groups, v), {"F": f, "B": b})
    assert line.bubble == pytest.approx(closed_forms.bubble(p, f, b, v))
    assert line.bubble_of_ideal == pytest.approx(closed_forms.bubble_of_ideal(p, p * groups, v))
    assert line.bubble_of_total == pytest.approx(closed_forms.bubble_of_total(p, p * groups, v))


@settings(deadline=None)
@given(small, st.integers(1, 5), st.integers(2, 4), costs, costs)
def test_peak_memory_is_the_closed_form(p, m, v, f, b):
    cost = {"F": f, "B": b}
    for rank in range(p):
        assert peaks(simulate(gpipe(p, m), cost))[rank][1:] == (closed_forms.peak_gpipe(m), 0)
        assert peaks(simulate(one_f_one_b(p, m), cost))[rank].full == closed_forms.peak_one_f_one_b(
            p, m, rank
        )
        again = peaks(simulate(with_recompute(gpipe(p, m)), cost))[rank]
        assert (again.full, again.inputs) == (1, m)
        have = peaks(simulate(interleaved(p, p * m, v), cost))[rank].full
        assert have == pytest.approx(closed_forms.peak_interleaved(p, p * m, v, rank))
    if m >= 2 and p > 1:  # Megatron's published form, on the first rank, once warm-up is not cut short
        form = p * (1 + (p - 1) / (p * v))
        assert closed_forms.peak_interleaved(p, p * m, v, 0) == pytest.approx(form)


def test_memory_is_given_back():
    for schedule in (gpipe(3, 4), with_recompute(gpipe(3, 4)), one_f_one_b(3, 4), interleaved(3, 6, 2)):
        for curve in memory(simulate(schedule, COST)):
            assert curve[0][1:] == curve[-1][1:] == (0, 0)
            assert [held.time for held in curve] == sorted(held.time for held in curve)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4))
def test_the_order_is_torchs(p, m, v):
    for make, theirs in ((gpipe, ScheduleGPipe), (one_f_one_b, Schedule1F1B)):
        order = theirs._get_pipeline_order(SimpleNamespace(_num_stages=p, _n_microbatches=p * m))
        # torch's listing (not its execution) of 1F1B numbers the last rank's forwards from 1: leave it out.
        upto = p - (make is one_f_one_b)
        assert [_compute(order[rank]) for rank in range(upto)] == [
            list(ops) for ops in make(p, p * m).ops[:upto]
        ]
    like = SimpleNamespace(pp_group_size=p, n_local_stages=v, _n_microbatches=p * m, microbatches_per_round=p)
    calculate = ScheduleInterleaved1F1B._calculate_single_rank_operations
    assert [_compute(calculate(like, rank)) for rank in range(p)] == [
        list(ops) for ops in interleaved(p, p * m, v).ops
    ]


def _compute(actions):
    found = [a for a in actions if a is not None and a.computation_type.value in "FB"]
    return [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in found]


def test_latency_delays_only_what_crosses_ranks():
    assert simulate(gpipe(3, 1), COST, latency=10).total == 9 + 4 * 10
    assert (
        simulate(interleaved(1, 2, 3), COST, latency=10).total == simulate(interleaved(1, 2, 3), COST).total
    )


def test_split_backward_fits_the_same_structure():
    ops = tuple(tuple(Op(k, r, i) for i in range(2) for k in ("F", "I", "W")) for r in range(2))
    line = simulate(Schedule("split", ops, (0, 1)), {"F": 1, "I": 1, "W": 1})
    assert [peak.full for peak in peaks(line)] == [1, 1]
    assert line.total == 10  # rank 0: F, wait 2, I, W, F, wait 2, I, W
    assert len(crossings(line.schedule)) == 4
    assert needs(Op("W", 0, 1), 1) == [("I", 0, 1)]


def test_64_stages_and_1024_micro_batches_complete():
    line = simulate(one_f_one_b(64, 1024), COST)
    assert sum(map(len, line.spans)) == 2 * 64 * 1024
    assert line.bubble == closed_forms.bubble(64, 1, 2)


def with_ops(schedule: Schedule, rank: int, ops: list[Op]) -> Schedule:
    return Schedule(
        schedule.name, (*schedule.ops[:rank], tuple(ops), *schedule.ops[rank + 1 :]), schedule.placement
    )


def test_a_deadlock_is_refused_by_name():
    good = one_f_one_b(2, 2)
    stuck = with_ops(good, 0, [Op("F", 0, 0), Op("B", 0, 0), Op("F", 0, 1), Op("B", 0, 1)])
    stuck = with_ops(stuck, 1, [Op("F", 1, 0), Op("F", 1, 1), Op("B", 1, 0), Op("B", 1, 1)])
    with pytest.raises(
        ScheduleError, match=r"rank 0 .* B0 of stage 0 .* B0 of stage 1; rank 1 .* F1 of stage 0"
    ):
        simulate(stuck, COST)
    with pytest.raises(ScheduleError, match="rank 0 stands before B0 of stage 0 and waits for F0 of stage 0"):
        simulate(with_ops(gpipe(1, 1), 0, [Op("B", 0, 0), Op("F", 0, 0)]), COST)


def test_incomplete_schedules_are_refused():
    good, ops = one_f_one_b(2, 2), list(one_f_one_b(2, 2).ops[0])
    with pytest.raises(ScheduleError, match="rank 0 never does B1 of stage 0"):
        with_ops(good, 0, ops[:-1])
    with pytest.raises(ScheduleError, match="rank 0 never does F0 of stage 0"):
        with_ops(good, 0, ops[1:])
    with pytest.raises(ScheduleError, match="rank 0 has F0 of stage 0 twice"):
        with_ops(good, 0, [ops[0], *ops])
    with pytest.raises(ScheduleError, match="does not hold"):
        with_ops(good, 0, [*ops, Op("F", 1, 0)])
    with pytest.raises(ScheduleError, match="kinds are"):
        with_ops(good, 0, [*ops, Op("X", 0, 0)])
    with pytest.raises(ScheduleError, match="whole and split"):
        with_ops(good, 0, [*ops, Op("W", 0, 0)])
    with pytest.raises(ScheduleError, match="never does R1 of stage 0"):
        with_ops(good, 0, [*ops, Op("R", 0, 0)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gpipe(0, 1), "ranks must be at least 1, not 0"),
        (lambda: one_f_one_b(2, 0), "micros must be at least 1, not 0"),
        (lambda: interleaved(4, 6, 2), "groups of 4, one per rank; 6 do not"),
        (lambda: interleaved(2, 4, 1), "2 chunks or more, not 1"),
        (lambda: split_layers([nn.Identity()] * 2, 3), "2 layers cannot make 3 stages"),
        (lambda: split_layers([nn.Identity()] * 2, 0), "cannot make 0 stages"),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Pictures.


def test_every_frame_draws_and_states_measured_beside_closed_form():
    total = 0
    for schedule in figures.NAMES:
        for p, m, ratio in product((2, 4, 8), (4, 8, 16), figures.RATIOS):
            chosen = {"schedule": schedule, "ranks": p, "micro_batches": m, "forward_to_backward": ratio}
            total += len(explore.picture(figures.overview, figures.overview_caption, chosen))
            words = figures.overview_caption(**chosen)
            found = re.search(r"rank idles ([\d.]+) units.*Closed form: ([\d.]+) units", words)
            if found:
                assert found[1] == found[2]
            else:
                assert "refuses 4 micro-batches on 8 ranks" in words
    assert total < 1_500_000


def test_the_walk_counts_what_is_held_and_what_crosses():
    words = figures.walk_caption("1F1B", 9)
    assert "rank 1 does B0, rank 2 does B1, rank 3 does F2; 1 of 4 ranks idle" in words
    assert "F2 from rank 2 to 3" in words
    for schedule in ("GPipe", "1F1B"):
        for step_ in figures.walk_times(schedule):
            figures.walk(schedule, step_)
