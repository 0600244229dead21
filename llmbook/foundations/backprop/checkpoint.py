"""Checkpointing as one more operation of the engine: keep a segment's input, run the segment again in backward."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from .engine import Edge, Node, Var, backward, notify, silu

Tensor = torch.Tensor
Layer = Callable[[Var], Var]


def checkpoint(function: Layer, x: Var) -> Var:
    """function(x), of whose inside only x is kept until backward.

    Backward runs `function` a second time, so it must compute the same thing
    again: no random numbers, nothing that has changed since.
    """
    def pull(g: Tensor, kept: Tensor) -> Tensor:
        start = Var(kept, requires_grad=True)
        with torch.enable_grad():
            again = function(start)
        if again.node is not None:  # None: nothing inside needs a gradient
            backward(again, g)  # reaches the parameters inside as well as x
        return torch.zeros_like(kept) if start.grad is None else start.grad

    edge = Edge(x, pull, x.value)
    # Even where x needs no gradient, the parameters inside do.
    edge.source = edge.source or Node("constant", [])
    node = Node("checkpoint", [edge] if torch.is_grad_enabled() else [])
    notify("forward", node, x.value)
    with torch.no_grad():
        out = Var(function(x).value)
    out.node = node if node.edges else None
    return out


def layer(h: Var, weight: Var) -> Var:
    """h + silu(h W). h: [n, d], W: [d, d]."""
    return h + silu(h @ weight)


def stack(h: Var, layers: Sequence[Layer], every: int | None = None) -> Var:
    """The layers one after the other, in checkpoints of `every`; None: without.

    Raises:
        ValueError: every is not None, and below 1.
    """
    if every is None:
        for apply in layers:
            h = apply(h)
        return h
    if every < 1:
        raise ValueError(f"a checkpoint spans 1 layer or more, not {every}")
    for first in range(0, len(layers), every):
        h = checkpoint(partial(stack, layers=layers[first : first + every]), h)
    return h
