"""The pipeline runtime on real processes, against the sequential model and torch's own pipelining."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from llmbook.kit import ranks
from llmbook.parallel.pipeline_parallel import closed_forms, figures
from llmbook.parallel.pipeline_parallel.rank import wire_order
from llmbook.parallel.pipeline_parallel.runtime import Worker, pipeline_step, split_layers
from llmbook.parallel.pipeline_parallel.schedules import (
    Op,
    Schedule,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    with_recompute,
)
from llmbook.parallel.pipeline_parallel.simulate import peaks, simulate
from tests.pipelining import pipelining_step

COST = {"F": 1.0, "B": 2.0}

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
]


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
    other = ranks.run(pipelining_step, schedule.ranks, kind, modules, schedule.micros, x, t, timeout=30)
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


def test_logged_work_is_drawn_under_the_simulation():
    blocks, x, t, *_ = problem(2)
    run = ranks.run(step, 2, interleaved(2, 2, 2), split_layers(blocks * 2, 4), x, t, timeout=20)
    markup = figures.both(simulate(interleaved(2, 2, 2), COST), run, 0.01).as_str()
    assert markup.count("rank 1") == 2
    assert len(re.findall(r"M\d+ \d+L", markup)) == len(run.messages)


def test_a_deadlock_is_refused_before_anything_is_sent():
    ops = (Op("F", 0, 0), Op("B", 0, 0), Op("F", 0, 1), Op("B", 0, 1))
    other = (Op("F", 1, 0), Op("F", 1, 1), Op("B", 1, 0), Op("B", 1, 1))
    with pytest.raises(ranks.RankError, match="never ends"):
        ranks.run(step, 2, Schedule("impatient", (ops, other), (0, 1)), *problem(2)[:3], timeout=20)
