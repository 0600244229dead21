"""Stages that learn nothing, stages that lose the graph, and what a step costs beside its operations."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import ScheduleGPipe

from llmbook.kit import ranks
from llmbook.parallel.pipeline_parallel import rank
from llmbook.parallel.pipeline_parallel.runtime import Worker, pipeline_step
from llmbook.parallel.pipeline_parallel.schedules import Schedule, gpipe, one_f_one_b, with_recompute
from tests.pipelining import pipelining_step

WIDTH = 6


def batch(rows=13):
    torch.manual_seed(rows)
    return torch.randn(2, rows, WIDTH, dtype=torch.float64)


def step(comm, schedule, modules, x, t, **more):
    return pipeline_step(comm, schedule, modules, x, t, nn.functional.mse_loss, **more)


class Rounded(nn.Module):
    """Loses the graph, as detach() or a trip through numpy would."""

    def forward(self, x):
        return x.detach() * 2


class RoundedToo(nn.Module):
    """Its output hangs on a weight, but not on its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x):
        return x.detach() * self.weight


def linear(learns=True):
    return nn.Linear(WIDTH, WIDTH).double().requires_grad_(learns)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, lambda r, m: with_recompute(gpipe(r, m))])
@pytest.mark.parametrize(
    "blocks",
    [
        [linear(False), linear()], [nn.Tanh(), linear()], [linear(False), linear(False), nn.Tanh(), linear()],
        [linear(), linear(False), linear()], [linear(), nn.Tanh()], [nn.Sequential(linear(False), linear()), linear()],
        [linear(False), linear(False)], [linear(False)],
    ],
    ids=["frozen", "none", "two frozen", "middle", "last", "half", "all", "alone"],
)
def test_stages_without_weights_to_learn(blocks, make):
    x, t = batch()
    params = [p for block in blocks for p in block.parameters()]
    wanted = [torch.zeros_like(p) for p in params]
    learning = [i for i, p in enumerate(params) if p.requires_grad]
    if learning:
        loss = nn.functional.mse_loss(nn.Sequential(*blocks)(x), t)
        for i, grad in zip(learning, torch.autograd.grad(loss, [params[i] for i in learning]), strict=True):
            wanted[i] = grad
    run = ranks.run(step, len(blocks), make(len(blocks), 3), blocks, x, t, timeout=20)
    found = [grad for report in run.results for grads in report.gradients.values() for grad in grads]
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-12)


def test_torchs_pipelining_runs_a_frozen_first_stage_too_and_agrees():
    x, t = batch(12)
    modules = [linear(False), linear()]
    ours = ranks.run(step, 2, gpipe(2, 3), modules, x, t, timeout=30).results
    other = ranks.run(pipelining_step, 2, ScheduleGPipe, modules, 3, x, t, timeout=30).results
    assert other[0][0] == [None, None]
    for a, b in zip(ours[1].gradients[1], other[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([linear(), Rounded(), linear()], "stage 1 detaches: its output has no graph to learn by"),
        ([nn.Sequential(linear(), Rounded()), linear()], "stage 0 detaches: its output has no graph to learn by"),
        ([linear(), nn.Sequential(linear(), Rounded())], "stage 1 detaches: its output has no graph to learn by"),
        ([linear(), RoundedToo()], "stage 1 detaches: no gradient of its output reaches its input"),
    ],
)
def test_a_stage_that_detaches_is_refused(blocks, words, recompute):
    x, t = batch()
    schedule = gpipe(len(blocks), 2)
    with pytest.raises(ranks.RankError, match=words):
        ranks.run(step, len(blocks), with_recompute(schedule) if recompute else schedule, blocks, x, t, timeout=20)


class Looked(tuple):
    """A rank's operations, counting how many of them are looked at."""

    count = 0

    def __iter__(self):
        for op in super().__iter__():
            Looked.count += 1
            yield op


class Books(dict):
    """What a rank keeps, counting how much of it is looked at."""

    count = 0

    def values(self):
        Books.count += len(self)
        return super().values()


class Counted(Worker):
    def __init__(self, *args):
        super().__init__(*args)
        self.kept = Books()


def looks(comm, micros, steps):
    """How many operations and kept micro-batches a rank looks at, and how often it simulates."""
    simulations, simulated = [], rank.simulate
    rank.simulate = lambda *args: simulations.append(args) or simulated(*args)
    plain = gpipe(2, micros)
    schedule = Schedule(plain.name, tuple(map(Looked, plain.ops)), plain.placement)
    x, t = batch(micros)
    for _ in range(steps):
        step(comm, schedule, [linear(), linear()], x, t, worker=Counted)
    return Looked.count, Books.count, len(simulations)


def test_a_steps_bookkeeping_grows_with_its_operations_not_with_their_square():
    few, many = (ranks.run(looks, 2, micros, 1, timeout=30).results[0] for micros in (16, 64))
    assert many[0] <= 4 * few[0] + 8, (few, many)  # squared, 16 times
    assert many[1] <= 4 * few[1]
    repeated = ranks.run(looks, 2, 16, 5, timeout=30).results[0]
    assert repeated[2] == 1
    assert repeated[0] <= few[0] + 4 * 2 * 2 * 16  # each further step looks at each operation once or twice
