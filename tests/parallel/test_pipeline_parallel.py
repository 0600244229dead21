"""Pipeline schedules against closed forms, torch's own pipelining, and the sequential model."""

import itertools
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from llmbook.kit import explore, ranks
from llmbook.parallel.pipeline_parallel import closed_forms, exercises, figures
from llmbook.parallel.pipeline_parallel.rank import wire_order
from llmbook.parallel.pipeline_parallel.runtime import Worker, pipeline_step, split_layers
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
            "interleaved": lambda: interleaved(p, p * m, v)}[which.removesuffix("+R")]()  # fmt: skip
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
    with pytest.raises(ranks.RankError, match="never ends"):
        ranks.run(step, 2, stuck, *problem(2)[:3], timeout=20)
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


# Real processes.

WIDTH = 6


def problem(layers: int, batch: int = 13):
    torch.manual_seed(layers)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(layers)]
    x, t = torch.randn(2, batch, WIDTH, dtype=torch.float64)
    loss = nn.functional.mse_loss(nn.Sequential(*blocks)(x), t)
    wanted = torch.autograd.grad(loss, [p for block in blocks for p in block.parameters()])
    return blocks, x, t, loss.item(), wanted


def step(comm, schedule, modules, x, t, **more):
    return pipeline_step(comm, schedule, modules, x, t, nn.functional.mse_loss, **more)


def flat(run) -> list[torch.Tensor]:
    by_stage = {stage: grads for report in run.results for stage, grads in report.gradients.items()}
    return [grad for stage in sorted(by_stage) for grad in by_stage[stage]]


