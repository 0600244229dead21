"""What the chapter draws: the cube of a batch, what backward projects away, gradients by depth, learning rates."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import svg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from llmbook.kit import draw
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW, plot

from . import stack, training
from .examples import BATCH_AXES, FRONT, ONES, RIGHT, UP, B, D, S, stages, vectors

Point = tuple[float, float]

# The cube

NORMS = ("BatchNorm", "LayerNorm", "RMSNorm")
STEPS = ("x", "statistics", "x̂", "gain")
TOKENS = {"sequence 0, position 1": (0, 1), "sequence 1, position 3": (1, 3), "sequence 2, position 0": (2, 0)}
FEATURE = 2


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "z"


def _cell(b: int, s: int, d: int) -> list[Point]:
    """A tile of the layer b: features run to the lower right, positions to the lower left."""
    corner = lambda s, d: (118 + 25 * d - 24 * s, 58 + 128 * b + 9.5 * d + 12.5 * s)  # noqa: E731
    return [corner(s, d), corner(s, d + 0.92), corner(s + 0.92, d + 0.92), corner(s + 0.92, d)]


def cube(step: str, norm: str, token: str) -> svg.SVG:
    """The batch as B layers of [S, D] tiles; beside it the chosen token's numbers."""
    at, states = TOKENS[token], stages(norm)
    now = states[max(0, STEPS.index(step) - 1)]
    lit_now = step != "x"
    parts = draw.text(8, 20, f"{norm}: the batch, [B=3, S=4, D=6]", bold=True)
    looks: dict[tuple[str, float], list[str]] = {}
    lit_cells = []
    for b in range(B):
        for s in range(S):
            for d in range(D):
                value = float(now[b, s, d])
                group = d == FEATURE if norm == "BatchNorm" else (b, s) == at
                color = ORANGE if value > 0 else BLUE
                strength = min(1.0, 0.2 + abs(value) / 2.2)
                faint = 0.35 if lit_now and not group else 1
                looks.setdefault((color, round(strength * faint, 1)), []).append(_path(_cell(b, s, d)))
                if group and lit_now and norm == "BatchNorm":
                    lit_cells.append(_path(_cell(b, s, d)))
    for (color, opacity), paths in looks.items():
        parts.append(svg.Path(fill=color, fill_opacity=opacity, extra={"d": "".join(paths)}))
    row = _path([_cell(*at, 0)[0], _cell(*at, D - 1)[1], _cell(*at, D - 1)[2], _cell(*at, 0)[3]])
    if lit_now:
        lit = "".join(lit_cells) or row
        parts.append(svg.Path(fill="none", stroke=PURPLE, stroke_width=3 if lit_cells else 8, extra={"d": lit}))
    parts.append(svg.Path(fill="none", stroke="currentColor", stroke_width=2.2, extra={"d": row}))
    for b in range(B):
        parts += draw.text(20, 146 + 128 * b, f"b = {b}", mono=True, size=12)
    parts += draw.line(128, 48, 128 + 25 * D, 48 + 9.5 * D, color=GREY, arrow=True)
    parts += draw.text(214, 66, "features D", size=12)
    parts += draw.line(104, 52, 104 - 24 * S, 52 + 12.5 * S, color=GREY, arrow=True)
    parts += draw.text(10, 64, "tokens S", size=12)
    return draw.canvas(740, 440, parts, _token_panel(step, norm, at, states))


