"""W_UQᵀ W_UK as two factors and as one matrix: how many numbers each has, and where gradient descent takes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from .sizes import Sizes


def elements(s: Sizes) -> dict[str, tuple[int, int]]:
    """(elements of the factors, elements of their product) over all heads.

    "scores": W_UQ and W_UK, [nope, q_rank] and [nope, d_c] per head, or
    [q_rank, d_c]. "output": W_UV and W_O, or [D, d_c]. Taking a vector
    through them costs 2 FLOP per element.
    """
    q = s.q_rank or s.dim
    return {
        "scores": (s.heads * s.nope * (q + s.latent), s.heads * q * s.latent),
        "output": (s.heads * s.v * (s.latent + s.dim), s.heads * s.latent * s.dim),
    }


def descend(
    weights: list[Tensor], product: Callable[..., Tensor], target: Tensor,
    steps: int, rate: float,
) -> list[Tensor]:
    """Plain SGD on ½‖product(weights) − target‖², the product after each step.

    weights: leaves, not changed; copies are trained. Returns steps + 1
    matrices, the first from before any step.
    """
    own = [w.detach().clone().requires_grad_() for w in weights]
    path = [product(*own).detach().clone()]
    for _ in range(steps):
        loss = (product(*own) - target).pow(2).sum() / 2
        for w, g in zip(own, torch.autograd.grad(loss, own), strict=True):
            w.data -= rate * g
        path.append(product(*own).detach().clone())
    return path