SCHEDULES = [
    naive(3), gpipe(4, 8), gpipe(1, 1), gpipe(3, 1), one_f_one_b(1, 3), one_f_one_b(4, 8), one_f_one_b(5, 2),
    one_f_one_b(2, 13), interleaved(2, 4, 3), interleaved(4, 8, 2),
    interleaved(1, 3, 2), interleaved(3, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.ranks}x{s.micros}")
def test_gradients_peaks_and_messages_on_real_processes(schedule, again):
    schedule = with_recompute(schedule) if again else schedule
    blocks, x, t, loss, wanted = problem(9)  # 9 layers divide into none of 2, 4, 5, 6 or 8 stages
    modules = split_layers(blocks, schedule.stages)
    run = ranks.run(step, schedule.ranks, schedule, modules, x, t, timeout=30)
    for have, want in zip(flat(run), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    assert [r.loss for r in run.results if r.loss is not None] == [pytest.approx(loss, abs=1e-12)]
    timeline = simulate(schedule, COST)
    assert [(r.peak_full, r.peak_inputs) for r in run.results] == [peak[1:] for peak in peaks(timeline)]
    assert len(run.messages) == closed_forms.messages(schedule.ranks, schedule.micros, schedule.chunks)
    boundaries = schedule.stages - 1 if schedule.ranks > 1 else 0
    assert sum(run.bytes_sent()) == 2 * boundaries * x.nbytes
    logged = [[work.name for work in run.work if work.rank == rank] for rank in range(schedule.ranks)]
    assert logged == [[f"{op.kind} {op.stage} {op.micro}" for op in mine] for mine in schedule.ops]


def test_peak_bytes_are_units_times_bytes_of_a_micro_batch():
    blocks, x, t, *_ = problem(8, batch=16)
    one = 2 * (
        2 * WIDTH * 8
    )  # rows × width × float64, saved by each of a stage's two layers: the tanh's output
    for schedule, held in ((gpipe(4, 8), [8, 8, 8]), (one_f_one_b(4, 8), [4, 3, 2])):
        run = ranks.run(step, 4, schedule, split_layers(blocks, 4), x, t, timeout=30)
        entry = 2 * WIDTH * 8  # and the stage's input
        assert [r.peak_bytes for r in run.results[:3]] == [n * (one + entry) for n in held]
    run = ranks.run(step, 4, with_recompute(gpipe(4, 8)), split_layers(blocks, 4), x, t, timeout=30)
    assert [r.peak_bytes for r in run.results[:3]] == [8 * entry + one] * 3


def test_recomputation_draws_the_same_dropout():
    blocks, x, t, *_ = problem(4)
    blocks = [nn.Sequential(block, nn.Dropout(0.5)) for block in blocks]
    modules = split_layers(blocks, 2)

    def seeded(comm, schedule):
        torch.manual_seed(comm.rank)
        return step(comm, schedule, modules, x, t)

    plain = flat(ranks.run(seeded, 2, gpipe(2, 3), timeout=30))
    again = flat(ranks.run(seeded, 2, with_recompute(gpipe(2, 3)), timeout=30))
    for have, want in zip(again, plain, strict=True):
        assert torch.equal(have, want)
    assert any(grad.abs().sum() > 0 for grad in plain)


def test_both_ends_of_a_link_agree_on_the_order():
    for schedule in (one_f_one_b(4, 8), interleaved(2, 8, 3), with_recompute(gpipe(3, 4))):
        for a in range(schedule.ranks):
            for b, order in wire_order(schedule, a).items():
                assert wire_order(schedule, b)[a] == order
    orders = [wire_order(one_f_one_b(4, 8), rank) for rank in range(4)]
    assert (
        sum(len(order) for of_rank in orders for order in of_rank.values()) == 2 * 48
    )  # seen from both ends


@pytest.mark.parametrize(
    ("schedule", "count", "change", "words"),
    [
        (gpipe(2, 2), 3, {}, "is for 2 ranks, but 3 run"),
        (gpipe(2, 14), 2, {}, "14 micro-batches need"),
        (gpipe(2, 2), 2, {"hidden": (WIDTH + 1,)}, "stage 0 gave"),
        (
            Schedule("split", ((Op("F", 0, 0), Op("I", 0, 0), Op("W", 0, 0)),), (0,)),
            1,
            {},
            "Worker cannot do I0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(schedule, count, change, words):
    blocks, x, t, *_ = problem(3)
    modules = split_layers(blocks, schedule.stages)

    def go(comm):
        return step(comm, schedule, modules, x, t, **change)

    with pytest.raises(ranks.RankError, match=words):
        ranks.run(go, count, timeout=20)


def test_targets_must_match_inputs():
    blocks, x, t, *_ = problem(3)
    with pytest.raises(ranks.RankError, match="13 inputs and 12 targets"):
        ranks.run(step, 1, gpipe(1, 1), split_layers(blocks, 1), x, t[:12], timeout=20)


def theirs(comm, kind, modules, micros, x, t):
    """The same step by torch.distributed.pipelining."""
    mine = range(comm.rank, len(modules), comm.size)
    stages = [PipelineStage(modules[s], s, len(modules), comm.device) for s in mine]
    schedule = kind(stages if len(stages) > 1 else stages[0], micros, loss_fn=nn.functional.mse_loss)
    schedule.step(*([x] if comm.rank == 0 else []), target=t if comm.rank == comm.size - 1 else None)
    return {s: [p.grad for p in modules[s].parameters()] for s in mine}


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        (ScheduleGPipe, gpipe(3, 8)),
        (Schedule1F1B, one_f_one_b(4, 8)),
        (ScheduleInterleaved1F1B, interleaved(2, 4, 2)),
    ],
)
def test_gradients_equal_torchs_pipelining(kind, schedule):
    blocks, x, t, *_ = problem(9, batch=16)
    modules = split_layers(blocks, schedule.stages)
    ours = ranks.run(step, schedule.ranks, schedule, modules, x, t, timeout=30)
    other = ranks.run(theirs, schedule.ranks, kind, modules, schedule.micros, x, t, timeout=30)
    for mine, yours in zip(ours.results, other.results, strict=True):
        assert mine.gradients.keys() == yours.keys()
        for stage, grads in mine.gradients.items():
            for a, b in zip(grads, yours[stage], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_pace_stretches_operations():
    blocks, x, t, *_ = problem(2)
    run = ranks.run(
        lambda comm: step(comm, gpipe(2, 2), split_layers(blocks, 2), x, t, pace={"F": 0.01, "B": 0.02}),
        2,
        timeout=20,
    )
    assert all(w.end - w.start >= {"F": 0.0099, "B": 0.0199}[w.name[0]] for w in run.work)


def test_without_a_flush_updates_break_autograd():
    blocks, x, t, *_ = problem(4)

    class Hasty(Worker):
        def B(self, op):
            super().B(op)
            torch.optim.SGD(self.modules[op.stage].parameters(), lr=0.1).step()

    def hasty(comm):
        return step(comm, one_f_one_b(2, 4), split_layers(blocks, 2), x, t, worker=Hasty)

    with pytest.raises(
        ranks.RankError, match=r"rank 0 raised[\s\S]*F1 of stage 0 saved a tensor that was modified in place"
    ):
        ranks.run(hasty, 2, timeout=20)


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


def test_logged_work_is_drawn_under_the_simulation():
    blocks, x, t, *_ = problem(2)
    run = ranks.run(step, 2, interleaved(2, 2, 2), split_layers(blocks * 2, 4), x, t, timeout=20)
    markup = figures.both(simulate(interleaved(2, 2, 2), COST), run, 0.01).as_str()
    assert markup.count("rank 1") == 2
    assert len(re.findall(r"M\d+ \d+L", markup)) == len(run.messages)


# Exercises.

TOTAL = 2 * 15 * 32 * 4096 * 8192 * 2


def wrong_order(p, m, rank):
    return [(k, rank, i) for k in "FB" for i in range(m)]


def capped_warmup(p, m, cap):
    """1F1B with its warm-up cut to the cap: valid, but it waits for forwards that cannot come."""
    ops = []
    for rank in range(p):
        warm = min(p - 1 - rank, m, cap - 1)
        mine = [Op("F", rank, i) for i in range(warm)]
        for i in range(m):
            mine += [Op("F", rank, warm + i)] if warm + i < m else []
            mine.append(Op("B", rank, i))
        ops.append(mine)
    return ops


@pytest.mark.parametrize(
    ("checker", "right", "wrong"),
    [
        (
            exercises.enough_micro_batches,
            {"1F1B": 133, "interleaved, v=4": 40},
            [{"1F1B": 140, "interleaved, v=4": 40}, {"1F1B": 133, "interleaved, v=4": 34}, {"1F1B": 133},
             {"1F1B": 132, "interleaved, v=4": 40}, {"1F1B": 133, "interleaved, v=4": 48}, 133],
        ),
        (exercises.bytes_on_the_wire, TOTAL,
         [TOTAL // 2, TOTAL * 2, TOTAL / 15 * 7, TOTAL // 15 * 7, TOTAL // 15 * 16, TOTAL // 32, 7]),
        (
            exercises.one_f_one_b_of_a_rank,
            lambda p, m, rank: one_f_one_b(p, m).ops[rank],
            [wrong_order, lambda p, m, rank: one_f_one_b(p, m).ops[0], lambda p, m, rank: [],
             lambda p, m, rank: list(one_f_one_b(p, m).ops[rank])[:-1], lambda p, m: [], 3,
             lambda p, m, rank: [*one_f_one_b(p, m).ops[rank], ("F", rank, m)]],
        ),
        (
            exercises.schedule_under_a_cap,
            exercises.backward_first,
            [lambda p, m, cap: gpipe(p, m).ops, lambda p, m, cap: one_f_one_b(p, m).ops, capped_warmup,
             lambda p, m, cap: [[(k, r, i) for i in range(m) for k in "FB"] for r in range(p)],
             lambda p, m, cap: [[]], lambda p, m, cap: naive(p).ops,
             lambda p, m, cap: [[Op("B", r, 0), Op("F", r, 0)] for r in range(p)]],
        ),
    ],
)  # fmt: skip
def test_checkers_accept_the_solution_and_reject_wrong_answers(checker, right, wrong):
    assert checker.verdict(right)[0]
    assert checker.verdict(...)[1].startswith("○")
    for answer in wrong:
        verdict, words = checker.verdict(answer)
        assert not verdict
        assert words.startswith("✗")