def _token_panel(step: str, norm: str, at: tuple[int, int], states: tuple[Tensor, Tensor, Tensor]) -> draw.Elements:
    """The token's six numbers as bars, then its statistics before and after."""
    shown = max(0, STEPS.index(step) - 1)
    left, zero, unit, wide = 330, 165, 48, 62
    titles = ("x", "x̂ = (x − μ)·r" if norm != "RMSNorm" else "x̂ = x·r",
              "x̂·gain" + (" + bias" if norm != "RMSNorm" else ""))
    parts = draw.text(left, 20, f"the outlined token: {titles[shown]}", bold=True)
    x = states[0]
    axes = BATCH_AXES if norm == "BatchNorm" else (-1,)
    mean = x.mean(axes, keepdim=True).expand_as(x)[at]
    square = (x if norm == "RMSNorm" else x - x.mean(axes, keepdim=True)).pow(2).mean(axes, keepdim=True)
    root = square.sqrt().expand_as(x)[at]
    for d in range(D):
        value, before = float(states[shown][at][d]), float(x[at][d])
        cx = left + wide * d
        if shown:
            top = min(zero, zero - unit * before)
            parts.append(svg.Rect(x=cx, y=round(top, 1), width=wide - 14, height=round(abs(before) * unit, 1),
                                  fill="none", stroke=GREY, stroke_width=1.2, stroke_dasharray=[3, 3]))
        top = min(zero, zero - unit * value)
        parts += draw.box(cx, top, wide - 14, abs(value) * unit, ORANGE if value > 0 else BLUE)
        words = f"{value:+.2f}".replace("-", "−")
        parts += draw.text(cx + (wide - 14) / 2, 292, words, anchor="middle", mono=True, size=13)
        if step == "statistics":
            middle = 0.0 if norm == "RMSNorm" else float(mean[d])
            spread = float(root[d])
            y = zero - unit * middle
            parts.append(svg.Rect(x=cx - 7, y=round(y - unit * spread, 1), width=wide, fill=PURPLE, fill_opacity=0.22,
                                  height=round(2 * unit * spread, 1)))
            if norm != "RMSNorm":
                parts += draw.line(cx - 7, y, cx + wide - 7, y, color=PURPLE, width=3)
    parts += draw.line(left - 8, zero, left + wide * D, zero, color="currentColor", width=1)
    token = states[shown][at]
    for j, name in enumerate(("mean", "variance", "RMS")):
        parts += draw.text(left + 150 + 90 * j, 330, name, anchor="end", bold=True)
    rows = [("token, before", x[at]), ("token, now", token)]
    if norm == "BatchNorm":
        rows.append((f"feature {FEATURE}, now", states[shown][..., FEATURE]))
    for i, (name, values) in enumerate(rows):
        y = 356 + 26 * i
        parts += draw.text(left - 8, y, name)
        numbers = (values.mean(), values.var(correction=0), values.pow(2).mean().sqrt())
        for j, number in enumerate(numbers):
            words = f"{float(number):.2f}".replace("-0.00", "0.00").replace("-", "−")
            parts += draw.text(left + 150 + 90 * j, y, words, anchor="end", mono=True)
    return parts


def cube_caption(step: str, norm: str, token: str) -> str:
    x, x_hat, y = stages(norm)
    at = TOKENS[token]
    count, shared = B * S, f"{D} features of one token"
    if norm == "BatchNorm":
        count, shared = D, f"{B * S} tokens of one feature"
    what = "mean square" if norm == "RMSNorm" else "mean and variance"
    if step == "x":
        return f"{norm}, {token}: the input; its mean is {float(x[at].mean()):.2f}."
    if step == "statistics":
        return f"{norm}: one {what} for the {shared} (purple); {count} such groups in this batch. {token} is outlined."
    now = x_hat if step == "x̂" else y
    stage = "normalised, before the gain" if step == "x̂" else "after the gain" + (" and bias" * (norm != "RMSNorm"))
    mean, variance = float(now[at].mean()), float(now[at].var(correction=0))
    return f"{norm}, {token}, {stage}: this token has mean {mean:.2f} and variance {variance:.2f}.".replace("-", "−")


# What backward projects away

MOVES = ("forward", "gradient arrives", "split it", "keep the rest", "times r")
LENGTHS = (0.4, 0.7, 1.4)


