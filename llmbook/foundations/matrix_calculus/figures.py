"""What the matrix calculus chapter draws: shapes in both layouts, real Jacobians, products from either end, bytes."""

import functools
import math
from collections.abc import Callable

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.hardware import gpu
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW

from .entries import SUBSCRIPT, entries, names
from .layouts import DENOMINATOR, KINDS, NUMERATOR, Shape, as_matrix, derivative, derivative_shape
from .vjp import jacobian_bytes, product_flop, vjp_bytes

Tensor = torch.Tensor
LAYOUTS = (NUMERATOR, DENOMINATOR)
Y_SHAPES: dict[str, Shape] = {"scalar": (), "vector": (3,), "matrix": (2, 2)}
X_SHAPES: dict[str, Shape] = {"scalar": (), "vector": (4,), "matrix": (2, 3)}
Y_COLORS, X_COLORS = [BLUE, PURPLE, TEAL, GREEN], [ORANGE, RED, YELLOW, GREY, "#c2477f", "#8a6d3b"]
WIDTH = 780


def _plain(color: str) -> Callable[[int, int], tuple[str, float]]:
    return lambda row, column: (color, 1.0)


def shapes(y: str, x: str, layout: str) -> svg.SVG:
    """y and x as tiles, and their derivative with ∂yᵢ/∂xⱼ in every tile."""
    sizes = Y_SHAPES[y], X_SHAPES[x]
    parts: draw.Elements = []
    for top, word, shape, colors, kind in ((38, "y", sizes[0], Y_COLORS, y), (212, "x", sizes[1], X_COLORS, x)):
        columns = as_matrix(shape)[1]
        parts += draw.text(4, top - 14, f"{word}, a {kind} {list(shape)}", bold=True)
        for n, name in enumerate(names(word, shape)):
            at = 4 + n % columns * 46, top + n // columns * 34
            parts += draw.box(*at, 43, 31, colors[n], name, size=14)
    grid = entries(*sizes, layout)
    left, top, wide, tall = 228, 84, 91, 44
    words = f"∂y/∂x, {layout} layout: {len(grid)} × {len(grid[0])}"
    parts += draw.text(left, 24, words, bold=True, size=16) + draw.text(left, 48, _note(y, x, layout))
    y_names, x_names = names("y", sizes[0]), names("x", sizes[1])
    for side, lines in (("down", grid), ("across", list(zip(*grid, strict=True)))):
        which, words_of = (0, y_names) if (side == "down") == (layout == NUMERATOR) else (1, x_names)
        common = [{entry[which] for entry in along} for along in lines]
        if any(len(one) > 1 for one in common) or (len(lines) > 1 and len(words_of) == 1):
            continue  # rows (or columns) of a matrix's gradient belong to no single element
        for n, (one,) in enumerate(common):
            at = (left - 10, top + n * tall + 22) if side == "down" else (left + n * wide + 44, top - 9)
            parts += draw.text(*at, words_of[one], anchor="end" if side == "down" else "middle", bold=True, size=14)
    for r, row in enumerate(grid):
        for c, (i, j) in enumerate(row):
            at = left + c * wide, top + r * tall
            parts += draw.box(*at, wide - 3, tall - 10, Y_COLORS[i], f"∂{y_names[i]}/∂{x_names[j]}", size=13)
            parts += draw.box(at[0], at[1] + tall - 11, wide - 3, 7, X_COLORS[j])
    return draw.canvas(WIDTH, max(356, top + len(grid) * tall + 8), parts)


def _note(y: str, x: str, layout: str) -> str:
    axes = KINDS.index(y) + KINDS.index(x)
    if axes > 2:
        order = "vec(y) down, vec(x) across" if layout == NUMERATOR else "vec(x) down, vec(y) across"
        return f"{axes} axes: no matrix holds it, so both are flattened: {order}"
    return f"{'y' if layout == NUMERATOR else 'x'} keeps its shape, {'x' if layout == NUMERATOR else 'y'} is transposed"


