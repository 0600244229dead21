"""The shapes every schematic is made of. Each returns a list of SVG elements; `canvas` makes a picture of them.

Coordinates are pixels, y points down, and text is never smaller than 12 px at the picture's natural width.
"""

import html
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import svg

from .style import COLORS, FONT, GREY, MONO, TEAL, text_on

Elements = list[Any]


def canvas(width: float, height: float, *parts: Iterable[Any]) -> svg.SVG:
    """A picture `width` × `height` pixels from the given groups of elements."""
    return svg.SVG(
        width=_n(width), height=_n(height), viewBox=svg.ViewBoxSpec(0, 0, _n(width), _n(height)),
        extra={"font-family": FONT, "font-size": "13", "fill": "currentColor"},
        elements=[element for part in parts for element in part],
    )


def text(
    x: float, y: float, words: str, *, size: float = 13, anchor: str = "start", color: str = "currentColor",
    bold: bool = False, mono: bool = False, opacity: float = 1,
) -> Elements:
    """One line of text whose baseline starts (or is centred, or ends) at x, y."""
    return [svg.Text(
        x=_n(x), y=_n(y), text=html.escape(words, quote=False),
        fill=None if color == "currentColor" else color, font_size=None if size == 13 else size,
        text_anchor=None if anchor == "start" else anchor,  # type: ignore[arg-type]
        font_weight="bold" if bold else None, font_family=MONO if mono else None,
        opacity=None if opacity == 1 else opacity,
    )]


def box(
    x: float, y: float, width: float, height: float, fill: str, label: str = "", *,
    opacity: float = 1, stroke: str | None = None, size: float = 13,
) -> Elements:
    """A filled rectangle with a centred label in black or white, whichever reads better."""
    shape = svg.Rect(
        x=_n(x), y=_n(y), width=_n(max(width, 0)), height=_n(max(height, 0)), rx=2, fill=fill,
        fill_opacity=None if opacity == 1 else opacity, stroke=stroke,
        stroke_width=2 if stroke else None,
    )
    ink = text_on(fill) if fill.startswith("#") and opacity > 0.6 else "currentColor"
    words = text(x + width / 2, y + height / 2 + size * 0.36, label, size=size, anchor="middle", color=ink)
    return [shape, *(words if label else [])]


def line(
    x1: float, y1: float, x2: float, y2: float, *, color: str = "currentColor", width: float = 1.5,
    dashed: bool = False, arrow: bool = False, opacity: float = 1,
) -> Elements:
    """A straight line, with an arrow head at its end if asked."""
    shapes: Elements = [svg.Line(
        x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), stroke=color, stroke_width=width,
        stroke_dasharray=[5, 4] if dashed else None, opacity=None if opacity == 1 else opacity,
    )]
    if arrow:
        angle = math.atan2(y2 - y1, x2 - x1)
        points = [x2, y2]
        for side in (2.7, -2.7):
            points += [x2 + 9 * math.cos(angle + side), y2 + 9 * math.sin(angle + side)]
        shapes.append(svg.Polygon(
            fill=color, opacity=None if opacity == 1 else opacity,
            extra={"points": " ".join(str(_n(p)) for p in points)},
        ))
    return shapes


def matrix(
    x: float, y: float, rows: int, columns: int, cell: float, fill: Callable[[int, int], tuple[str, float]],
    *, label: str = "", values: Sequence[Sequence[Any]] | None = None,
) -> Elements:
    """A matrix as tiles. `fill(row, column)` gives a tile's colour and opacity; `values` are written inside."""
    shapes = text(x, y - 7, label, bold=True) if label else []
    # One dashed stroke per run of equal tiles, one path per look: a stepper has hundreds of pictures.
    looks: dict[tuple[str, float], list[str]] = defaultdict(list)
    side = _n(cell - 2)
    for r in range(rows):
        start = 0
        for look, run in itertools.groupby(fill(r, c) for c in range(columns)):
            length = len(list(run))
            looks[look].append(f"M{_n(x + start * cell)} {_n(y + r * cell + side / 2)}h{_n(length * cell - 2)}")
            start += length
    for (color, opacity), runs in looks.items():
        faint = None if opacity == 1 else round(opacity, 2)
        shapes.append(svg.Path(
            stroke=color, stroke_width=side, stroke_dasharray=[side, 2], stroke_opacity=faint,
            extra={"d": "".join(runs)},
        ))
    for r, row in enumerate(values or ()):
        for c, value in enumerate(row):
            color, opacity = fill(r, c)
            ink = text_on(color) if opacity > 0.6 else "currentColor"
            middle = (x + c * cell + side / 2, y + r * cell + side / 2 + 4.5)
            shapes += text(*middle, str(value), size=12, anchor="middle", color=ink)
    return shapes


class Bar(NamedTuple):
    """One piece of a stacked bar: what it is, how much, and its colour's role or hex."""

    name: str
    amount: float
    color: str


