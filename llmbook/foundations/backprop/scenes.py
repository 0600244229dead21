"""One pass through a small graph, recorded event by event: values, gradients, and what is held."""

from dataclasses import dataclass, replace

import torch

from .engine import Node, Var, cross_entropy, relu, silu
from .memory import storage, watching

Tensor = torch.Tensor
OPS = ("matmul", "add", "act", "matmul", "add", "cross entropy")
RESULTS = ("z", "a", "h", "u", "y", "loss")
LEAVES = ("W₁", "b", "W₂")


@dataclass(frozen=True)
class Moment:
    """The graph right after one event.

    event: "forward", "backward" or "leaf"; at: the operation's index, or the leaf's in LEAVES.
    values, gradients: result → tensor. held: operation's index → names of what it saved.
    leaf_gradients: leaf → tensor.
    """

    event: str
    at: int
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    held: dict[int, tuple[str, ...]]
    leaf_gradients: dict[str, Tensor]


def leaves() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x [4, 3], labels [4], and W₁ [3, 5], b [5], W₂ [5, 5]."""
    generator = torch.Generator().manual_seed(3)
    x, w1, b, w2 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (3, 5), (5,), (5, 5)))
    return x, torch.tensor([0, 3, 1, 4]), {"W₁": w1, "b": b, "W₂": w2}


def record(activation: str) -> list[Moment]:
    """h = act(x W₁ + b), y = h + h W₂, and its loss, forward and backward. activation: "relu" or "silu"."""
    x, labels, parameters = leaves()
    w1, b, w2 = (Var(p, True) for p in parameters.values())
    names = {storage(x): "x", storage(labels): "labels"} | {storage(p): n for n, p in parameters.items()}
    order: dict[Node, int] = {}
    moments: list[Moment] = []
    now = Moment("", 0, {}, {}, {}, {})
    keep: list[Tensor] = []  # so that no two results share an address

    def watcher(event: str, node: Node, tensor: Tensor) -> None:
        nonlocal now
        if event == "forward":
            at = order[node] = len(order)
            keep.append(tensor)
            names[storage(tensor)] = RESULTS[at]
            saved = [names.get(storage(t), "log p") for edge in node.edges or () for t in edge.saved]
            # The loss saves log p, the labels, and their number, which is no news.
            kept = tuple(dict.fromkeys(saved if at < 5 else saved[:2]))
            values = now.values | {RESULTS[at]: tensor}
            now = replace(now, event=event, at=at, values=values, held=now.held | {at: kept})
        elif event == "backward" and node.leaf is not None:
            at = [w1.node, b.node, w2.node].index(node)
            now = replace(now, event="leaf", at=at, leaf_gradients=now.leaf_gradients | {LEAVES[at]: tensor})
        elif event == "backward":
            at = order[node]
            now = replace(now, event=event, at=at, gradients=now.gradients | {RESULTS[at]: tensor})
        else:
            now = replace(now, held={i: kept for i, kept in now.held.items() if i != order[node]})
            return
        moments.append(now)

    act = {"relu": relu, "silu": silu}[activation]
    with watching(watcher):
        h = act(Var(x) @ w1 + b)
        cross_entropy(h + h @ w2, labels).backward()
    return moments
