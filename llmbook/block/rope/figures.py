"""What the chapter draws: turning pairs, the two layouts, scores against distance, stretched wavelengths."""

import functools
import math
from typing import Any

import svg
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from llmbook.kit import draw
from llmbook.kit.style import BLUE, COLORS, GREY, ORANGE, PURPLE, RED, TEAL, plot, rank_color

from . import decay, rotation, scaling

WIDTH = 700
STEPS = 10
DISTANCES = (0, 1, 5)


# Turning pairs


def _arrow(cx: float, cy: float, z: complex, radius: float, color: str, faint: bool = False) -> draw.Elements:
    """An arrow from the centre to z (in radii), counter-clockwise from the right; faint ones are outlines."""
    length, angle = abs(z) * radius, -math.atan2(z.imag, z.real)
    head, wide, shaft = 15, 8, 2.6
    points = [(0, shaft), (length - head, shaft), (length - head, wide), (length, 0)]
    points += [(x, -y) for x, y in reversed(points[:3])]
    c, s = math.cos(angle), math.sin(angle)
    turned = [(cx + x * c - y * s, cy + x * s + y * c) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in turned) + "z"
    style: dict[str, Any] = (
        {"fill": "none", "stroke": color, "stroke_width": 1.2, "opacity": 0.55} if faint else {"fill": color}
    )
    return [svg.Path(extra={"d": path}, **style)]


def _between(cx: float, cy: float, radius: float, start: float, end: float) -> draw.Elements:
    """The sector from one direction to another the short way round, angles in radians."""
    sweep = (end - start + math.pi) % (2 * math.pi) - math.pi
    a, b = ((cx + radius * math.cos(t), cy - radius * math.sin(t)) for t in (start, start + sweep))
    flag = 0 if sweep > 0 else 1
    path = f"M{cx:.1f} {cy:.1f}L{a[0]:.1f} {a[1]:.1f}A{radius} {radius} 0 0 {flag} {b[0]:.1f} {b[1]:.1f}z"
    return [svg.Path(fill=COLORS["S"], fill_opacity=0.55, extra={"d": path})]