def projection(step: str, norm: str, length: float) -> svg.SVG:
    """x, its image x̂ on the sphere of RMS 1, and what becomes of a gradient that arrives there."""
    v, at = vectors(norm, length), MOVES.index(step)
    scale, cx, cy = 84, 185, 240

    def place(p: Tensor) -> Point:
        return cx + scale * float(p @ RIGHT), cy - scale * float(p @ UP)

    def arrow(start: Tensor, vector: Tensor, color: str, name: str, width: float = 3.5, faint: bool = False,
              dashed: bool = False, side: tuple[float, float] = (8, -6)) -> draw.Elements:
        (x1, y1), (x2, y2) = place(start), place(start + vector)
        if math.hypot(x2 - x1, y2 - y1) < 3:
            return []
        shape = draw.line(x1, y1, x2, y2, color=color, width=width, arrow=True, opacity=0.45 if faint else 1,
                          dashed=dashed)
        return shape + draw.text(x2 + side[0], y2 + side[1], name, bold=True, size=15, color=color)

    parts: draw.Elements = [svg.Circle(cx=cx, cy=cy, r=round(scale * 3**0.5, 1), fill=TEAL, fill_opacity=0.1,
                                       stroke=TEAL, stroke_width=1.5)]
    turns = [2 * math.pi * i / 60 for i in range(60)]
    # Mean 0 is a plane through the origin; it meets the sphere in a circle.
    layer = norm == "LayerNorm"
    ring = _path([place(3**0.5 * (RIGHT * math.cos(t) + FRONT * math.sin(t))) for t in turns])
    parts.append(svg.Path(
        fill=YELLOW if layer else "none", fill_opacity=0.25, stroke=YELLOW if layer else TEAL,
        stroke_width=2.5 if layer else 1, extra={"d": ring},
    ))
    if layer:
        parts += arrow(0 * ONES, 0.8 * ONES, GREY, "(1,1,1)", 2, side=(-60, -4))
    parts += arrow(0 * ONES, v["x"], "currentColor", "x", 5, side=(-14, -12))
    parts += arrow(0 * ONES, v["x̂"], BLUE, "x̂", 3, side=(-10, 24))
    tip = v["x̂"]
    if 1 <= at <= 3:
        parts += arrow(tip, v["ĝ"], ORANGE, "ĝ", faint=at > 1, side=(8, 6))
    if at == 2:
        parts += arrow(tip, v["along"], RED, "along x̂", side=(6, 18))
        parts += arrow(tip, v["mean"], PURPLE, "mean", side=(-50, 0))
    if at in (2, 3):
        parts += arrow(tip, v["rest"], GREEN, "rest", side=(4, 20))
    if at == 4:
        parts += arrow(tip, v["rest"], GREEN, "", faint=True)
        parts += arrow(v["x"], v["dx"], GREEN, "dx", 4.5, side=(2, 22))
    return draw.canvas(740, 450, parts, _numbers(v, at, norm))


def _numbers(v: dict[str, Tensor], at: int, norm: str) -> draw.Elements:
    rows = [("x", "x", "currentColor", 0), ("x̂", "x̂", BLUE, 0), ("ĝ = gain∘dy", "ĝ", ORANGE, 1),
            ("along x̂", "along", RED, 2)]
    rows += [("its mean", "mean", PURPLE, 2)] if norm == "LayerNorm" else []
    rows += [("the rest", "rest", GREEN, 2), ("dx = r · rest", "dx", GREEN, 4)]
    spread = "RMS" if norm == "RMSNorm" else "std"
    parts = draw.text(440, 34, f"r = 1/{spread} = {float(v['r']):.2f}", bold=True, size=15)
    for i, (name, key, color, first) in enumerate(rows):
        shown = 1 if first <= at else 0.25
        y = 70 + 36 * i
        numbers = "  ".join(f"{float(n):+.2f}" for n in v[key]).replace("-", "−")
        parts += draw.box(440, y - 11, 12, 12, GREY if color == "currentColor" else color, opacity=shown)
        parts += draw.text(460, y, name, opacity=shown, bold=first == at)
        parts += draw.text(575, y, numbers, mono=True, size=14, opacity=shown)
    y = 70 + 36 * len(rows) + 18
    if at:
        key = {1: "ĝ", 4: "dx"}.get(at, "rest")
        dot = abs(float(v[key] @ v["x̂"])) if at > 1 else float(v[key] @ v["x̂"])
        parts += draw.text(440, y, f"{key} · x̂ = {dot:.2f}", size=15, bold=True)
        mean = float(v[key].mean())
        words = f"mean of {key} = {mean if abs(mean) > 1e-9 else 0:.2f}".replace("-", "−")
        parts += draw.text(440, y + 26, words, size=15)
    return parts


