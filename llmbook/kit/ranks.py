"""Real processes in a notebook cell: run a function on several ranks, and know every byte that crossed.

`run` has one process per rank forked on this machine (gloo), by a small server that has never computed anything: the
notebook's own process cannot be forked once autograd or CUDA have threads in it. Started by `torchrun`, the same call
joins the processes that are already there, with NCCL where there are GPUs: that is how the book's parallel code leaves
one machine.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .comm import Comm, Message, RankError, Run, Work, assemble

__all__ = ["Comm", "Message", "RankError", "Run", "Work", "run"]

_stores: list[tuple[Any, int, int]] = []  # torchrun's meeting place: (store, rank, size), entered once
_runs = itertools.count()


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> Run:
    """Run `function(comm, *args)` on `world_size` real processes and wait for all of them.

    A rank finds what a fork of this process would: the function with all that it refers to (notebook code, tensors,
    gradients), `sys.path`, folder, environment, random states, default dtype, grad mode, warning filters; what it
    prints appears here. It does not find: a GPU, and what was changed in an imported module, which it imports anew.

    Args:
        function: anything callable, a notebook's own function too; so are results' classes.
        timeout: seconds after which ranks that have not finished are stopped.

    Raises:
        RankError: a rank raised (its traceback is in the message), died (the signal or exit code), hung (where
            it stood), or gave a result that cannot be sent. All processes are gone when this is raised.
        ValueError: `world_size` or `timeout` is no such number, `world_size` differs from the size of the `torchrun`
            job this is part of, or the function refers to what cannot be sent (an open file, another device's tensor).
        RuntimeError: this system cannot fork, cloudpickle is not installed, or, under `torchrun`, there is already a
            process group.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size must be a whole number and at least 1, not {world_size!r}")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join(function, world_size, args, timeout)
    from .rank_server import fork_ranks

    return assemble(fork_ranks(function, world_size, args, timeout))


def _join(function: Callable, world_size: int, args: tuple, timeout: float) -> Run:
    """The `torchrun` way: this process is one rank; results and logs are gathered on all of them."""
    if int(os.environ["WORLD_SIZE"]) != world_size:
        raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} processes, but run wants {world_size}")
    if dist.is_initialized():
        raise RuntimeError("run makes and ends the process group itself; destroy the one that is there before")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not _stores:
        _stores.append(next(iter(rendezvous("env://"))))
    store, rank, size = _stores[0]
    dist.init_process_group(
        "nccl" if gpu else "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout),
        store=dist.PrefixStore(f"run {next(_runs)}", store),  # or a second run would find the first one's addresses
    )
    try:
        dist.barrier()  # the clocks start together
        comm = Comm(rank, size, device, time.monotonic())
        result = function(comm, *args)
        comm.flush()
        reports: list[Any] = [None] * size
        dist.all_gather_object(reports, (result, comm.sends, comm.receipts, comm.work))
        dist.barrier()  # a rank that leaves early would close connections the others still read from
    finally:
        dist.destroy_process_group()
    return assemble(reports)