@functools.cache
def _vectors(d: int) -> tuple[Tensor, Tensor]:
    """A query and a key as complex pairs, long enough to see."""
    radius, angle = torch.rand(2, 2, d // 2, generator=torch.Generator().manual_seed(8)).double()
    side = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(d // 8)
    angle = torch.stack((6.3 * angle[0], 6.3 * angle[0] + side * (0.6 + 1.1 * angle[1])))
    q, k = torch.polar(0.75 + 0.25 * radius, angle)
    return q, k


def _turned(step: int, distance: int, base: float, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = _vectors(d)
    theta = rotation.frequencies(d, base)
    one = torch.ones_like(theta)
    return q, k, q * torch.polar(one, (step + distance) * theta), k * torch.polar(one, step * theta)


def turning(step: int, distance: int, base: int, d: int) -> svg.SVG:
    """Every pair of a query at position step + distance and of a key at position `step`."""
    q, k, turned_q, turned_k = _turned(step, distance, base, d)
    theta = rotation.frequencies(d, base)
    parts = _strip(step, step + distance)
    rows = math.ceil(d / 8)
    cell, radius = WIDTH / 4, 68
    for i in range(d // 2):
        cx, cy = cell * (i % 4) + cell / 2, 186 + 214 * (i // 4)
        parts += draw.text(cx, cy - radius - 28, f"pair {i}", bold=True, anchor="middle")
        parts += draw.text(cx, cy - radius - 12, f"θ = {float(theta[i]):.3g}", anchor="middle", size=12)
        parts.append(svg.Circle(cx=cx, cy=cy, r=radius, fill=GREY, fill_opacity=0.13))
        pair = (complex(turned_q[i]), complex(turned_k[i]))
        angles = [math.atan2(z.imag, z.real) for z in pair]
        parts += _between(cx, cy, radius * 0.55, angles[1], angles[0])
        for start, now, color in ((q[i], pair[0], COLORS["Q"]), (k[i], pair[1], COLORS["K"])):
            parts += _arrow(cx, cy, complex(start), radius, color, faint=True)
            parts += _arrow(cx, cy, now, radius, color)
        between = math.degrees(angles[0] - angles[1])
        between = (between + 180) % 360 - 180
        for name, z, angle, side in (("q", pair[0], angles[0], 1), ("k", pair[1], angles[1], -1)):
            far = abs(z) * radius - 4  # beside the head, on the side away from the other arrow
            angle += math.copysign(0.27, between) * side
            x, y = cx + far * math.cos(angle), cy - far * math.sin(angle)
            parts += draw.text(x, y + 5, name, bold=True, anchor="middle", size=14)
        words = f"from k to q: {between:+.0f}°".replace("-", "−")
        parts += draw.text(cx, cy + radius + 19, words, anchor="middle")
    bottom = 186 + 214 * (rows - 1) + 106
    parts += _bar(bottom, "both turned", _score(turned_q, turned_k), d, PURPLE)
    parts += _bar(bottom + 30, "only k turned", _score(q, turned_k), d, GREY)
    return draw.canvas(WIDTH, bottom + 58, parts)


def _score(q: Tensor, k: Tensor) -> float:
    return float((q * k.conj()).real.sum())


def _strip(n: int, m: int) -> draw.Elements:
    """Positions in a row, with the key's and the query's place coloured."""
    count = STEPS + max(DISTANCES)
    wide = (WIDTH - 20) / count
    places = "".join(f"M{10 + i * wide:.1f} 30h{wide - 3:.1f}v26h-{wide - 3:.1f}z" for i in range(count))
    parts: draw.Elements = [svg.Path(fill=GREY, fill_opacity=0.22, extra={"d": places})]
    words = {n: "k", m: "q"} if n != m else {n: "q, k"}
    for at, name in words.items():
        color = COLORS["K"] if name == "k" else COLORS["Q"]
        parts += draw.box(10 + at * wide, 26, wide - 3, 34, color, str(at), size=15)
        parts += draw.text(10 + at * wide + wide / 2, 19, name, bold=True, anchor="middle", size=15)
    numbers: draw.Elements = [
        svg.Text(x=round(10 + i * wide + wide / 2 - 1.5, 1), y=48, text=str(i))
        for i in range(0, count, 2)
        if i not in words
    ]
    return [*parts, svg.G(elements=numbers, extra={"text-anchor": "middle", "font-size": "12"})]


def _bar(y: float, name: str, value: float, d: int, color: str) -> draw.Elements:
    """A signed bar for a score, 0 in the middle."""
    zero, scale = 310, 280 / (d / 2)
    wide = abs(value) * scale
    parts = draw.text(130, y + 16, name, anchor="end", bold=color != GREY)
    parts += draw.box(zero - wide if value < 0 else zero, y, wide, 22, color)
    parts += draw.line(zero, y - 3, zero, y + 25)
    at = zero + wide + 8 if value >= 0 else zero - wide - 8
    return parts + draw.text(at, y + 16, f"{value:+.2f}", anchor="start" if value >= 0 else "end", bold=True)


def turning_caption(step: int, distance: int, base: int, d: int) -> str:
    q, _, turned_q, turned_k = _turned(step, distance, base, d)
    return (
        f"Key at position {step}, query at {step + distance}, base {base:,}, d = {d}. Outlined: before "
        f"turning. Score with both turned {_score(turned_q, turned_k):+.2f}; with the key alone turned "
        f"{_score(q, turned_k):+.2f}. Move step: the angle between q and k stays in every pair, "
        "and with it the first bar."
    )


# The two layouts


def layouts() -> svg.SVG:
    """Which dimensions are partners in either layout (d = 8), and where each row of wq goes."""
    d, cell, left, gap = 8, 66, 130, 150
    top, bottom = 80, 80 + gap
    order = rotation.half_split_order(d).tolist()
    parts: draw.Elements = []
    for y, names, up in ((top, list(range(d)), True), (bottom, order, False)):
        places = {dim: left + names.index(dim) * cell + cell / 2 - 2 for dim in names}
        for dim, x in places.items():
            parts += draw.box(x - cell / 2 + 2, y, cell - 4, 34, rank_color(dim // 2), f"x{dim}")
        for i in range(d // 2):
            a, b = places[2 * i], places[2 * i + 1]
            edge = y - 3 if up else y + 37
            lift = (22 if up else 20 + 9 * i) * (-1 if up else 1)
            path = f"M{a:.0f} {edge}C{a:.0f} {edge + 1.4 * lift} {b:.0f} {edge + 1.4 * lift} {b:.0f} {edge}"
            parts.append(svg.Path(fill="none", stroke=rank_color(i), stroke_width=3, extra={"d": path}))
            if up:
                name = f"pair {i}, θ" + "₀₁₂₃"[i]
                parts += draw.text((a + b) / 2, edge - 32, name, anchor="middle", size=12)
    for place, dim in enumerate(order):
        x1, x2 = left + dim * cell + cell / 2 - 2, left + place * cell + cell / 2 - 2
        parts += draw.line(x1, top + 38, x2, bottom - 4, color=rank_color(dim // 2), width=2.2, arrow=True)
    for y, first, second in ((top, "interleaved", "paper, Meta"), (bottom, "half-split", "HF Llama")):
        parts += draw.text(left - 14, y + 14, first, anchor="end", bold=True)
        parts += draw.text(left - 14, y + 31, second, anchor="end", size=12)
    return draw.canvas(WIDTH, bottom + 96, parts)


def layouts_caption() -> str:
    return (
        "Above, neighbours are partners; below, dimension i and i + d/2 are. The arrows are to_half_split: "
        "even dimensions first, then odd. Pair i keeps its frequency and only its two places move."
    )


# Scores against distance

AT = torch.unique(torch.logspace(0, 16, 161, base=2.0, dtype=torch.float64).round().long())
BACK = 512


@functools.cache
def _query_and_key(vectors: str, d: int, base: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(d, dtype=torch.float64, generator=generator)
    if vectors == "q = k = all ones":
        return torch.ones_like(q), torch.ones_like(q)
    if vectors == "k = q, random":
        return q, q
    if vectors == "independent, random":
        return q, torch.randn(d, dtype=torch.float64, generator=generator)
    cos, sin = rotation.tables(torch.tensor([BACK]), rotation.frequencies(d, base), torch.float64)
    return q, rotation.rotate_interleaved(q[None, None], cos, sin)[0, 0]


def _curves(vectors: str, base: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """RoFormer's bound, and the same q and k scored in either layout, as shares of the largest value."""
    theta = rotation.frequencies(d, base)
    q, k = _query_and_key(vectors, d, base)
    halves = rotation.half_split_order(d).argsort()  # half-split's partners i and i + d/2 become neighbours
    bound = decay.relative_bound(AT, theta) / decay.relative_bound(AT[:1] * 0, theta)
    most = [decay.pair_products(a, b).abs().sum() for a, b in ((q, k), (q[halves], k[halves]))]
    scores = (decay.scores(q, k, AT, theta), decay.scores(q[halves], k[halves], AT, theta))
    return bound, scores[0] / most[0], scores[1] / most[1]


def _plain_ticks(axis: Any, values: list[int]) -> None:
    """Numbers as people write them; mathtext is slow to draw and large."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_locator(NullLocator())


def distance(vectors: str, base: int, d: int) -> Figure:
    bound, neighbours, halves = _curves(vectors, base, d)
    with plot(7.0, 3.7) as (figure, ax):
        ax.axhline(0, color=GREY, linewidth=1)
        ax.plot(AT, bound, color=PURPLE, linewidth=4, alpha=0.75, label="RoFormer's curve, mean |Sⱼ|")
        ax.plot(AT, neighbours, color=BLUE, linewidth=1.6, label="score, interleaved")
        ax.plot(AT, halves, color=ORANGE, linewidth=1.6, linestyle=(0, (3, 1.5)), label="score, half-split")
        ax.set(xscale="log", ylim=(-0.75, 1.08))
        ax.set(xlabel="distance m − n (tokens)", ylabel="share of the largest")
        _plain_ticks(ax.xaxis, [4**i for i in range(9)])
        ax.legend(loc="lower left", fontsize=10, ncols=3, columnspacing=1.2)
    return figure


def distance_caption(vectors: str, base: int, d: int) -> str:
    _, neighbours, halves = _curves(vectors, base, d)
    peak, other = int(AT[neighbours.argmax()]), int(AT[halves.argmax()])
    return (
        f"{vectors}; base {base:,}, d = {d}. RoFormer's curve falls for every choice. The interleaved score "
        f"is largest at distance {peak:,} ({float(neighbours.max()):+.2f}), the half-split score of the same "
        f"q and k at {other:,} ({float(halves.max()):+.2f})."
    )


# Longer contexts

TRAINED = 4096


def wavelengths(method: str, factor: int, base: int) -> Figure:
    theta = rotation.frequencies(128, base)
    new = scaling.extended(method, 128, base, factor, TRAINED)
    unseen, pair = scaling.unseen(theta, new, TRAINED, factor * TRAINED), torch.arange(64)
    with plot(7.0, 3.9) as (figure, ax):
        ax.plot(pair, 2 * math.pi / theta, color=GREY, linewidth=2, label="as trained")
        for mask, color, look, words in (
            (~unseen, TEAL, (0, (1, 1)), "angles all seen in training"),
            (unseen, RED, "-", "reaches unseen angles"),
        ):
            turn = 2 * math.pi / new[mask]
            ax.plot(pair[mask], turn, linestyle=look, color=color, linewidth=5, label=words)
        for length, words in ((TRAINED, "trained on"), (factor * TRAINED, "to be read")):
            ax.axhline(length, color=ORANGE, linewidth=1.5, linestyle="--")
            ax.text(0, length * 1.15, f"{words}: {length:,} tokens", color=ORANGE, fontsize=10)
        ax.set(yscale="log", ylim=(4, 3e7), xlabel="pair i (of 64)", ylabel="tokens per full turn")
        _plain_ticks(ax.yaxis, [10**i for i in range(1, 8)])
        ax.legend(loc="upper left", fontsize=10, ncols=3, columnspacing=1.2)
    return figure


def wavelengths_caption(method: str, factor: int, base: int) -> str:
    theta, new = rotation.frequencies(128, base), scaling.extended(method, 128, base, factor, TRAINED)
    unseen = int(scaling.unseen(theta, new, TRAINED, factor * TRAINED).sum())
    slower = int((new[:16] < theta[:16] * 0.99).sum())
    return (
        f"{method}, {factor}× the context, base {base:,}, d = 128: {unseen} of 64 pairs reach angles that "
        f"training never showed; of the 16 fastest pairs, which tell neighbours apart, {slower} turn at "
        "least 1% slower."
    )


EXPLORERS: dict[str, tuple[Any, Any, dict[str, tuple]]] = {
    "turning": (
        turning, turning_caption,
        {"step": tuple(range(STEPS)), "distance": DISTANCES, "base": (10_000, 100), "d": (8, 16)},
    ),
    "layouts": (layouts, layouts_caption, {}),
    "distance": (distance, distance_caption, {
        "vectors": (
            "q = k = all ones", "k = q, random", "independent, random", f"k made to be found {BACK} back",
        ),
        "base": (100, 10_000, 500_000), "d": (32, 128),
    }),
    "wavelengths": (
        wavelengths, wavelengths_caption,
        {"method": scaling.METHODS, "factor": (2, 8), "base": (10_000, 500_000)},
    ),
}
