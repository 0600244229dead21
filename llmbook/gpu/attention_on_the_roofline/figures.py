"""What the attention_on_the_roofline chapter draws: recordings of its cache, and its model on real chips."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from math import ceil, log
from typing import Any

import svg

from llmbook.kit import draw
from llmbook.kit.style import COLORS, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, rank_color

from .at_scale import BATCH, gain_replayed
from .cache import Moment, Program, Tile, launch, replay
from .model import CHIPS, KINDS, Attention, Chip, cost, flops, gain, traffic

WIDTH = 800

# --- the cache: a small chip, one sequence, every read recorded

HEADS, SMS, CAPACITY, MOMENTS = 16, 4, 16, 6
TILE = 64 * 2 * 128 * 2  # bytes: 64 keys and values, 128 wide, fp16
SMALL = CHIPS["A100-80 SXM"]
KERNELS = {  # name → rows per program, a group's programs next to each other
    "per head": (1, True), "per head, groups apart": (1, False), "packed": (16, True),
}


@functools.cache
def recording(group: int, kernel: str, tiles: int) -> list[Moment]:
    """The whole replay; a packed launch splits the keys until every multiprocessor has a program."""
    (rows, together), kv_heads = KERNELS[kernel], HEADS // group
    splits = ceil(SMS / kv_heads) if rows > 1 else 1
    return list(replay(launch(kv_heads, group, tiles, rows, splits, together), SMS, CAPACITY))


def moments(group: int, kernel: str, tiles: int) -> range:
    return range(1, 1 + min(MOMENTS, len(recording(group, kernel, tiles))))


def _at(group: int, kernel: str, tiles: int, step: int) -> tuple[Moment, int, int]:
    """The moment shown at a step, its tick, and how many ticks there are."""
    ticks = recording(group, kernel, tiles)
    tick = ceil(len(ticks) * step / moments(group, kernel, tiles)[-1])
    return ticks[tick - 1], tick, len(ticks)


def _seconds(group: int, kernel: str, hbm: int, l2: int) -> tuple[float, float, float]:
    """Nanoseconds on an A100 for so many tiles: HBM, L2, compute."""
    rows = KERNELS[kernel][0]
    work = 4 * 64 * 128 * l2 * rows
    rate = SMALL.vector if rows == 1 else SMALL.tensor
    return 1e9 * hbm * TILE / SMALL.hbm, 1e9 * l2 * TILE / SMALL.l2, 1e9 * work / rate


def caches(group: int, kernel: str, tiles: int, step: int) -> svg.SVG:
    """HBM, L2 and the multiprocessors at one moment; under them what each level has delivered, as time."""
    now, _, _ = _at(group, kernel, tiles, step)
    kv_heads, reading = HEADS // group, {turn[1] for turn in now.running if turn}
    parts = [draw.text(0, 16, "HBM: keys and values", bold=True, size=15)]
    tall, cell = min(40, 244 / kv_heads), 184 / tiles
    for kv, number in itertools.product(range(kv_heads), range(tiles)):
        x, y, tile = 44 + number * cell, 28 + kv * tall, Tile(kv, number)
        if number == 0:
            parts.append(draw.text(38, y + tall / 2 + 3, f"KV {kv}", anchor="end", size=12))
        stroke = "currentColor" if tile in reading else None
        faint = 1 if tile in now.held else 0.25
        parts.append(draw.box(x, y, cell - 3, tall - 3, rank_color(kv % 8), opacity=faint, stroke=stroke))
    parts.append(draw.text(0, 296, "bright: in L2 now; framed: read now", size=12))
    parts.append(draw.text(312, 16, f"L2: {len(now.held)} of {CAPACITY} tiles", bold=True, size=15))
    for n in range(CAPACITY):
        x, y = 312 + n % 4 * 41, 66 + n // 4 * 41
        if n < len(now.held):
            tile = now.held[n]
            parts.append(draw.box(x, y, 38, 38, rank_color(tile.kv % 8), f"{tile.kv}:{tile.number}", size=12))
        else:
            parts.append(draw.box(x, y, 38, 38, GREY, opacity=0.15))
    parts.append(draw.text(312, 50, "least recently read first", size=12))
    missed = sum(not turn[2] for turn in now.running if turn)
    parts += [
        draw.line(236, 148, 302, 148, color=RED, width=1 + 2 * missed, arrow=True, opacity=0.9 if missed else 0.25),
        draw.text(266, 134, f"{missed} now" if missed else "none", color=RED, bold=True, anchor="middle"),
        draw.text(560, 16, "multiprocessors", bold=True, size=15),
    ]
    for sm, turn in enumerate(now.running):
        if turn:
            parts.append(draw.line(480, 148, 550, 58 + sm * 68, color=TEAL, width=3, arrow=True))
        parts.append(_multiprocessor(560, 28 + sm * 68, sm, turn))
    return draw.canvas(WIDTH, 442, *parts, _levels(group, kernel, now.hbm, now.l2, tiles))


def _multiprocessor(x: float, y: float, sm: int, turn: tuple[Program, Any, bool] | None) -> draw.Elements:
    """One multiprocessor: its query heads as rows, the tile that it reads, and where that came from."""
    shapes = draw.box(x, y, 240, 60, GREY, opacity=0.12) + draw.text(x + 8, y + 19, f"SM {sm}", bold=True)
    if turn is None:
        return shapes + draw.text(x + 8, y + 44, "idle", color=GREY)
    program, tile, hit = turn
    first, last = program.heads[0], program.heads[-1]
    words = f"query head {first}" if first == last else f"query heads {first} to {last}"
    shapes += draw.text(x + 56, y + 19, words)
    for n in range(len(program.heads)):
        shapes += draw.box(x + 8 + n * 7.5, y + 30, 6, 22, COLORS["Q"])
    shapes += draw.box(x + 134, y + 27, 42, 28, rank_color(tile.kv % 8), f"{tile.kv}:{tile.number}", size=12)
    return shapes + draw.text(x + 182, y + 46, "L2 hit" if hit else "HBM", bold=True, color=TEAL if hit else RED)


def _levels(group: int, kernel: str, hbm: int, l2: int, tiles: int) -> draw.Elements:
    """Three bars of time, HBM, L2 and compute so far, against what multi-head attention takes in all."""
    alone = max(_seconds(1, "per head", HEADS * tiles, HEADS * tiles))
    times = _seconds(group, kernel, hbm, l2)
    scale, y = 520 / (1.05 * max(alone, *_seconds(group, kernel, HEADS * tiles, HEADS * tiles)[:2])), 342
    shapes = draw.text(0, y - 12, "time that each level needs, on an A100's bandwidths", bold=True, size=15)
    for n, (name, value, words, color) in enumerate(zip(
        ("HBM", "L2", "compute"), times, (f"{hbm} tiles, ", f"{l2} tiles, ", ""), (GREY, TEAL, PURPLE), strict=True
    )):
        top, binds = y + n * 30, value == max(times)
        words += f"{value:,.0f} ns" + (", binds" if binds else "")
        shapes += draw.text(64, top + 17, name, anchor="end", bold=binds)
        shapes += draw.box(72, top, max(value * scale, 1), 24, color, opacity=1 if binds else 0.55)
        shapes += draw.text(80 + value * scale, top + 17, words, bold=binds)
    x = 72 + alone * scale
    shapes += draw.line(x, y - 4, x, y + 88, color=RED, dashed=True)
    return shapes + draw.text(x + 5, y + 86, "MHA, in all", color=RED, size=12)


def caches_caption(group: int, kernel: str, tiles: int, step: int) -> str:
    now, tick, ticks = _at(group, kernel, tiles, step)
    times = _seconds(group, kernel, now.hbm, now.l2)
    binds = ("HBM", "L2", "compute")[times.index(max(times))]
    return (
        f"{HEADS} query heads on {HEADS // group} KV heads of {tiles} tiles, {kernel}, after {tick} of {ticks} reads "
        f"per multiprocessor: {now.hbm} tiles out of HBM, {now.l2} out of L2; {binds} binds."
    )


# --- a plane with two logarithmic axes


class Plane:
    """Log-log axes as SVG: x and y ranges, and where they lie on the page."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], box: tuple[float, float, float, float]) -> None:
        self.x, self.y, (self.left, self.top, self.wide, self.tall) = x, y, box

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies outside is moved to the edge."""
        (x0, x1), (y0, y1) = self.x, self.y
        u, v = (log(min(max(value, lo), hi) / lo) / log(hi / lo) for value, lo, hi in ((x, x0, x1), (y, y0, y1)))
        return self.left + u * self.wide, self.top + (1 - v) * self.tall

    def path(self, points: Iterable[tuple[float, float]], color: str, width: float = 2.5, **look: Any) -> draw.Elements:
        """A line through the points."""
        corners = [self.at(*point) for point in points]
        return [e for a, b in itertools.pairwise(corners) for e in draw.line(*a, *b, color=color, width=width, **look)]

    def dot(self, x: float, y: float, color: str, size: float = 6, opacity: float = 1) -> draw.Elements:
        px, py = self.at(x, y)
        return [svg.Circle(cx=round(px, 1), cy=round(py, 1), r=size, fill=color, fill_opacity=opacity)]

    def frame(self, xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str, title: str) -> draw.Elements:
        """Grid, tick labels and names."""
        shapes = draw.text(self.left, 16, title, bold=True, size=15) + draw.text(self.left, 36, f"↑ {y_name}")
        shapes += draw.text(self.left + self.wide, self.top + self.tall + 40, f"{x_name} →", anchor="end")
        for x in xs:
            px, _ = self.at(x, self.y[0])
            shapes += draw.line(px, self.top, px, self.top + self.tall, width=1, opacity=0.15)
            shapes += draw.text(px, self.top + self.tall + 18, f"{x:g}", anchor="middle")
        for y in ys:
            _, py = self.at(self.x[0], y)
            shapes += draw.line(self.left, py, self.left + self.wide, py, width=1, opacity=0.15)
            shapes += draw.text(self.left - 8, py + 4, f"{y:g}", anchor="end")
        return shapes


# --- the gain over MHA by group size, on real chips, with the cache replayed at real sizes

GROUPS = (1, 2, 4, 8, 16, 32)
CHIP_NAMES = tuple(CHIPS)[:3]


def gains(chip: str, keys: int, groups_are: str) -> svg.SVG:
    """Gain against group size: packed, per head by the formula, per head replayed."""
    on, together = CHIPS[chip], groups_are == "together"
    plane, ratio = Plane((0.9, 36), (0.66, 40), (44, 48, 730, 330)), on.l2 / on.hbm
    title = f"{chip}: {BATCH} sequences of {keys:,} keys, a group's programs {groups_are}"
    parts = [plane.frame(GROUPS, GROUPS, "query heads per KV head (32 query heads)", "times as fast as MHA", title)]
    parts.append(plane.path([(0.9, ratio), (36, ratio)], GREY, 1.5, dashed=True))
    parts.append(plane.path([(g, gain(g, on, 16)) for g in GROUPS], GREEN))
    parts.append(plane.path([(1, 1), (ratio, ratio), (32, ratio)], ORANGE))
    x, y = plane.at(36, ratio)
    words = f"L2 / HBM = {on.l2 / 1e12:.2f} / {on.hbm / 1e12:.2f} TB/s = {ratio:.2f}"
    parts.append(draw.text(x, y - 12, words, anchor="end", bold=True))
    for g in GROUPS:
        parts.append(plane.dot(g, gain(g, on, 16), GREEN, 5))
        dot = gain_replayed(g, keys, chip, together)
        parts.append(plane.dot(g, dot, RED, 8))
        x, y = plane.at(g, dot)
        parts.append(draw.text(x, y + 24, f"{dot:.2f}", color=RED, anchor="middle", bold=True))
    for n, (words, color) in enumerate((
        ("packed: every key is read once per group", GREEN),
        ("per head, rereads found in L2: min(g, L2 / HBM)", ORANGE),
        ("per head, replayed through an L2 of this size", RED),
    )):
        parts.append(draw.box(70, 62 + 24 * n, 18, 12, color))
        parts.append(draw.text(96, 73 + 24 * n, words))
    return draw.canvas(WIDTH, 426, *parts)


def gains_caption(chip: str, keys: int, groups_are: str) -> str:
    on, eight = CHIPS[chip], gain_replayed(8, keys, chip, groups_are == "together")
    return (
        f"{chip}, {keys:,} keys, groups {groups_are}: with 8 query heads per KV head the per-head kernel gains "
        f"{eight:.2f} in the replay, {gain(8, on):.2f} by the formula, and the packed kernel {gain(8, on, 16):.2f}."
    )


# --- the roofline with two memory roofs

ROWS = {"per head": 1, "packed, 16 rows": 16, "packed, 64 rows": 64}
NAMES = ("A100-80 SXM", "H100 SXM", "H200 SXM")


def rooflines(attention: str, kernel: str, chip: str) -> svg.SVG:
    """Roofs of HBM, L2, tensor cores and the other units; each kernel as a point under each memory roof."""
    on, a = CHIPS[chip], KINDS[attention]
    plane = Plane((0.4, 2000), (0.3, 1500), (52, 48, 724, 350))
    xs, ys = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), (1, 3, 10, 30, 100, 300, 1000)
    parts = [plane.frame(xs, ys, "useful FLOP per byte", "TFLOP/s", f"{chip}: {attention}, {kernel}")]
    for name, band, color in (("HBM", on.hbm, GREY), ("L2", on.l2, TEAL)):
        parts.append(plane.path([(0.4, 0.4 * band / 1e12), (on.tensor / band, on.tensor / 1e12)], color, 3))
        low = 66 if name == "L2" else 90
        parts.append(draw.box(70, low, 22, 10, color))
        parts.append(draw.text(100, low + 10, f"{name} {band / 1e12:.2f} TB/s", bold=True))
    parts.append(plane.path([(on.tensor / on.l2, on.tensor / 1e12), (2000, on.tensor / 1e12)], PURPLE, 3))
    parts.append(plane.path([(0.4, on.vector / 1e12), (2000, on.vector / 1e12)], PURPLE, 1.5, dashed=True))
    for name, rate in (("tensor cores", on.tensor), ("other units", on.vector)):
        x, y = plane.at(2000, rate / 1e12)
        parts.append(draw.text(x, y - 7, f"{name} {rate / 1e12:.3g}", color=PURPLE, anchor="end", bold=True))
    for name in sorted(ROWS, key=lambda name: name == kernel):
        parts.append(_kernel(plane, a, on, ROWS[name], name == kernel))
    return draw.canvas(WIDTH, 446, *parts)


def _kernel(plane: Plane, a: Attention, on: Chip, rows: int, chosen: bool) -> draw.Elements:
    """A kernel's two points, per byte of HBM and of L2, on one height: what it attains."""
    times, useful = cost(a, 1, on, rows), flops(a, 1)
    speed = useful / max(times) / 1e12
    shapes: draw.Elements = []
    points = [(useful / moved, color) for moved, color in zip(traffic(a, 1, rows), (GREY, TEAL), strict=True)]
    if chosen:
        shapes += plane.path([(x, speed) for x, _ in points], RED, 2)
        for x, color in points:
            shapes += plane.path([(x, speed), (x, 0.3)], color, 1.2, dashed=True)
    for (x, color), name in zip(points, ("HBM", "L2"), strict=True):
        color = RED if chosen and times.binds == name else color
        shapes += plane.dot(x, speed, color, 8 if chosen else 5, 1 if chosen else 0.4)
    if chosen:
        words = f"{speed:.3g} TFLOP/s: {times.binds} binds"
        shapes += draw.text(70, 126, words, color=RED, bold=True, size=15)
    return shapes


def rooflines_caption(attention: str, kernel: str, chip: str) -> str:
    on, a, rows = CHIPS[chip], KINDS[attention], ROWS[kernel]
    (hbm, l2), times = traffic(a, 1, rows), cost(a, 1, on, rows)
    return (
        f"{attention}, {kernel}, {chip}: {flops(a, 1) / hbm:.3g} FLOP per byte of HBM, {flops(a, 1) / l2:.3g} per byte "
        f"of L2; {times.binds} binds, at {flops(a, 1) / max(times) / 1e12:.3g} TFLOP/s."
    )


EXPLORERS: dict[str, tuple[Callable[..., Any], Callable[..., str], dict[str, Any]]] = {
    "caches": (
        caches, caches_caption, {"group": (1, 2, 4, 8), "kernel": tuple(KERNELS), "tiles": (4, 8), "step": moments},
    ),
    "gains": (gains, gains_caption, {"chip": CHIP_NAMES, "keys": (4096, 32_768), "groups_are": ("together", "apart")}),
    "rooflines": (rooflines, rooflines_caption, {"attention": tuple(KINDS), "kernel": tuple(ROWS), "chip": NAMES}),
}
