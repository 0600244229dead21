"""Which pair of elements stands at which place of a derivative: what the shape explorer is drawn from."""

import itertools
import math

from .layouts import NUMERATOR, Shape, as_matrix, derivative_shape

SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def names(letter: str, shape: Shape) -> list[str]:
    """y; y₁, y₂ …; or y₁₁, y₁₂ … row by row."""
    places = itertools.product(*[range(1, size + 1) for size in shape])
    return [letter + "".join(map(str, place)).translate(SUBSCRIPT) for place in places]


def entries(y: Shape, x: Shape, layout: str) -> list[list[tuple[int, int]]]:
    """Which (element of y, element of x) stands where; through vec where no matrix holds the pair."""
    many_y, many_x = math.prod(y), math.prod(x)
    if len(y) + len(x) > 2:
        grid = [[(i, j) for j in range(many_x)] for i in range(many_y)]
    else:
        rows, columns = derivative_shape(y, x, NUMERATOR)
        (_, y_wide), (_, x_wide) = as_matrix(y), as_matrix(x)
        if len(x) == 2:
            grid = [[(0, c * x_wide + r) for c in range(columns)] for r in range(rows)]
        else:
            grid = [[(r * y_wide + (c if len(y) == 2 else 0), c if len(x) else 0) for c in range(columns)]
                    for r in range(rows)]
    return grid if layout == NUMERATOR else [list(column) for column in zip(*grid, strict=True)]
