"""What the backprop chapter draws: recordings of its engine (a graph, memory, training) and softmax's two gradients."""

import functools
import itertools
from collections.abc import Callable

import svg
import torch

from llmbook.foundations.matrix_calculus.closed_forms import softmax_jacobian
from llmbook.kit import draw
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, RED, YELLOW

from . import scenes
from .engine import Var
from .memory import Timeline
from .network import Problem, timeline
from .training import network, recorded, spirals

Tensor = torch.Tensor
WIDTH = 860
ACTIVATIONS = ("relu", "silu")


def _shade(values: Tensor, color: str) -> Callable[[int, int], tuple[str, float]]:
    """Tiles whose opacity is the size of the value beside the largest."""
    size = values.abs() / values.abs().max().clamp_min(1e-300)
    return lambda r, c: (color, 0.08 + 0.23 * round(4 * float(size[r, c])))


def _tiles(x: float, y: float, values: Tensor, color: str, cell: float = 11) -> draw.Elements:
    """A value as tiles, centred at x, from y down."""
    grid = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    rows, columns = grid.shape
    return draw.matrix(x - columns * cell / 2, y, rows, columns, cell, _shade(grid, color))


@functools.cache
def moments(activation: str) -> list[scenes.Moment]:
    return scenes.record(activation)


def graph_steps(activation: str) -> range:
    return range(1, len(moments(activation)) + 1)


def graph(activation: str, step: int) -> svg.SVG:
    """Forward along the top, backward along the bottom, and between them what the one keeps for the other."""
    now = moments(activation)[step - 1]
    x, _, parameters = scenes.leaves()
    column = [64 + 128 * i for i in range(7)]
    top, middle, bottom = 126, 252, 356
    parts = draw.text(8, middle + 4, "kept", bold=True, color=GREEN) + draw.text(8, middle + 20, "between")
    for y, words, color in ((top, "forward →", BLUE), (bottom, "← backward", ORANGE)):
        parts += draw.text(8, y + 4, words, bold=True, color=color)
    parts += _tiles(column[0] - 8, top + 24, x, BLUE) + draw.text(column[0] - 8, top + 86, "x [4, 3]", anchor="middle")
    for at, (name, weight) in enumerate(parameters.items()):
        left = column[(1, 2, 4)[at]]
        parts += draw.text(left, 16, f"{name} {list(weight.shape)}", anchor="middle", bold=True)
        parts += _tiles(left - 31, 24, weight, BLUE, 10)
        parts += _tiles(left + 31, 24, now.leaf_gradients.get(name, torch.zeros_like(weight)), ORANGE, 10)
        parts += draw.line(left, 78, left, top - 14, arrow=True, opacity=0.6)
    for i, (op, result) in enumerate(zip(scenes.OPS, scenes.RESULTS, strict=True)):
        name = {"act": activation, "cross entropy": "loss"}.get(op, op)
        parts += _operation(now, i, name, result, column, (top, middle, bottom))
    # h goes, and its gradient comes, a second way.
    for found, color, near, far, start, end in (
        (now.values, BLUE, top - 14, top - 34, 3, 5), (now.gradients, ORANGE, bottom + 92, bottom + 112, 5, 3)
    ):
        a, b, lit = column[start] + 20, column[end] - 20, 1.0 if "u" in found else 0.25
        for line in ((a, near, a, far), (a, far, b, far)):
            parts += draw.line(*line, color=color, opacity=lit)
        parts += draw.line(b, far, b, near, color=color, opacity=lit, arrow=True)
    return draw.canvas(WIDTH + 30, bottom + 124, parts)


def _operation(
    now: scenes.Moment, i: int, op: str, result: str, column: list[int], rows: tuple[int, int, int]
) -> draw.Elements:
    """One operation: its box above, its backward below, its saved tensors between."""
    at, (top, middle, bottom) = column[i + 1], rows
    parts: draw.Elements = []
    for y, event, found, color in ((top, "forward", now.values, BLUE), (bottom, "backward", now.gradients, ORANGE)):
        lit = now.event == event and now.at == i
        parts += draw.box(at - 46, y - 14, 92, 104, color if lit else GREY, opacity=0.32 if lit else 0.12,
                          stroke=color if lit else None)
        name = op if event == "forward" else f"∂ℒ/∂{result}" if result != "loss" else "1"
        parts += draw.text(at, y + 4, name, anchor="middle", bold=True)
        if result in found:
            parts += _tiles(at, y + 18, found[result], color)
            words = f"{result} {list(found[result].shape)}" if event == "forward" else str(list(found[result].shape))
            parts += draw.text(at, y + 84, words, anchor="middle", size=12)
        done = result in found
        start, end = (column[i] + 46, at - 48) if event == "forward" else (column[i + 1] + 82, at + 48)
        if event == "forward" or i < 5:
            parts += draw.line(start, y + 40, end, y + 40, arrow=True, color=color, opacity=1 if done else 0.25)
    for n, name in enumerate(now.held.get(i, ())):
        color = COLORS["parameters"] if name in scenes.LEAVES else COLORS["activations"]
        parts += draw.box(at - 40, middle - 16 + 24 * n, 80, 20, color, name, size=13)
    if now.held.get(i):
        parts += draw.line(at, top + 92, at, middle - 18, color=GREEN, opacity=0.8)
        parts += draw.line(at, middle + 8 + 24 * (len(now.held[i]) - 1), at, bottom - 16, color=GREEN, arrow=True)
    return parts


