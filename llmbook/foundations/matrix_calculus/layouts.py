"""A derivative's shape and arrangement in numerator and denominator layout, and the chain rule in either."""

from collections.abc import Callable, Sequence
from math import prod

import torch

Tensor = torch.Tensor
Shape = tuple[int, ...]
NUMERATOR, DENOMINATOR = "numerator", "denominator"
KINDS = ("scalar", "vector", "matrix")


def check_layout(layout: str) -> None:
    """Raises ValueError unless the layout is one of the two."""
    if layout not in (NUMERATOR, DENOMINATOR):
        raise ValueError(f"a layout is 'numerator' or 'denominator', not {layout!r}")


def as_matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns: a scalar is 1 × 1, a vector a column n × 1.

    Raises:
        ValueError: more than two axes.
    """
    if len(shape) > 2:
        raise ValueError(
            f"{list(shape)} has {len(shape)} axes; "
            "layouts are for scalars, vectors and matrices"
        )
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns


def derivative_shape(y: Shape, x: Shape, layout: str) -> tuple[int, int]:
    """Rows and columns of ∂y/∂x.

    Args:
        y, x: shapes; () is a scalar, (n,) a vector, (r, c) a matrix.
        layout: "numerator" (y keeps its shape, x is transposed) or
            "denominator" (the reverse, so the transpose).

    Raises:
        ValueError: an unknown layout, or a pair that no matrix holds.
    """
    check_layout(layout)
    (y_rows, y_columns), (x_rows, x_columns) = as_matrix(y), as_matrix(x)
    if len(y) + len(x) > 2:
        raise ValueError(
            f"a {KINDS[len(y)]} {list(y)} by a {KINDS[len(x)]} {list(x)} "
            f"has {len(y) + len(x)} axes, and a matrix has two: "
            "flatten with vec, or keep the tensor [*y, *x]"
        )
    rows, columns = y_rows * x_columns, y_columns * x_rows
    return (rows, columns) if layout == NUMERATOR else (columns, rows)


def arrange(tensor: Tensor, y: Shape, x: Shape, layout: str) -> Tensor:
    """PyTorch's derivative [*y, *x] as the matrix that the layout wants.

    Raises:
        ValueError: as derivative_shape, or a tensor that is not [*y, *x].
    """
    rows, columns = derivative_shape(y, x, layout)
    if tensor.shape != (*y, *x):
        raise ValueError(
            f"∂y/∂x of y {list(y)} and x {list(x)} is a tensor "
            f"{[*y, *x]}, not {list(tensor.shape)}"
        )
    if layout == DENOMINATOR:
        return arrange(tensor, y, x, NUMERATOR).T
    # Only a matrix x has two axes to swap; y's axes come first as they are.
    flipped = tensor.mT if len(x) == 2 else tensor
    return flipped.reshape(rows, columns)


def derivative(
    function: Callable[[Tensor], Tensor], x: Tensor, layout: str
) -> Tensor:
    """∂function(x)/∂x by torch.func.jacrev, arranged in a layout."""
    y = function(x)
    found = torch.func.jacrev(function)(x)
    return arrange(found, tuple(y.shape), tuple(x.shape), layout)


def chain(steps: Sequence[Tensor], layout: str) -> Tensor:
    """The derivative of a composition, from those of its steps.

    Args:
        steps: matrices, the step applied first standing first. Numerator
            layout: [out, in] each; denominator layout: [in, out] each.

    Returns: numerator: last @ … @ first; denominator: first @ … @ last.

    Raises:
        ValueError: no steps, or two neighbours that do not fit; says which.
    """
    check_layout(layout)
    if not steps:
        raise ValueError("a chain needs at least one step")
    into, out = (1, 0) if layout == NUMERATOR else (0, 1)
    product = steps[0]
    for n, step in enumerate(steps[1:], 2):
        gives, takes = steps[n - 2].shape[out], step.shape[into]
        if gives != takes:
            raise ValueError(
                f"step {n - 1} gives {gives} numbers but step {n} takes "
                f"{takes}, read in {layout} layout"
            )
        product = step @ product if layout == NUMERATOR else product @ step
    return product


def vec_shape(y: Shape, x: Shape) -> tuple[int, int]:
    """Shape of ∂vec(y)/∂vec(x) in numerator layout; it exists for every pair."""
    return prod(y), prod(x)
