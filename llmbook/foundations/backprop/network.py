"""The network that the chapter's memory accounts run on: a stack of layers under a softmax cross-entropy."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .checkpoint import layer, stack
from .engine import Var, cross_entropy
from .memory import Timeline, watching

Tensor = torch.Tensor


class Problem:
    """Weights W [layers, d, d] and head [d, classes], inputs x [n, d], labels [n]."""

    def __init__(
        self, layers: int, n: int, d: int, classes: int, *, dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu", seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.weights = [normal(d, d) / d**0.5 for _ in range(layers)]
        self.head, self.x = normal(d, classes) / d**0.5, normal(n, d)
        self.labels = torch.randint(classes, (n,), generator=generator).to(device)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, self.head]


def engine_step(
    problem: Problem, every: int | None = None, before_layer: Callable[[int], None] = lambda i: None
) -> list[Tensor]:
    """The gradients of all parameters, by the engine; before_layer(i) is told which layer runs next."""
    weights, head = [Var(w, True) for w in problem.weights], Var(problem.head, True)

    def numbered(h: Var, i: int) -> Var:
        before_layer(i)
        return layer(h, weights[i])

    layers = [partial(numbered, i=i) for i in range(len(weights))]
    # No name may hold h or the logits: what the graph did not save should be freed.
    cross_entropy(_head(stack(Var(problem.x), layers, every), head, before_layer), problem.labels).backward()
    return [p.grad for p in (*weights, head) if p.grad is not None]


def _head(h: Var, head: Var, before_layer: Callable[[int], None]) -> Var:
    before_layer(-1)
    return h @ head


def timeline(problem: Problem, every: int | None = None) -> Timeline:
    """Who held what during one `engine_step`; layers are labelled 1, 2, … and the head "head"."""
    found = Timeline(problem.parameters, {"x": problem.x, "labels": problem.labels})

    def label(i: int) -> None:
        found.where = str(i + 1) if i >= 0 else "head"

    with watching(found):
        engine_step(problem, every, label)
    return found


def torch_step(problem: Problem, every: int | None = None, *, reentrant: bool = False) -> list[Tensor]:
    """The same gradients by PyTorch's autograd and torch.utils.checkpoint, of either kind.

    The problem's parameters themselves are used, so that a count by storage can leave them out.
    """
    weights = [w.detach().requires_grad_() for w in problem.weights]
    head = problem.head.detach().requires_grad_()
    x = problem.x.detach().requires_grad_(reentrant)  # the older kind of checkpoint looks at its inputs only
    F.cross_entropy(_torch_stack(x, weights, every, reentrant) @ head, problem.labels).backward()
    return [p.grad for p in (*weights, head) if p.grad is not None]


def _torch_stack(h: Tensor, weights: Sequence[Tensor], every: int | None, reentrant: bool) -> Tensor:
    if every is None:
        for weight in weights:
            h = h + F.silu(h @ weight)
        return h
    for first in range(0, len(weights), every):
        h = torch_checkpoint(
            _torch_stack, h, weights[first : first + every], None, reentrant, use_reentrant=reentrant
        )
    return h
