"""Jacobians by passes, the linear layer's VJP, and what each way costs, counted."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch

from .layouts import Shape

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]


def linear_vjp(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of y = W x: (dx, dW) = (Wᵀ g, g xᵀ).

    Args:
        x: [n].
        weight: W, [m, n].
        g: ∂L/∂y, [m].

    Returns: dx [n], dW [m, n]: each as large as what it belongs to.

    Raises:
        ValueError: shapes that do not match; says which.
    """
    m, n = weight.shape
    if x.shape != (n,) or g.shape != (m,):
        name, got, wanted = ("x", x, n) if x.shape != (n,) else ("g", g, m)
        raise ValueError(
            f"W is {[m, n]}, so {name} should be {[wanted]}, "
            f"not {list(got.shape)}"
        )
    return weight.T @ g, torch.outer(g, x)


def rows_by_vjp(function: Function, x: Tensor) -> tuple[Tensor, int]:
    """The Jacobian of a vector by a vector, row by row, and the passes.

    A row is eᵢᵀJ: one backward pass with a one in place i. x: [n].
    Returns: [m, n] (numerator layout), m.
    """
    y, pull = torch.func.vjp(function, x)[:2]
    basis = torch.eye(len(y), dtype=y.dtype, device=y.device)
    return torch.stack([pull(row)[0] for row in basis]), len(basis)


def columns_by_jvp(function: Function, x: Tensor) -> tuple[Tensor, int]:
    """The same Jacobian column by column: J eⱼ, one forward pass each.

    x: [n]. Returns: [m, n] (numerator layout), n.
    """
    basis = torch.eye(len(x), dtype=x.dtype, device=x.device)
    columns = [
        torch.func.jvp(function, (x,), (column,))[1] for column in basis
    ]
    return torch.stack(columns, 1), len(basis)


def product_flop(sizes: Sequence[int], mode: str) -> int:
    """FLOP to multiply a chain's Jacobians from one end.

    Args:
        sizes: n₀, n₁, …, n_L: the chain maps n₀ numbers to n_L.
        mode: "forward" starts at the input, "reverse" at the output.

    A product [a, b] @ [b, c] is 2abc FLOP. Reverse keeps n_L rows all the
    way down, forward keeps n₀ columns all the way up.
    Raises:
        ValueError: an unknown mode, or fewer than two sizes.
    """
    if mode not in ("forward", "reverse") or len(sizes) < 2:
        raise ValueError(
            "product_flop needs mode 'forward' or 'reverse' and at least two "
            f"sizes, not {mode!r} and {list(sizes)}"
        )
    pairs = [a * b for a, b in pairwise(sizes)]
    if mode == "forward":
        return 2 * sizes[0] * sum(pairs[1:])
    return 2 * sizes[-1] * sum(pairs[:-1])


def jacobian_bytes(y: Shape, x: Shape, element: int) -> int:
    """Bytes of ∂y/∂x built whole: a number for every pair of elements."""
    return prod(y) * prod(x) * element


def vjp_bytes(x: Shape, element: int) -> int:
    """Bytes of a VJP's result: as large as x, whatever y is."""
    return prod(x) * element
