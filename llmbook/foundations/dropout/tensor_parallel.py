"""Dropout when the layer is spread over ranks: two streams each, one that all share and one of their own."""

from typing import NamedTuple

import torch

from llmbook.kit.ranks import Comm

from .masks import dropout
from .philox import Stream

Tensor = torch.Tensor


class Streams(NamedTuple):
    """A rank's two random streams."""

    replicated: Stream  # for what every rank holds whole
    sharded: Stream  # for what every rank holds a part of


def megatron_streams(seed: int, rank: int) -> Streams:
    """Megatron-LM's two seeds of a tensor-parallel rank.

    `model_parallel_cuda_manual_seed`: the default state takes the seed as it
    is, the model-parallel state takes seed + 2718 + rank.
    """
    return Streams(Stream(seed), Stream(seed + 2718 + rank))


def sum_over_ranks(comm: Comm, part: Tensor) -> Tensor:
    """The sum of all ranks' parts, on every rank bit for bit the same.

    Backward is the identity: each rank's part enters the sum once.
    """
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    for rank in others:
        comm.send(part, rank)
    parts = {comm.rank: part.detach()}
    for rank in others:
        parts[rank] = comm.recv(torch.empty_like(part), rank)
    comm.flush()
    total = torch.stack([parts[rank] for rank in range(comm.size)]).sum(0)
    return total + (part - part.detach())  # the value of total, part's gradient


def parallel_mlp(
    comm: Comm, x: Tensor, A: Tensor, B: Tensor, c: Tensor, p: float,
    streams: Streams,
) -> Tensor:
    """x + dropout(dropout(relu(xA)) B + c), hidden units split over ranks.

    Args:
        x: [n, D], the same on every rank. c: [D], the same on every rank.
        A: [D, H/t], this rank's columns. B: [H/t, D], this rank's rows.

    Returns: [n, D], on every rank.
    """
    hidden = dropout(torch.relu(x @ A), p, streams.sharded)
    y = sum_over_ranks(comm, hidden @ B)
    return x + dropout(y + c, p, streams.replicated)