def graph_caption(activation: str, step: int) -> str:
    now = moments(activation)[step - 1]
    kept = dict.fromkeys(name for names in now.held.values() for name in names)
    held = f"Held for backward: {', '.join(kept) or 'nothing'}."
    if now.event == "leaf":
        shape = list(now.leaf_gradients[scenes.LEAVES[now.at]].shape)
        return f"The gradient of {scenes.LEAVES[now.at]} has arrived, {shape}, as large as the parameter. {held}"
    op, result = scenes.OPS[now.at].replace("act", activation), scenes.RESULTS[now.at]
    if now.event == "forward":
        own = ", ".join(now.held[now.at]) or "nothing, its backward needs no values"
        return f"Forward, {op}: computes {result} {list(now.values[result].shape)} and keeps {own}. {held}"
    two = " It is the sum of two: h was used twice." if result == "h" else ""
    return f"Backward, {op}: ∂ℒ/∂{result} is complete and is pulled back through it.{two} {held}"


CHECKPOINTS = {"none": None, "every layer": 1, "every 2 layers": 2, "every 3 layers": 3, "all 6 layers in one": 6}
KIND = {"forward": (BLUE, "forward"), "again": (YELLOW, "forward again"), "backward": (ORANGE, "backward")}


@functools.cache
def memory_run(checkpoints: str) -> Timeline:
    """A step of six layers on 256 rows of width 128, 256 classes, float32, recorded."""
    return timeline(Problem(6, 256, 128, 256, dtype=torch.float32), CHECKPOINTS[checkpoints])


def memory_steps(checkpoints: str) -> range:
    return range(1, len(memory_run(checkpoints).steps) + 1)


def _lane(name: tuple[str, str]) -> str:
    where, op = name
    if not where or where == "head":
        return {"cross entropy": "log p"}.get(op, op)
    return f"{'a' if op == 'matmul' else 'h'}{'₁₂₃₄₅₆'[int(where) - 1]}"


def memory(checkpoints: str, step: int) -> svg.SVG:
    """Who is held when, as bars over steps, above the sum as a curve; faint what is still to come."""
    run, most = memory_run(checkpoints), max(len(memory_run(name).steps) for name in CHECKPOINTS)
    rows = ["x", *(f"{v}{n}" for n in "₁₂₃₄₅₆" for v in "ah"), "log p", "labels"]
    left, top, tall, wide = 66.0, 64.0, 17.0, (WIDTH - 76) / most
    base, height = top + tall * len(rows) + 150, 118.0
    parts = _strip(run, left, wide)
    names: draw.Elements = [svg.Text(x=58, y=77 + 17 * n, text=name) for n, name in enumerate(rows)]
    parts.append(svg.G(elements=names, extra={"text-anchor": "end"}))  # one attribute for all: there are 296 frames
    paths: dict[tuple[str, float], str] = {}
    for holding in run.holdings:
        x, y = left + holding.start * wide, top + rows.index(_lane(holding.name)) * tall + 2
        color = YELLOW if holding.again else GREEN
        for end, opacity in ((holding.end + 1, 0.22), (min(holding.end + 1, step), 1.0)):
            if end > holding.start:
                bar = f"M{x:.0f} {y:.0f}h{(end - holding.start) * wide - 1:.0f}v{tall - 4:.0f}H{x:.0f}z"
                paths[color, opacity] = paths.get((color, opacity), "") + bar
    for (color, opacity), path in paths.items():
        parts.append(svg.Path(fill=color, fill_opacity=opacity, extra={"d": path}))
    scale = height / max(memory_run(name).peak for name in CHECKPOINTS)
    held = [s.held for s in run.steps]
    curves: tuple[tuple[list[int], str, int, float], ...] = (
        ([s.held for s in memory_run("none").steps], GREY, most, 0.35), (held, GREEN, most, 0.22),
        (held, YELLOW, step, 1), (run.held_since_forward(), GREEN, step, 1),
    )
    for series, color, last, opacity in curves:
        levels = [(value, len(list(same))) for value, same in itertools.groupby(series[:last])]
        curve = "".join(f"V{base - value * scale:.0f}h{many * wide:.1f}" for value, many in levels)
        parts.append(svg.Path(fill=color, fill_opacity=opacity, extra={"d": f"M{left} {base}{curve}V{base}z"}))
    peak = base - run.peak * scale
    parts += draw.line(left, peak, WIDTH - 10, peak, dashed=True, color=RED)
    parts += draw.text(WIDTH - 10, peak - 5, f"peak {run.peak / 1024:,.0f} KiB", anchor="end", color=RED, bold=True)
    parts += draw.line(left, base, WIDTH - 10, base) + draw.text(left - 8, base, "0", anchor="end")
    parts += draw.text(left - 8, base - height + 4, "bytes", anchor="end")
    x = left + (step - 0.5) * wide
    parts += draw.line(x, 40, x, base, width=2, opacity=0.75)
    return draw.canvas(WIDTH, base + 12, parts)