def shapes_caption(y: str, x: str, layout: str) -> str:
    grid = entries(Y_SHAPES[y], X_SHAPES[x], layout)
    many = len(grid) * len(grid[0])
    where = f"{len(grid)} × {len(grid[0])}"
    tensor = list((*Y_SHAPES[y], *X_SHAPES[x]))
    return (
        f"A {y} by a {x} in {layout} layout: {many} number{'s' * (many > 1)} in {where}; {_note(y, x, layout)}. "
        f"A tile's colour names the element of y, its stripe the element of x. PyTorch returns the shape {tensor}."
    )


def overall() -> svg.SVG:
    """All pairs of kinds, both layouts side by side."""
    parts: draw.Elements = draw.text(4, 20, "y  \\  x", bold=True)
    for c, x in enumerate(KINDS):
        parts += draw.text(222 + c * 232, 20, f"{x} x {list(X_SHAPES[x])}", bold=True, anchor="middle")
    for r, y in enumerate(KINDS):
        top = 36 + r * 122
        parts += draw.text(4, top + 52, f"{y} y", bold=True) + draw.text(4, top + 70, str(list(Y_SHAPES[y])))
        for c, x in enumerate(KINDS):
            left = 112 + c * 232
            parts += draw.box(left - 6, top, 228, 114, GREY, opacity=0.13)
            if r + c > 2:
                parts += draw.text(left + 108, top + 50, f"{r + c} axes: no matrix", anchor="middle")
                tensor = [*Y_SHAPES[y], *X_SHAPES[x]]
                parts += draw.text(left + 108, top + 70, f"PyTorch: {tensor}", anchor="middle")
                continue
            for n, (layout, color) in enumerate(((NUMERATOR, BLUE), (DENOMINATOR, ORANGE))):
                rows, columns = derivative_shape(Y_SHAPES[y], X_SHAPES[x], layout)
                at = left + n * 112
                parts += draw.matrix(at, top + 30, rows, columns, 18, _plain(color))
                parts += draw.text(at, top + 19, f"{layout[:5]}. {rows}×{columns}", color=color, bold=True)
    return draw.canvas(WIDTH + 20, 404, parts)


def overall_caption() -> str:
    fit = sum(r + c <= 2 for r in range(3) for c in range(3))
    return (
        f"Of nine pairs, {fit} fit a matrix. Blue is numerator layout, orange denominator layout: "
        "always each other's transpose. The other three have three or four axes."
    )


N = 4
START = torch.tensor([0.6, -0.4, 0.2, -0.1], dtype=torch.float64)
A = torch.tensor([[1, -2, 0, 3], [0, 1, 2, -1], [2, 0, -1, 1]], dtype=torch.float64) / 2
SQUARE = torch.cat([A, torch.ones(1, N, dtype=torch.float64)])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise, tanh(x)": torch.tanh,
    "linear, A x": lambda x: A @ x,
    "softmax(x)": lambda x: x.softmax(0),
    "inner product, ⟨x, M x⟩": lambda x: x @ (SQUARE @ x),
}
FILLS = {
    "elementwise, tanh(x)": "diagonal: each output reads one input",
    "linear, A x": "the same wherever x is; Aᵀ in denominator layout",
    "softmax(x)": "diag(p) − ppᵀ: full, as every output shares one sum",
    "inner product, ⟨x, M x⟩": "one number per input: the output is a scalar",
}


