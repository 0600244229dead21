"""Views: a shape, a stride per dimension and an offset over one row of storage. Nothing is copied here."""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from .moves import cells


class Layout(NamedTuple):
    """Cell [i, j, …] of a view lies at storage offset + i·stride₀ + j·stride₁ + …

    Attributes:
        shape: cells per dimension.
        stride: storage cells from one index to the next, per dimension.
        offset: the storage cell of [0, 0, …].
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


def packed(shape: Sequence[int]) -> Layout:
    """The row-major layout: a dimension's stride is the product of the sizes
    after it. An empty dimension counts as 1, as in PyTorch."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return Layout(tuple(shape), tuple(reversed(stride)))


def address(view: Layout, cell: Sequence[int]) -> int:
    """The storage cell behind a view's cell.

    Raises:
        IndexError: the view has no such cell.
    """
    if len(cell) != len(view.shape) or not all(
        0 <= i < n for i, n in zip(cell, view.shape, strict=True)
    ):
        raise IndexError(f"no cell {list(cell)} in shape {list(view.shape)}")
    steps = zip(cell, view.stride, strict=True)
    return view.offset + sum(i * stride for i, stride in steps)


def transpose(view: Layout, a: int, b: int) -> Layout:
    """Exchange two dimensions: their sizes and strides change places."""
    order = list(range(len(view.shape)))
    order[a], order[b] = order[b], order[a]
    shape = tuple(view.shape[n] for n in order)
    return Layout(shape, tuple(view.stride[n] for n in order), view.offset)


def unsqueeze(view: Layout, dim: int) -> Layout:
    """Insert a dimension of size 1. Its stride is never used; PyTorch's is
    the size times the stride of the dimension that follows."""
    whole = [n * s for n, s in zip(view.shape, view.stride, strict=True)]
    step = whole[dim] if dim < len(whole) else 1
    shape = (*view.shape[:dim], 1, *view.shape[dim:])
    stride = (*view.stride[:dim], step, *view.stride[dim:])
    return Layout(shape, stride, view.offset)


def expand(view: Layout, shape: Sequence[int]) -> Layout:
    """Repeat dimensions of size 1 by stride 0: many cells, one address.

    Raises:
        ValueError: a dimension longer than 1 would have to change.
    """
    new = len(shape) - len(view.shape)
    old = [(1, 0)] * new + list(zip(view.shape, view.stride, strict=True))
    stride = []
    for n, (wanted, (size, step)) in enumerate(zip(shape, old, strict=True)):
        if size not in (1, wanted):
            raise ValueError(
                f"dimension {n} has {size} cells and cannot become {wanted}: "
                "only size 1 expands"
            )
        stride.append(step if size == wanted and n >= new else 0)
    return Layout(tuple(shape), tuple(stride), view.offset)


def cut(view: Layout, dim: int, start: int, stop: int, step: int = 1) -> Layout:
    """x[start:stop:step] along dim: the offset moves, the stride grows.

    Needs 0 ≤ start ≤ stop ≤ size and step ≥ 1.
    """
    size = ceil((stop - start) / step)
    shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
    old = view.stride[dim]
    stride = (*view.stride[:dim], old * step, *view.stride[dim + 1 :])
    return Layout(shape, stride, view.offset + start * old)


def is_contiguous(view: Layout) -> bool:
    """Whether the cells, read row by row, lie side by side in storage."""
    found = [address(view, cell) for cell in cells(view.shape)]
    return found == list(range(view.offset, view.offset + len(found)))
