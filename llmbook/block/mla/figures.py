"""What the mla chapter draws, from its own weights and formulas."""

import functools
import math
from typing import NamedTuple

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.hardware import gpu
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW

from .cost import cheaper_below, faster_below, flop, least_time, rungs
from .entangled import best_single, between, misses
from .ladder import draw_factors
from .sizes import PUBLISHED, V3, Sizes

WIDTH, TOKENS = 860, 4096
RUNGS = tuple(rungs(V3, TOKENS))
EXPLAINED = {
    "MHA": "every head's key and value is kept for every token",
    "low-rank KV": "only c is kept; every pass rebuilds all heads' keys and values of all tokens",
    "absorbed": "the query goes down to c, the output comes up from it; nothing is rebuilt",
    "decoupled RoPE": "position travels in a second, narrow query and one key shared by all heads",
}


# --- the ladder


def _plates(x: float, y: float, wide: int, heads: int, color: str, label: str, kept: bool = False) -> draw.Elements:
    """A vector: one plate if all heads share it, a stack if each head has its own; a red rim if it is cached."""
    w, parts = max(14, 0.25 * min(wide, 600)), []
    for i in range(3 if heads > 1 else 0, 0, -1):
        parts += draw.box(x + 4 * i, y - 4 * i, w, 24, color, opacity=0.35)
    parts += draw.box(x, y, w, 24, color, stroke=RED if kept else None)
    name = f"{label}  {heads} × {wide}" if heads > 1 else f"{label}  {wide}"
    return parts + draw.text(x, y - (19 if heads > 1 else 7), name, bold=kept, size=12)


def _arrow(x1: float, y1: float, x2: float, y2: float, label: str = "", above: float = 6) -> draw.Elements:
    words = draw.text((x1 + x2) / 2, (y1 + y2) / 2 - above, label, anchor="middle", size=12)
    return draw.line(x1, y1, x2, y2, arrow=True, opacity=0.7) + (words if label else [])


def _flow(s: Sizes, rung: str) -> draw.Elements:
    n, low = s.heads, rung in ("absorbed", "decoupled RoPE")
    parts = draw.box(0, 150, 34, 70, GREY, "h") + draw.text(0, 238, f"D = {s.dim}", size=12)
    parts += _plates(190, 60, s.nope, n, BLUE, "q") + _arrow(38, 160, 184, 74, "W_Q", 10)
    if rung == "MHA":
        parts += _plates(300, 150, s.nope, n, ORANGE, "k", True) + _arrow(38, 180, 294, 164, "W_K")
        parts += _plates(300, 240, s.v, n, GREEN, "v", True) + _arrow(38, 200, 294, 250, "W_V")
    else:
        parts += _plates(124, 196, s.latent, 1, TEAL, "c", True) + _arrow(38, 196, 118, 206, "W_DKV", 8)
    if rung == "low-rank KV":
        parts += _plates(370, 150, s.nope, n, ORANGE, "k") + _arrow(258, 202, 364, 166, "W_UK", 10)
        parts += _plates(370, 250, s.v, n, GREEN, "v") + _arrow(258, 214, 364, 258, "W_UV", -18)
    if low:
        parts += _plates(330, 60, s.latent, n, BLUE, "q in the latent") + _arrow(240, 72, 324, 72, "W_UKᵀ")
        parts += _arrow(258, 202, 524, 150, "") + draw.text(262, 164, "c, key of all heads", size=12)
        parts += _arrow(258, 214, 524, 186, "c, value of all heads", -20)
    if rung == "decoupled RoPE":
        parts += _plates(190, 118, s.rope, n, YELLOW, "q_R")[:-1]
        parts += draw.text(226, 134, f"q_R  {n} × {s.rope}", size=12)
        parts += _plates(124, 268, s.rope, 1, YELLOW, "k_R", True)[:-1] + draw.text(
            150, 285, f"k_R  {s.rope}, one for all heads", size=12, bold=True)
        parts += _arrow(38, 168, 184, 130) + _arrow(38, 210, 118, 276) + draw.text(0, 284, "W_KR, turned", size=12)
        parts += draw.line(330, 280, 540, 222, arrow=True, color=YELLOW) + draw.line(
            330, 130, 524, 140, arrow=True, color=YELLOW)
    elif not low:
        x = 352 if rung == "MHA" else 422
        parts += _arrow(x, 164, 524, 164) + _arrow(x, 254, 524, 196)
    parts += _arrow(478 if low else 246, 76, 526, 124)
    parts += draw.box(530, 120, 100, 100, COLORS["P"], "softmax", opacity=0.9)
    wide, label = (s.latent, "o in the latent") if low else (s.v, "o")
    parts += _plates(662, 160, wide, n, PURPLE, label) + _arrow(632, 172, 658, 172)
    end = (662 + 0.25 * wide + 12, 196)
    goes = "W_UV, W_O" if low else "W_O"
    parts += draw.line(690, 190, 690, 252, arrow=True, opacity=0.7) + draw.text(698, 226, goes, size=12)
    return parts + draw.box(662, 258, max(90, end[0] - 700), 24, GREY, f"out  {s.dim}")