def ledger(
    x: float, y: float, width: float, height: float, bars: Sequence[Bar], capacity: float, *, unit: str = ""
) -> Elements:
    """What fills a memory: stacked pieces along a bar as long as the capacity, the free rest outlined.

    Pieces beyond the capacity stick out to the right, so that an overflow is seen as one.
    """
    scale = width / capacity if capacity else 0
    shapes: Elements = [svg.Rect(
        x=_n(x), y=_n(y), width=_n(width), height=_n(height), rx=3, fill="none", stroke=GREY, stroke_width=1.5
    )]
    at = x
    for bar in bars:
        if bar.amount <= 0:
            continue
        wide = bar.amount * scale
        name = bar.name if wide > 8 * len(bar.name) + 4 else ""
        shapes += box(at, y + 2, max(wide - 1, 1), height - 4, COLORS.get(bar.color, bar.color), name)
        at += wide
    used = sum(bar.amount for bar in bars)
    words = f"{used:g} of {capacity:g} {unit}".strip()
    return shapes + text(x + width, y - 6, words, anchor="end")


class Span(NamedTuple):
    """A piece of work on a timeline: which lane, from when to when, its colour's role, and what is written in it."""

    lane: int
    start: float
    end: float
    kind: str
    label: str = ""


def timeline(
    x: float, y: float, width: float, lane_height: float, spans: Sequence[Span], lanes: Sequence[str],
    *, until: float, gap: float = 3, label_width: float = 64,
) -> Elements:
    """Lanes of work over time. Idle time is what stays empty. `until` is the time at the right edge."""
    scale = (width - label_width) / until if until else 0
    left = x + label_width
    shapes: Elements = []
    for i, name in enumerate(lanes):
        top = y + i * lane_height
        shapes += text(x + label_width - 8, top + lane_height / 2 + 4, name, anchor="end")
        shapes.append(svg.Rect(
            x=_n(left), y=_n(top), width=_n(width - label_width), height=_n(lane_height - gap), fill=GREY,
            fill_opacity=0.13,
        ))
    # One path per kind and one group of labels per colour keep a frame small: timelines have many pieces.
    tall = _n(lane_height - gap)
    for kind in dict.fromkeys(span.kind for span in spans):
        mine = [span for span in spans if span.kind == kind]
        path = []
        for span in mine:
            a, b = left + span.start * scale, left + span.end * scale
            path.append(f"M{_n(a)} {_n(y + span.lane * lane_height)}h{_n(max(b - a - 1, 0.5))}v{tall}H{_n(a)}z")
        color = COLORS.get(kind, kind)
        shapes.append(svg.Path(fill=color, extra={"d": "".join(path)}))
        labels: Elements = []
        for span in mine:
            wide = (span.end - span.start) * scale
            if span.label and wide >= 7.2 * len(span.label) + 1:
                at = left + span.start * scale + (wide - 1) / 2
                base = y + span.lane * lane_height + tall / 2 + 4
                labels.append(svg.Text(x=_n(at), y=_n(base), text=html.escape(span.label, quote=False)))
        if labels:
            middle = {"text-anchor": "middle", "font-size": "12"}
            shapes.append(svg.G(elements=labels, fill=text_on(color), extra=middle))
    return shapes


def ring(
    cx: float, cy: float, radius: float, labels: Sequence[str], colors: Sequence[str], *, lit: int | None = None
) -> Elements:
    """Ranks round a circle, clockwise from the top, each with an arrow to the next; `lit` marks one hop."""
    n = len(labels)
    where = [
        (cx + radius * math.sin(2 * math.pi * i / n), cy - radius * math.cos(2 * math.pi * i / n)) for i in range(n)
    ]
    shapes: Elements = []
    for i, (x1, y1) in enumerate(where):
        if n == 1:
            break
        x2, y2 = where[(i + 1) % n]
        length = math.hypot(x2 - x1, y2 - y1)
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        shapes += line(
            x1 + 22 * ux, y1 + 22 * uy, x2 - 24 * ux, y2 - 24 * uy, arrow=True,
            color=TEAL if lit in (None, i) else GREY, opacity=1 if lit in (None, i) else 0.5,
        )
    for (px, py), label, color in zip(where, labels, colors, strict=True):
        shapes.append(svg.Circle(cx=_n(px), cy=_n(py), r=19, fill=color))
        shapes += text(px, py + 5, label, anchor="middle", color=text_on(color), bold=True)
    return shapes


def source(
    x: float, y: float, width: float, lines: Sequence[str], lit: Collection[int], *, step: float = 18
) -> Elements:
    """Lines of code; those whose index is in `lit` stand on a coloured band, the last of them on a stronger one."""
    shapes: Elements = [
        svg.Rect(
            x=_n(x), y=_n(y + i * step), width=_n(width), height=_n(step), fill=COLORS["S"],
            fill_opacity=0.6 if i == max(lit) else 0.25,
        )
        for i in sorted(lit)
    ]
    rows: Elements = []
    for i, words in enumerate(lines):
        indent = len(words) - len(words.lstrip())  # by position: browsers drop leading spaces in SVG text
        if words.strip():
            left, base = _n(x + 6 + indent * 7.2), _n(y + i * step + step * 0.72)
            rows.append(svg.Text(x=left, y=base, text=html.escape(words.strip(), quote=False)))
    return [*shapes, svg.G(elements=rows, extra={"font-family": MONO, "font-size": "12"})]


def _n(value: float) -> float | int:
    """At most one decimal: what the eye can see, and no more bytes than that."""
    rounded = round(float(value), 1)
    return int(rounded) if rounded == int(rounded) else rounded
