"""gather, scatter, topk and bincount as lists of moves: which cell goes where. No tensor arithmetic is used."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch

Tensor = torch.Tensor
Cell = tuple[int, ...]


class Move(NamedTuple):
    """One value's way: from a cell of the source to a cell of the target."""

    source: Cell
    target: Cell


def cells(shape: Sequence[int]) -> Iterable[Cell]:
    """Every cell of a shape, row by row; the last index runs fastest."""
    return product(*(range(size) for size in shape))


def replaced(cell: Cell, dim: int, position: int) -> Cell:
    """The cell with its coordinate `dim` exchanged for `position`."""
    return (*cell[:dim], position, *cell[dim + 1 :])


def positions(index: Tensor, dim: int, size: int) -> list[tuple[Cell, Cell]]:
    """Each cell of an index tensor, and that cell with coordinate `dim` replaced.

    Args:
        index: any shape, an integer dtype, its values in [0, size).
        dim: the replaced coordinate, 0 ≤ dim < index.ndim.
        size: how long the indexed dimension is.

    Raises:
        TypeError: the index holds no integers.
        IndexError: dim or a value is out of range; says where.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"an index holds integers, not {index.dtype}")
    if not 0 <= dim < index.ndim:
        raise IndexError(f"dim {dim} of an index with {index.ndim} dimensions")
    found = []
    for cell in cells(index.shape):
        position = int(index[cell])
        if not 0 <= position < size:
            raise IndexError(
                f"index{list(cell)} is {position}, but dimension {dim} has "
                f"{size} cells: 0 ≤ index < {size}"
            )
        found.append((cell, replaced(cell, dim, position)))
    return found


def gather_moves(index: Tensor, dim: int, size: int) -> list[Move]:
    """out[i][j] = x[i][index[i][j]]: the index says where to fetch."""
    return [Move(there, here) for here, there in positions(index, dim, size)]


def scatter_moves(index: Tensor, dim: int, size: int) -> list[Move]:
    """out[i][index[i][j]] = src[i][j]: the index says where to put."""
    return [Move(here, there) for here, there in positions(index, dim, size)]


def topk_moves(x: Tensor, k: int, dim: int) -> list[Move]:
    """The k largest along `dim`, largest first; of equals the earlier one.

    Raises:
        ValueError: k is not in [0, x.shape[dim]].
    """
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(f"k = {k} of {x.shape[dim]} values along dim {dim}")
    lanes = list(x.shape)
    lanes[dim] = 1
    moves = []
    for lane in cells(lanes):
        line = [replaced(lane, dim, n) for n in range(x.shape[dim])]
        ranked = sorted(line, key=lambda cell: -float(x[cell]))
        moves += [
            Move(cell, replaced(lane, dim, n))
            for n, cell in enumerate(ranked[:k])
        ]
    return sorted(moves, key=lambda move: move.target)


def bincount_moves(labels: Tensor) -> list[Move]:
    """Each label goes to the bin of its own value, where a 1 is added.

    Raises:
        ValueError: labels are not one-dimensional and non-negative.
    """
    if labels.ndim != 1 or (labels < 0).any():
        raise ValueError("bincount takes one dimension of values ≥ 0")
    return [Move((n,), (label,)) for n, label in enumerate(labels.tolist())]


def apply(
    moves: Iterable[Move], source: Tensor, target: Tensor, add: bool = False
) -> Tensor:
    """A copy of target after all moves, in order: later ones overwrite.

    Args:
        source: what is read; target: what the result starts from.
        add: add to the target's cell instead of replacing it.
    """
    out = target.clone()
    for move in moves:
        value = source[move.source]
        out[move.target] = out[move.target] + value if add else value
    return out