def projection_caption(step: str, norm: str, length: float) -> str:
    v = vectors(norm, length)
    what = {
        "forward": f"divides x by {1 / float(v['r']):.2f}" + (", after removing its mean" * (norm == "LayerNorm")),
        "gradient arrives": f"receives a gradient ĝ of length {float(v['ĝ'].norm()):.2f}",
        "split it": f"splits off what points along x̂ ({float(v['along'].norm()):.2f})"
        + (f" and along (1,1,1) ({float(v['mean'].norm()):.2f})" if norm == "LayerNorm" else ""),
        "keep the rest": f"keeps the rest, of length {float(v['rest'].norm()):.2f}",
        "times r": f"hands back dx = r·rest, of length {float(v['dx'].norm()):.2f}",
    }[step]
    return f"{norm}, x at {length:g} times its size: it {what}."


# Depth, and learning rates

DEPTHS = (6, 12, 24, 48)
measured = functools.cache(stack.measure)
LOOKS = {"pre": (BLUE, "-", "pre: x + f(norm(x))"), "post": (ORANGE, "--", "post: norm(x + f(x))"),
         "none": (GREY, ":", "none: x + f(x)")}


def depth(layers: int) -> Figure:
    with plot(7.2, 3.6, ncols=2) as (figure, axes):
        for place, (color, look, words) in LOOKS.items():
            runs = measured(layers, place)
            for ax, values in zip(axes, runs, strict=True):
                ax.plot(range(1, layers + 1), values, look, color=color, label=words, linewidth=2.6)
        for ax, title in zip(axes, ("RMS of the stream after a block", "gradient of the block's weights"), strict=True):
            ax.set(title=title, xlabel="block, from the input", yscale="log", ylim=(0.2, 60))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    return figure


def depth_caption(layers: int) -> str:
    pre, post, none = (measured(layers, place) for place in stack.PLACES)
    return (
        f"{layers} blocks at initialisation. Last block's gradient: pre {pre.gradient[-1]:.2f}, post "
        f"{post.gradient[-1]:.2f}, none {none.gradient[-1]:.3g}. The stream ends at RMS {pre.stream[-1]:.1f}, "
        f"{post.stream[-1]:.1f} and {none.stream[-1]:.3g}."
    )


LINES = {"none": (GREY, ":"), "batch": (GREEN, "-"), "layer": (ORANGE, "--"), "rms": (BLUE, "-"),
         "batch + shift": (RED, "-.")}


def rates() -> Figure:
    with plot(7.4, 3.7, ncols=3, sharey=True) as (figure, axes):
        for ax, scale in zip(axes, training.SCALES, strict=True):
            for norm, (color, look) in LINES.items():
                losses = training.runs(norm, scale).losses.median(0).values.clamp(max=3)
                ax.plot(training.RATES, losses, look, color=color, label=norm, marker="o", ms=4)
            ax.set(xscale="log", yscale="log", ylim=(3e-7, 3), title=f"weights × {scale:g}")
            ax.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.axhline(1, color=GREY, linewidth=1)
        axes[0].set_ylabel("loss after 50 steps")
        axes[1].set_xlabel("learning rate")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    return figure


def rates_caption() -> str:
    best = {
        norm: ", ".join(f"{float(training.runs(norm, scale).best().median()):.2g}" for scale in training.SCALES)
        for norm in LINES
    }
    return (
        "Median of three seeds; predicting the mean has loss 1. Best loss from half, once and twice He's size: "
        + "; ".join(f"{norm}: {numbers}" for norm, numbers in best.items()) + "."
    )


EXPLORERS: dict[str, tuple[Any, Any, dict[str, tuple]]] = {
    "cube": (cube, cube_caption, {"norm": NORMS, "step": STEPS, "token": tuple(TOKENS)}),
    "projection": (
        projection, projection_caption, {"norm": ("RMSNorm", "LayerNorm"), "step": MOVES, "length": LENGTHS},
    ),
    "depth": (depth, depth_caption, {"layers": DEPTHS}),
    "rates": (rates, rates_caption, {}),
}
