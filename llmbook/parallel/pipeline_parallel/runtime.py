"""Execute a schedule on real processes: the simulator's very objects, with tensors, autograd and messages."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmbook.kit.ranks import Comm

from .rank import Kept, Loss, Rank, random_state, set_random_state
from .schedules import Op, Schedule


class Report(NamedTuple):
    """What one rank did in a step.

    `loss` is the batch's (None except on the last stage's rank); `gradients` maps a stage to its parameters'
    gradients in order (a frozen one's is 0); the peaks are counted as held between operations: bytes that autograd
    and the runtime keep for later backwards, micro-batches with all activations (a chunk counts 1/chunks), bare
    stage inputs.
    """

    loss: float | None
    gradients: dict[int, list[Tensor]]
    peak_bytes: int
    peak_full: float
    peak_inputs: int


class Worker(Rank):
    """Does the operations of a schedule: one method for each kind."""

    def F(self, op: Op) -> None:
        """Take the input, apply the stage, keep what B needs, pass on."""
        x = self.stage_input(op)
        kept = self.kept[op.stage, op.micro] = Kept(x)
        with self.logged(op):
            if self.schedule.recompute:
                kept.random = random_state(x.device)
                with torch.no_grad():
                    y = self.apply(op, x)
            else:
                y = self.build(op, kept)
        self.output(op, y)

    def R(self, op: Op) -> None:
        """The forward again, same random numbers, keeping what B needs."""
        kept = self.kept[op.stage, op.micro]
        with self.logged(op):
            now = random_state(kept.input.device)
            set_random_state(kept.random, kept.input.device)
            self.build(op, kept)
            set_random_state(now, kept.input.device)

    def B(self, op: Op) -> None:
        """Backward from the output's gradient; free all; pass on."""
        above = self.output_gradient(op)
        kept = self.kept[op.stage, op.micro]
        with self.logged(op):
            if kept.root is not None:  # else a first stage that learns nothing
                torch.autograd.backward([kept.root], [above])
            del self.kept[op.stage, op.micro]
        self.input_gradient(op, kept.input.grad)


def pipeline_step(
    comm: Comm, schedule: Schedule, modules: Mapping[int, nn.Module] | Sequence[nn.Module], inputs: Tensor,
    targets: Tensor, loss: Loss, *, hidden: Sequence[int] | None = None,
    pace: Mapping[str, float] | None = None, worker: type[Rank] = Worker,
) -> Report:
    """This rank's part of one training step: `ranks.run(pipeline_step, p, schedule, …)`.

    Args:
        modules: stage → module; only this rank's stages are touched. Gradients add up.
        inputs: the whole batch [N, …], split into micro-batches along the first axis; read by stage 0.
        targets: [N, …], read by the last stage.
        loss: (output, target) → mean over a micro-batch; the step's loss is the mean over the batch.
        hidden: shape, without the first axis, of what crosses every boundary; as the inputs' by default.
        pace: kind → seconds that an operation lasts at least (it sleeps the rest), to draw legible timelines.

    Raises:
        ScheduleError: the schedule would wait forever; nothing was sent.
        ValueError: schedule, ranks, batch or a stage's output shape do not fit each other, or a stage detaches: what
            crosses must carry gradients, except out of a first stage without a weight to learn.
    """
    done = worker(comm, schedule, modules, inputs, targets, loss, hidden, pace or {})
    comm.barrier()
    done.run()
    gradients = {
        stage: [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        for stage, module in done.modules.items()
    }
    lost = float(done.lost) if done.last in done.modules else None
    return Report(lost, gradients, done.peak_bytes, done.peak_full, done.peak_inputs)


def split_layers(layers: Sequence[nn.Module], stages: int) -> list[nn.Sequential]:
    """Cut layers into consecutive stages, the first ones one longer where the number does not divide.

    Raises:
        ValueError: fewer layers than stages, or no stage.
    """
    if not 1 <= stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot make {stages} stages; between 1 and {len(layers)} can")
    each, more = divmod(len(layers), stages)
    cuts = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [nn.Sequential(*layers[a:b]) for a, b in pairwise(cuts)]