def ladder(rung: str, model: str) -> svg.SVG:
    """One rung as a flow of vectors, and below what it keeps, computes and moves beside the other rungs."""
    s = PUBLISHED[model]
    parts = [draw.text(0, 16, f"{rung}: {EXPLAINED[rung]}", bold=True, size=15), _flow(s, rung)]
    parts.append(draw.text(WIDTH, 306, "stack: one per head · single: shared · red rim: cached", size=12, anchor="end"))
    parts.append(draw.line(0, 316, WIDTH, 316, color=GREY, width=1, opacity=0.5))
    every = rungs(s, TOKENS)
    titles = ("cached per token, layer: elements", "FLOP", "cache, rebuilt K and V moved: bytes")
    values = {name: (r.cached, r.flop, 2 * r.moved) for name, r in every.items()}
    for column, title in enumerate(titles):
        x, room = (0, 304, 582)[column], (100, 150, 150)[column]
        parts.append(draw.text(x, 338, title, bold=True))
        most = max(row[column] for row in values.values())
        left = 118 if column == 0 else 0
        for i, (name, row) in enumerate(values.items()):
            y, mine = 348 + 28 * i, name == rung
            if column == 0:
                parts.append(draw.text(110, y + 16, name, anchor="end", bold=mine, size=12))
            parts.append(draw.box(x + left, y, max(2, room * row[column] / most), 22, TEAL if mine else GREY,
                                  opacity=1 if mine else 0.4))
            words = f"{row[column]:,}" if column == 0 else _si(row[column])
            parts.append(draw.text(x + left + room * row[column] / most + 7, y + 16, words, size=12, bold=mine))
    words = f"one decoded token that sees {TOKENS:,} others, one layer, one sequence, bf16"
    parts.append(draw.text(304, 474, words, size=12))
    return draw.canvas(WIDTH, 482, *parts)


def _si(value: float) -> str:
    """Three digits and a prefix, 10⁻⁶ to 10¹⁵."""
    units = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))
    unit, size = next(pair for pair in units if value >= 0.9999 * pair[1] or pair[0] == "µ")
    return f"{value / size:.3g} {unit}"


def ladder_caption(rung: str, model: str) -> str:
    s, r = PUBLISHED[model], rungs(PUBLISHED[model], TOKENS)[rung]
    return (
        f"{model}, {rung}: {r.cached:,} elements per token and layer, {2 * s.layers * r.cached / 1000:,.3f} KB per "
        f"token over {s.layers} layers in bf16; a decoded token costs {_si(r.flop)}FLOP and moves {_si(2 * r.moved)}B "
        "per layer."
    )


# --- one matrix for all offsets


SINGLES = ("the one of offset 0", "the mean of all")
OFFSETS = range(-31, 1)


@functools.cache
def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    w, _ = draw_factors(1, 8, 12, 12, seed=3)
    return w.q[0], w.up_k[0]


