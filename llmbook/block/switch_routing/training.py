"""A real training run of one Switch layer, small enough to watch: does the router spread its tokens, or collapse?

Tokens come from K clusters, each with a linear map of its own to learn. As in a language model's stream, all tokens
share a large common component, so at the start one expert looks best to nearly all of them.
"""

from typing import NamedTuple

import torch

from .layer import SwitchFFN, auxiliary

Tensor = torch.Tensor


class Task(NamedTuple):
    """K cluster centres [K, D], the map of each [K, D, D], and what all tokens share, [D]."""

    centres: Tensor
    maps: Tensor
    common: Tensor


class Run(NamedTuple):
    """Per step: each expert's share of the tokens [steps, E], the task's loss and the dropped share, [steps]."""

    load: Tensor
    loss: Tensor
    dropped: Tensor


def task(clusters: int = 8, dim: int = 16, common: float = 2.0, seed: int = 100) -> Task:
    """The same task for every run; `common` is the size of what all tokens share."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=g)
    maps = torch.randn(clusters, dim, dim, generator=g) / dim**0.5
    shared = common * torch.randn(dim, generator=g)
    # Training in float64: a processor that rounds otherwise must not send a token to another expert.
    return Task(centres.double(), maps.double(), shared.double())


def tokens(of: Task, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [count, D] and what the layer should add to it, y − x, with y [count, D]."""
    which = torch.randint(len(of.centres), (count,), generator=g)
    noise = 0.5 * torch.randn(count, of.centres.shape[1], generator=g)
    x = of.centres[which] + of.common + noise
    return x, torch.einsum("td,tde->te", x, of.maps[which])


def train(
    alpha: float, steps: int = 400, *, factor: float | None = None, experts: int = 8,
    batch: int = 256, seed: int = 0,
) -> Run:
    """Train one layer with Adam on the mean squared error plus α times the balance loss.

    Args:
        alpha: weight of the load-balancing loss; 0 leaves it out.
        factor: capacity factor; None drops nobody.
    """
    of, g = task(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = SwitchFFN(of.centres.shape[1], 16, experts, factor).double()
    optimizer = torch.optim.Adam(layer.parameters(), 5e-3)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        x, y = tokens(of, batch, g)
        out, routing, logits = layer(x)
        loss = (out - y).square().mean()
        optimizer.zero_grad()
        (loss + auxiliary(routing, logits, alpha)).backward()
        optimizer.step()
        load = torch.bincount(routing.expert, minlength=experts) / batch
        kept.append((load, loss.detach(), 1 - routing.kept.float().mean()))
    return Run(*(torch.stack(part) for part in zip(*kept, strict=True)))


def effective_experts(load: Tensor) -> Tensor:
    """exp of the load's entropy, [...]: E if even, 1 if one expert gets all. load: [..., E], rows sum to 1."""
    return torch.special.entr(load).sum(-1).exp()