def _strip(run: Timeline, left: float, wide: float) -> draw.Elements:
    """The steps as a coloured strip, and its legend."""
    parts: draw.Elements = []
    for i, (kind, (color, words)) in enumerate(KIND.items()):
        path, at = "", left
        for found, group in itertools.groupby(s.kind for s in run.steps):
            long = len(list(group)) * wide
            path, at = path + (f"M{at:.1f} 39h{long - 1:.1f}" if found == kind else ""), at + long
        look = {"d": path or "M0 0", "stroke-dasharray": f"{wide - 1:.1f} 1"}
        parts.append(svg.Path(stroke=color, stroke_width=18, extra=look))
        parts += draw.box(left + 136 * i, 6, 14, 14, color) + draw.text(left + 136 * i + 20, 18, words)
    held = ((GREEN, "held since forward", 0), (YELLOW, "held again", 156), (GREY, "no checkpoints", 262))
    for color, words, more in held:
        at = left + 400 + more
        parts += draw.box(at, 6, 14, 14, color, opacity=0.5 if color == GREY else 1) + draw.text(at + 20, 18, words)
    return parts


def memory_caption(checkpoints: str, step: int) -> str:
    run = memory_run(checkpoints)
    now, plain = run.steps[step - 1], memory_run("none")
    where = f"layer {now.where}" if now.where != "head" else "the head"
    return (
        f"Checkpoints: {checkpoints}. Step {step} of {len(run.steps)}, {KIND[now.kind][1]} of {now.op} in {where}: "
        f"the graph holds {now.held / 1024:,.0f} KiB. Peak {run.peak / 1024:,.0f} KiB, without checkpoints "
        f"{plain.peak / 1024:,.0f}; {sum(s.kind == 'again' for s in run.steps)} operations run twice."
    )


LOGITS = {
    "one ahead": (4.0, 1.5, 0.5, 0.0, -1.0), "two rivals": (3.0, 2.8, 0.0, -0.5, -1.0),
    "nearly alike": (0.8, 0.5, 0.2, 0.0, -0.3),
}


def softmax_at(logits: str, temperature: float) -> Tensor:
    return (torch.tensor(LOGITS[logits], dtype=torch.float64) / temperature).softmax(0)


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.0005 else "≈ 0"


