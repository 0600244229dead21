"""A training step by torch.distributed.pipelining: what the book's own pipeline is held against."""

from torch import nn
from torch.distributed.pipelining import PipelineStage


def pipelining_step(comm, kind, modules, micros, x, t):
    """Gradients by stage of this rank: `modules` dealt round, x only to the first, t to the last."""
    mine = range(comm.rank, len(modules), comm.size)
    stages = [PipelineStage(modules[s], s, len(modules), comm.device) for s in mine]
    schedule = kind(stages if len(stages) > 1 else stages[0], micros, loss_fn=nn.functional.mse_loss)
    schedule.step(*([x] if comm.rank == 0 else []), target=t if comm.rank == comm.size - 1 else None)
    return {s: [p.grad for p in modules[s].parameters()] for s in mine}