@functools.cache
def _single(single: str) -> torch.Tensor:
    if single == SINGLES[0]:
        return between(*_weights(), 0)
    return best_single(*_weights(), OFFSETS)


@functools.cache
def _misses(single: str) -> list[float]:
    """By how far back the key is, from 0 on."""
    every: list[float] = misses(*_weights(), _single(single), OFFSETS).flip(0).tolist()
    return every


def entangled(behind: int, single: str) -> svg.SVG:
    """What stands between h and c at an offset, one matrix that is to stand there always, and what is left over."""
    true, one = between(*_weights(), -behind), _single(single)
    most = float(between(*_weights(), 0).abs().max())
    titles = (f"needed, {behind} tokens back", f"absorbed: {single}", "needed − absorbed")
    parts = []
    for i, (title, m) in enumerate(zip(titles, (true, one, true - one), strict=True)):
        def look(r: int, c: int, m: torch.Tensor = m) -> tuple[str, float]:
            value = float(m[r, c]) / most
            return (ORANGE if value > 0 else BLUE), round(min(1.0, 0.04 + abs(value)), 1)

        parts.append(draw.matrix(290 * i, 34, 12, 12, 20, look, label=title))
        if i < 2:
            parts.append(draw.text(290 * i + 264, 160, "−=="[i] if i == 0 else "=", size=22, anchor="middle"))
    every = _misses(single)
    parts.append(draw.text(0, 312, "relative error of the absorbed matrix, by how far back the key is", bold=True))
    for n, miss in enumerate(every):
        mine = n == behind
        tall = 82 * miss
        parts.append(draw.box(26 * n, 440 - tall, 22, tall, RED if mine else GREY, opacity=1 if mine else 0.45))
        if n % 4 == 0 or mine:
            parts.append(draw.text(26 * n + 11, 458, str(n), anchor="middle", size=12, bold=mine))
    parts.append(draw.line(0, 440 - 82, 26 * len(every), 440 - 82, dashed=True, opacity=0.6))
    parts.append(draw.text(26 * len(every) + 6, 440 - 78, "100 %", size=12))
    return draw.canvas(WIDTH + 20, 466, *parts)


def entangled_caption(behind: int, single: str) -> str:
    return (
        f"A key {behind} tokens back needs W_UQᵀ R({-behind}) W_UK; {single}, absorbed once for all offsets, is wrong "
        f"by {_misses(single)[behind]:.0%} of it (head width 8, latent 12, 32 offsets)."
    )


# --- where the forms cross


LINES = {"rebuilt": ("latent cached, keys and values rebuilt", ORANGE), "absorbed": ("latent cached, absorbed", TEAL),
         "kept": ("keys and values of all heads cached", PURPLE)}
QUERIES = sorted({round(10 ** (i / 12)) for i in range(37)})  # 1 to 1,000


