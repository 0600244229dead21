"""Where the norm stands in a residual block, and what that does to gradients at initialisation."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .standardise import standardise

PLACES = ("pre", "post", "none")


class Depths(NamedTuple):
    """Per block, from the input on: RMS of the stream after it, norm of its weights' gradient."""

    stream: list[float]
    gradient: list[float]


def block(x: Tensor, up: Tensor, down: Tensor, place: str) -> Tensor:
    """One residual block around a feed-forward sublayer.

    pre: x + f(norm(x)). post: norm(x + f(x)). none: x + f(x).

    Args:
        x: [N, D]. up: [D, 4D]. down: [4D, D].
    """
    inside = standardise(x, (-1,), 1e-6, centre=False)[0] if place == "pre" else x
    y = x + F.relu(inside @ up) @ down
    return standardise(y, (-1,), 1e-6, centre=False)[0] if place == "post" else y


def measure(
    layers: int, place: str, width: int = 32, tokens: int = 32,
    seeds: int = 4,
) -> Depths:
    """Run a fresh stack forward and backward; nothing is trained.

    He initialisation, so that each sublayer's output is as large as its
    input. A linear head and cross-entropy on random classes end the stack;
    pre-norm has its usual final norm. Averages (RMS) over `seeds` stacks.

    Raises:
        ValueError: a place that is none of PLACES, or no layers.
    """
    if place not in PLACES or layers < 1:
        raise ValueError(
            f"place must be one of {PLACES} and layers at least 1, "
            f"not {place!r} and {layers}"
        )
    stream, gradient = torch.zeros(2, layers, dtype=torch.float64)
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)

        def random(*shape: int, g: torch.Generator = g, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

        x, hidden = random(tokens, width), 4 * width
        up = random(layers, width, hidden, scale=(2 / width) ** 0.5).requires_grad_()
        down = random(layers, hidden, width, scale=hidden**-0.5).requires_grad_()
        for layer in range(layers):
            x = block(x, up[layer], down[layer], place)
            stream[layer] += x.detach().pow(2).mean() / seeds
        if place == "pre":
            x = standardise(x, (-1,), 1e-6, centre=False)[0]
        classes = torch.randint(width, (tokens,), generator=g)
        loss = F.cross_entropy(x @ random(width, width, scale=width**-0.5), classes)
        for grad in torch.autograd.grad(loss, (up, down)):
            gradient += grad.pow(2).sum((1, 2)) / seeds
    return Depths(stream.sqrt().tolist(), gradient.sqrt().tolist())