def two_gradients(logits: str, temperature: float, label: int) -> svg.SVG:
    """p and y, the Jacobian diag(p) - p pᵀ with the label's column marked, and p - y made from that column."""
    p, n = softmax_at(logits, temperature), 5
    jacobian, gradient = softmax_jacobian(p), p - torch.eye(n, dtype=torch.float64)[label]
    cell, top, left = 62.0, 64.0, 236.0
    parts = draw.text(8, 22, "p, and the label", bold=True, size=15)
    parts += draw.text(left, 22, "softmax alone: diag(p) − p pᵀ", bold=True, size=15)
    parts += draw.text(left + 5 * cell + 40, 22, "softmax + cross-entropy: p − y", bold=True, size=15)
    largest = float(jacobian.abs().max())
    for i in range(n):
        at = top + i * cell
        parts += draw.text(8, at + 34, f"class {i}", bold=i == label)
        parts += draw.box(66, at + 12, max(100 * float(p[i]), 1), 36, COLORS["P"])
        parts += draw.text(72 + 100 * float(p[i]), at + 34, f"{p[i]:.3f}")
        if i == label:
            parts += draw.box(66, at + 8, 100, 44, "none", stroke=GREEN)
        for j in range(n):
            value = float(jacobian[i, j])
            strong, color = round(abs(value) / largest, 2), BLUE if value > 0 else ORANGE
            parts += draw.box(left + j * cell, at, cell - 3, cell - 3, color, opacity=strong)
            ink = "#000000" if strong > 0.6 else "currentColor"
            parts += draw.text(left + j * cell + 30, at + 35, _signed(value), anchor="middle", color=ink)
        middle, long = left + 5 * cell + 150, 100 * float(gradient[i])
        color = BLUE if long > 0 else ORANGE
        parts += draw.box(min(middle, middle + long), at + 12, max(abs(long), 1), 36, color)
        parts += draw.text(middle + 110, at + 34, _signed(float(gradient[i])))
    parts += draw.line(left + 5 * cell + 150, top, left + 5 * cell + 150, top + 5 * cell - 3, opacity=0.5)
    parts += draw.box(left + label * cell - 3, top - 4, cell + 3, 5 * cell + 4, "none", stroke=GREEN)
    at = left + label * cell + 30
    parts += draw.text(at, top - 12, f"÷ −{p[label]:.3f}", anchor="middle", color=GREEN, bold=True)
    return draw.canvas(WIDTH, top + 5 * cell + 8, parts)


def two_gradients_caption(logits: str, temperature: float, label: int) -> str:
    p = softmax_at(logits, temperature)
    size, most = softmax_jacobian(p).abs().sum(), (p - torch.eye(5, dtype=torch.float64)[label]).abs().sum()
    return (
        f"Logits {logits}, divided by {temperature:g}; the label is class {label}, p = {p[label]:.3f}. The marked "
        f"column of the Jacobian, divided by −p of the label, is p − y. Sizes: the Jacobian's entries sum to "
        f"{size:.3f}, p − y's to {most:.3f}."
    )


EPOCHS = (0, 10, 30, 100, 300, 1000)
training = functools.cache(functools.partial(recorded, EPOCHS, 1.0))


def classifier(after: int) -> svg.SVG:
    """What the classifier says everywhere, and the loss curve up to here."""
    (losses, saved), (x, labels) = training(), spirals()
    side, cells, colors = 330.0, 44, (BLUE, ORANGE, GREEN)
    axis = torch.linspace(-1.15, 1.15, cells, dtype=torch.float64)
    grid = torch.cartesian_prod(-axis, axis)[:, [1, 0]]
    said = network(Var(grid), *map(Var, saved[after])).value.argmax(-1).view(cells, cells).tolist()
    parts = draw.matrix(8, 8, cells, cells, side / cells, lambda r, c: (colors[said[r][c]], 0.3))
    for (px, py), label in zip(x.tolist(), labels.tolist(), strict=True):
        cx, cy = (round(8 + side * (0.5 + v / 2.3), 1) for v in (px, -py))
        parts.append(svg.Circle(cx=cx, cy=cy, r=4, fill=colors[label], stroke="currentColor", stroke_width=0.7))
    left, base, tall, wide = 410.0, 300.0, 262.0, 430.0
    points = [(left + wide * i / EPOCHS[-1], base - tall * losses[i] / losses[0]) for i in range(0, EPOCHS[-1] + 1, 5)]
    for last, opacity in ((EPOCHS[-1], 0.25), (after, 1.0)):
        path = "L".join(f"{px:.0f} {py:.0f}" for px, py in points[: last // 5 + 1])
        parts.append(svg.Path(stroke=RED, fill="none", stroke_width=2.5, opacity=opacity, extra={"d": f"M{path}"}))
    at = points[after // 5]
    parts.append(svg.Circle(cx=round(at[0], 1), cy=round(at[1], 1), r=6, fill=RED))
    parts += draw.line(left, base, left + wide, base) + draw.line(left, base, left, base - tall - 10)
    parts += draw.text(left + 8, 30, f"loss {losses[after]:.4f}", bold=True, size=16)
    parts += draw.text(left, base + 20, "0 steps") + draw.text(left + wide, base + 20, f"{EPOCHS[-1]}", anchor="end")
    return draw.canvas(WIDTH, side + 16, parts)


def classifier_caption(after: int) -> str:
    (losses, saved), (x, labels) = training(), spirals()
    right = (network(Var(x), *map(Var, saved[after])).value.argmax(-1) == labels).double().mean()
    return f"After {after} steps of gradient descent: loss {losses[after]:.4f}, {right:.0%} of the points are right."