class Panel(NamedTuple):
    """A log-log plot: where it is, and the powers of ten at its edges."""

    x: float
    y: float
    low: float
    high: float
    wide: float = 350
    tall: float = 230
    right: int = 3

    def at(self, n: float, value: float) -> tuple[float, float]:
        up = (math.log10(value) - self.low) / (self.high - self.low)
        return self.x + self.wide * math.log10(n) / self.right, self.y + self.tall * (1 - up)

    def grid(self, title: str) -> draw.Elements:
        parts = draw.text(self.x, self.y - 12, title, bold=True)
        for power in range(math.ceil(self.low), math.floor(self.high) + 1):
            x, y = self.at(1, 10**power)
            parts += draw.line(x, y, x + self.wide, y, color=GREY, width=1, opacity=0.35)
            parts += draw.text(x - 6, y + 4, _si(10**power).strip(), anchor="end", size=12)
        for power in range(self.right + 1):
            x, y = self.at(10**power, 10**self.low)
            parts += draw.line(x, self.y, x, y, color=GREY, width=1, opacity=0.35)
            parts += draw.text(x, y + 17, f"{10**power:,}", anchor="middle", size=12)
        return parts + draw.text(self.x + self.wide / 2, self.y + self.tall + 33, "new tokens per sequence",
                                 anchor="middle", size=12)

    def curve(self, values: list[float], color: str) -> draw.Elements:
        points = [self.at(n, value) for n, value in zip(QUERIES, values, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        return [svg.Path(fill="none", stroke=color, stroke_width=3, extra={"d": path})]

    def mark(self, n: float, words: str) -> draw.Elements:
        x = self.at(n, 1)[0]
        parts = draw.line(x, self.y, x, self.y + self.tall, dashed=True, width=1.5)
        return parts + draw.text(x - 6, self.y + self.tall - 8, words, size=12, bold=True, anchor="end")


def crossover(tokens: int, batch: int, chip: str) -> svg.SVG:
    """FLOPs and the roofline's least time of one layer by new tokens per sequence, and what each form has to keep."""
    work = {form: [sum(flop(V3, form, n, tokens, batch).values()) for n in QUERIES] for form in LINES}
    time = {form: [least_time(V3, form, n, tokens, batch, gpu(chip)) for n in QUERIES] for form in LINES}
    parts = []
    for x, values, title, border, words in (
        (52, work, "FLOP of one layer", cheaper_below(V3, tokens), "cross at"),
        (490, time, f"least seconds on an {chip}", faster_below(V3, tokens, batch, gpu(chip)), "rebuilding wins from"),
    ):
        every = [value for line in values.values() for value in line]
        panel = Panel(x, 62, math.log10(min(every)) - 0.3, math.log10(max(every)) + 0.15)
        parts.append(panel.grid(title))
        parts += [panel.curve(list(values[form]), color) for form, (_, color) in LINES.items()]
        parts.append(panel.mark(border, f"{words} {border:.0f}"))
    for i, (words, color) in enumerate(LINES.values()):
        x = (0, 310, 540)[i]
        parts.append(draw.box(x, 8, 22, 12, color) + draw.text(x + 29, 19, words))
    memory = gpu(chip).memory
    sizes = {form: 2 * batch * tokens * V3.elements_per_token(form) / 1e9 for form in ("latent", "per head")}
    parts.append(draw.text(0, 362, f"to keep for {batch} × {tokens:,} tokens, all {V3.layers} layers, bf16", bold=True))
    for i, (form, color) in enumerate((("latent", TEAL), ("per head", PURPLE))):
        y, wide = 372 + 28 * i, 400 * sizes[form] / sizes["per head"]
        times = sizes[form] / memory
        words = f"{sizes[form]:,.1f} GB, {times:,.2f} × an {chip}'s memory"
        parts.append(draw.text(74, y + 16, form, anchor="end"))
        parts.append(draw.box(82, y, max(2, wide), 22, color) + draw.text(90 + wide, y + 16, words))
    return draw.canvas(WIDTH, 430, *parts)


def crossover_caption(tokens: int, batch: int, chip: str) -> str:
    one = {form: _si(least_time(V3, form, 1, tokens, batch, gpu(chip))) for form in LINES}
    return (
        f"DeepSeek-V3, {batch} × {tokens:,} tokens in view: rebuilding has fewer FLOPs from "
        f"{cheaper_below(V3, tokens):.0f} new tokens on, and less time on an {chip} from "
        f"{faster_below(V3, tokens, batch, gpu(chip))}. A layer's one new token takes at least {one['absorbed']}s "
        f"absorbed, {one['rebuilt']}s rebuilt, {one['kept']}s with keys and values kept."
    )


EXPLORERS = {
    "ladder": (ladder, ladder_caption, {"rung": RUNGS, "model": tuple(PUBLISHED)}),
    "entangled": (entangled, entangled_caption, {"behind": range(32), "single": SINGLES}),
    "crossover": (crossover, crossover_caption, {
        "tokens": (1024, 4096, 16_384, 131_072), "batch": (1, 16, 128), "chip": ("H100 SXM", "L4"),
    }),
}