@functools.cache
def filled(function: str, layout: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and ∂y/∂x from torch.func."""
    x = START * scale
    return x, FUNCTIONS[function](x), derivative(FUNCTIONS[function], x, layout)


def fills(function: str, layout: str, scale: float) -> svg.SVG:
    """x, y and the Jacobian with its real numbers: blue above zero, red below, grey for zero."""
    x, y, found = filled(function, layout, scale)
    parts: draw.Elements = []
    for left, word, values in ((4, "x", x), (120, "y", y)):
        column = values.reshape(-1, 1)
        parts += _numbers(left, 62, column, 62, 46)
        parts += draw.text(left, 46, f"{word} {list(values.shape)}", bold=True)
    left, wide = 320, 82
    rows, columns = found.shape
    parts += draw.text(left, 20, f"∂y/∂x, {layout} layout: {rows} × {columns}", bold=True, size=16)
    parts += _numbers(left, 62, found, wide, 46)
    down, across = ("y", "x") if layout == NUMERATOR else ("x", "y")
    scalar = y.ndim == 0
    for r in range(rows):
        label = "y" if scalar and down == "y" else f"{down}{r + 1}".translate(SUBSCRIPT)
        parts += draw.text(left - 12, 62 + r * 46 + 28, label, anchor="end", bold=True, size=15)
    for c in range(columns):
        label = "y" if scalar and across == "y" else f"{across}{c + 1}".translate(SUBSCRIPT)
        parts += draw.text(left + c * wide + wide / 2, 52, label, anchor="middle", bold=True, size=15)
    parts += draw.text(left, 272, FILLS[function], size=14)
    return draw.canvas(WIDTH, 286, parts)


def _numbers(left: float, top: float, values: Tensor, wide: float, tall: float) -> draw.Elements:
    most = float(values.abs().max()) or 1.0
    parts: draw.Elements = []
    for r, row in enumerate(values.tolist()):
        for c, value in enumerate(row):
            zero = abs(value) < 1e-12
            color = GREY if zero else BLUE if value > 0 else RED
            strong = 0.15 if zero else 1.0 if abs(value) > 0.55 * most else 0.55 if abs(value) > 0.2 * most else 0.3
            words = "0" if zero else f"{value:.3f}".replace("-", "−")
            at = left + c * wide, top + r * tall
            parts += draw.box(*at, wide - 3, tall - 3, color, words, opacity=strong, size=14)
    return parts


def fills_caption(function: str, layout: str, scale: float) -> str:
    _, y, found = filled(function, layout, scale)
    zeros = int((found.abs() < 1e-12).sum())
    largest = float(found.abs().max())
    same = found.shape == found.T.shape and torch.allclose(found, found.T)
    twin = "symmetric, so only the labels change with the layout" if same else f"{found.shape[0]} × {found.shape[1]}"
    return (
        f"{function[0].upper()}{function[1:]} at scale {scale:g}, {layout} layout ({twin}): {zeros} of {found.numel()} "
        f"entries are zero, the largest is {largest:.3f} in size, and the largest output is {float(y.max()):.3f}."
    )


CHAINS = {
    "Many to one, like a loss: 8 → 6 → 4 → 1": (8, 6, 4, 1),
    "One to many: 1 → 4 → 6 → 8": (1, 4, 6, 8),
    "Square: 5 → 5 → 5 → 5": (5, 5, 5, 5),
}


def direction(chain: str, mode: str, step: int) -> svg.SVG:
    """The three Jacobians of a chain, and the running product after some of its multiplications."""
    sizes, cell = CHAINS[chain], 17
    done = range(3 - step, 3) if mode == "reverse" else range(step)
    parts: draw.Elements = draw.text(4, 20, "∂y/∂x = J₃ · J₂ · J₁", bold=True, size=16)
    at = 4.0
    for n in (2, 1, 0):
        rows, columns = sizes[n + 1], sizes[n]
        color = GREEN if n in done else GREY
        label = f"J{'₁₂₃'[n]}: {rows}×{columns}"
        parts += draw.matrix(at, 60, rows, columns, cell, _plain(color), label=label)
        at += max(columns * cell, 74) + 24
    first, last = min(done), max(done)
    rows, columns = sizes[last + 1], sizes[first]
    left = 480.0
    parts += draw.line(at, 68, left - 14, 68, arrow=True, width=2.5)
    held = "·".join(f"J{'₁₂₃'[n]}" for n in reversed(done))
    parts += draw.matrix(left, 60, rows, columns, cell, _plain(ORANGE), label=f"{held}: {rows}×{columns}")
    end, way = ("output, with J₃,", "rightwards") if mode == "reverse" else ("input, with J₁,", "leftwards")
    parts += draw.text(180, 20, f"{mode} mode starts at the {end} and multiplies {way}", size=14)
    totals = {one: product_flop(sizes, one) for one in ("forward", "reverse")}
    most = max(totals.values())
    for n, (one, total) in enumerate(totals.items()):
        y = 216 + n * 34
        parts += draw.text(4, y + 19, f"{one}, all", bold=one == mode)
        parts += draw.box(110, y, 470 * total / most, 26, ORANGE, opacity=0.35)
        if one == mode:
            parts += draw.box(110, y, 470 * _spent(sizes, mode, step) / most, 26, ORANGE)
        parts += draw.text(120 + 470 * total / most, y + 19, f"{total} FLOP")
    return draw.canvas(WIDTH, 288, parts)


def _spent(sizes: tuple[int, ...], mode: str, step: int) -> int:
    part = sizes[: step + 1] if mode == "forward" else sizes[3 - step :]
    return product_flop(part, mode) if step > 1 else 0


def direction_caption(chain: str, mode: str, step: int) -> str:
    sizes = CHAINS[chain]
    other = "forward" if mode == "reverse" else "reverse"
    done, total, rival = _spent(sizes, mode, step), product_flop(sizes, mode), product_flop(sizes, other)
    rows = sizes[-1] if mode == "reverse" else sizes[step]
    columns = sizes[0] if mode == "forward" else sizes[3 - step]
    return (
        f"{chain}; {mode} mode, {step} of 3 Jacobians used: the running product is {rows} × {columns}, after "
        f"{done} of {total} FLOP. {other.capitalize()} mode needs {rival} in all."
    )


BY = ("its input x", "its weights W")
MEMORY = gpu("H200 SXM").memory * 1e9


def sizes_of(by: str, width: int, tokens: int) -> tuple[Shape, Shape]:
    """Shapes of the layer's output and of what it is differentiated by."""
    return (tokens, width), (tokens, width) if by == BY[0] else (width, width)


def human(count: float) -> str:
    """Bytes in a unit of a readable size."""
    power = int(math.log10(count) + 1e-9) // 3
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def bytes_bars(by: str, width: int, tokens: int) -> svg.SVG:
    """Bytes of the Jacobian and of the VJP's result on one logarithmic axis."""
    y, x = sizes_of(by, width, tokens)
    left, scale, low = 14.0, 45.0, 2
    rows = (("the Jacobian", jacobian_bytes(y, x, 2), RED), ("what a VJP returns", vjp_bytes(x, 2), GREEN))
    parts = draw.text(left, 20, f"Y = X W, {tokens} × {width} by {width} × {width}, bf16; by {by}", bold=True, size=15)
    for power in range(3, 19, 3):
        at = left + (power - low) * scale
        parts += draw.line(at, 40, at, 196, opacity=0.3)
        parts += draw.text(at, 214, human(10.0**power), anchor="middle")
    for n, (name, amount, color) in enumerate(rows):
        wide = (math.log10(amount) - low) * scale
        parts += draw.box(left, 66 + n * 68, wide, 38, color)
        parts += draw.text(left + 2, 60 + n * 68, f"{name}: {human(amount)}", bold=True, size=14)
    limit = left + (math.log10(MEMORY) - low) * scale
    parts += draw.line(limit, 40, limit, 196, dashed=True, width=2.5, color=PURPLE)
    parts += draw.text(limit + 6, 190, f"one H200: {human(MEMORY)}", color=PURPLE, bold=True)
    return draw.canvas(WIDTH, 222, parts)


def bytes_caption(by: str, width: int, tokens: int) -> str:
    y, x = sizes_of(by, width, tokens)
    whole, result = jacobian_bytes(y, x, 2), vjp_bytes(x, 2)
    fits = "would fit" if whole <= MEMORY else "would not fit"
    return (
        f"A {width} × {width} linear layer on {tokens} token{'s' * (tokens > 1)}, by {by}: the Jacobian would take "
        f"{human(whole)} and {fits} in an H200; the VJP's result takes {human(result)}, {whole // result:,} times less."
    )
