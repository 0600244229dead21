"""What the roofline chapter draws: roofs on logarithmic axes, and counted work under them."""

import math
from typing import Any, NamedTuple

import svg

from llmbook.kit import draw
from llmbook.kit.hardware import GPUS
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW, rank_color

from .chains import SIZE, counted, partly_fused
from .gemm import Gemm, quantised, tiles, waves
from .layer import cache_gb, kernels, layer, layers, together
from .roofs import L2_READ, attainable, chip, dtypes, peak, predict, ridge, seconds, short

MODEL = "Llama-3-8B"
BATCHES = (1, 4, 16, 64, 256, 1024)
HUES = {
    "QKV": BLUE, "output": BLUE, "gate, up": PURPLE, "down": PURPLE, "attention": ORANGE,
    **dict.fromkeys(("norm 1", "norm 2", "RoPE", "SiLU · up", "residual"), GREEN),
}


def decades(low: float, high: float) -> range:
    return range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)


class Axes(NamedTuple):
    """A logarithmic panel: its corner and size in pixels, FLOP/byte across and FLOP/s up."""

    x: float
    y: float
    width: float
    height: float
    across: tuple[float, float]
    up: tuple[float, float]

    def at(self, intensity: float, rate: float) -> tuple[float, float]:
        shares = [
            math.log(max(value, low) / low) / math.log(high / low)
            for value, (low, high) in ((intensity, self.across), (rate, self.up))
        ]
        return self.x + shares[0] * self.width, self.y + (1 - shares[1]) * self.height

    def frame(self) -> list[Any]:
        parts, grid = [], ""
        for n in decades(*self.across):
            x, _ = self.at(10.0**n, 1)
            grid += f"M{x:.0f} {self.y:.0f}v{self.height:.0f}"
            parts += draw.text(x, self.y + self.height + 17, f"{10.0**n:g}", anchor="middle", size=12)
        for n in decades(*self.up):
            _, y = self.at(1, 10.0**n)
            grid += f"M{self.x:.0f} {y:.0f}h{self.width:.0f}"
            parts += draw.text(self.x - 6, y + 4, f"{10.0 ** (n - 12):g}", anchor="end", size=12)
        parts.append(svg.Path(stroke=GREY, stroke_opacity=0.3, extra={"d": grid}))
        base = self.y + self.height
        parts += draw.text(self.x + self.width / 2, base + 36, "FLOP per byte", anchor="middle")
        return parts + draw.text(self.x - 34, self.y - 10, "TFLOP/s")

    def roof(
        self, rate: float, bandwidth: float, name: str, slope: str, color: str, *, dashed: bool = False,
        opacity: float = 1, lift: float = 7,
    ) -> list[Any]:
        """A slope as steep as the bandwidth up to a ceiling as high as the rate, both named."""
        corner, start = rate / bandwidth, max(self.across[0], self.up[0] / bandwidth)
        x0, y0 = self.at(start, start * bandwidth)
        x1, y1 = self.at(corner, rate)
        x2 = self.x + self.width
        look: dict[str, Any] = {"color": color, "width": 2.5, "dashed": dashed, "opacity": opacity}
        parts = draw.line(x0, y0, x1, y1, **look) + draw.line(x1, y1, x2, y1, **look)
        parts += draw.text(x2, y1 - lift, name, anchor="end", size=12)
        if slope:
            angle, (mx, my) = math.degrees(math.atan2(y1 - y0, x1 - x0)), self.at(start * 2.6, start * 2.6 * bandwidth)
            parts.append(svg.Text(
                x=round(mx), y=round(my) - 8, text=slope, font_size=12,
                transform=[svg.Rotate(round(angle, 1), round(mx), round(my) - 8)],
            ))
        return parts


def dot(x: float, y: float, radius: float, color: str, opacity: float = 1, hollow: bool = False) -> list[Any]:
    fill = "none" if hollow else color
    look: dict[str, Any] = {"fill": fill, "fill_opacity": opacity, "stroke": color, "stroke_width": 2 if hollow else 1}
    return [svg.Circle(cx=round(x, 1), cy=round(y, 1), r=round(radius, 1), **look)]


# --- the flagship: a Llama layer's kernels under any GPU's roofs


def in_layer(gpu: str, context: int, work: str, batch: int) -> svg.SVG:
    """Roofs with a point per kernel, as large as its share of the time; beside it the times themselves."""
    costs, g = kernels(layer(MODEL, work, batch, context)), chip(gpu)
    hbm, top = g.bandwidth * 1e9, peak(gpu, "fp16")
    ax = Axes(42, 30, 470, 390, (0.1, 6e4), (2e10, 9e15))
    parts, slopes = [ax.frame()], f"slope: HBM, {g.bandwidth / 1e3:.3g} TB/s"
    if gpu in L2_READ:
        parts.append(ax.roof(top, L2_READ[gpu], "", "", GREY, dashed=True))
        slopes += f"; dashed: L2, {L2_READ[gpu] / 1e12:.2g} TB/s"
    parts.append(draw.text(ax.x + ax.width, ax.y + ax.height - 8, slopes, anchor="end", size=12))
    parts.append(ax.roof(g.single * 1e12, hbm, f"CUDA cores: {g.single:g}", "", YELLOW, lift=-17))
    parts.append(ax.roof(top, hbm, f"tensor cores, fp16: {g.half:g}", "", TEAL, lift=30))
    times = {name: predict(cost, gpu) for name, cost in costs.items()}
    whole = sum(t.time for t in times.values())
    if work == "decode":
        for name in ("QKV", "attention"):
            for cost in [kernels(layer(MODEL, work, b, context))[name] for b in BATCHES if b < batch]:
                parts.append(dot(*ax.at(cost.intensity, cost.flop / predict(cost, gpu).time), 4, HUES[name], 0.35))
    for name, cost in costs.items():
        radius = 4 + 22 * math.sqrt(times[name].time / whole)
        parts.append(dot(*ax.at(cost.intensity, cost.flop / times[name].time), radius, HUES[name], 0.75))
    low = 0
    for names, cost in together(costs):
        x, y = ax.at(cost.intensity, cost.flop / sum(times[n].time for n in names))
        words = ", ".join(names).replace("gate, up", "gate·up")
        flat = x > ax.x + 0.62 * ax.width  # on the ceiling labels hang below, one under the other
        low += flat
        at = (min(x, ax.x + ax.width - 3.3 * len(words)), y + 24 + 18 * low) if flat else (x + 18, y + 22)
        parts.append(draw.text(*at, words, anchor="middle" if flat else "start", size=12))
    longest = max(t.time for t in times.values())
    x0, wide = 648, 130
    parts.append(draw.text(x0 - 88, 20, "predicted time of each kernel", bold=True))
    for row, (name, t) in enumerate(times.items()):
        y = 34 + row * 30
        parts.append(draw.text(x0 - 8, y + 15, name, anchor="end"))
        parts.append(draw.box(x0, y, max(1.5, wide * t.time / longest), 21, HUES[name]))
        parts.append(draw.text(x0 + wide * t.time / longest + 6, y + 15, f"{seconds(t.time)}, {t.binds}", size=12))
    tokens = batch * (context if work == "prefill" else 1)
    need, has = cache_gb(MODEL, batch, context), g.memory
    parts.append(draw.text(x0 - 88, 362, f"one layer: {seconds(whole)}", bold=True, size=16))
    parts.append(draw.text(x0 - 88, 386, f"{seconds(whole / tokens)} per token"))
    fits = f"KV cache, {layers(MODEL)} layers: {short(need)} of {has:g} GB"
    full, ink = (": too much", RED) if need > has else ("", "currentColor")
    parts.append(draw.text(x0 - 88, 410, fits + full, color=ink, bold=need > has))
    return draw.canvas(930, 470, *parts)


def in_layer_caption(gpu: str, context: int, work: str, batch: int) -> str:
    costs = kernels(layer(MODEL, work, batch, context))
    times = {name: predict(cost, gpu) for name, cost in costs.items()}
    whole = sum(t.time for t in times.values())
    bound = sum(t.time for t in times.values() if t.binds == "memory") / whole
    slow = max(times, key=lambda name: times[name].time)
    many = f"{batch:,} sequence{'s' * (batch > 1)}"
    return (
        f"{MODEL}, {work}, {many} of {context:,} tokens on a {gpu}: the projections have "
        f"{short(costs['QKV'].intensity)} FLOP/byte, attention {short(costs['attention'].intensity)}, the ridge is at "
        f"{ridge(gpu):.0f}. {bound:.0%} of the layer's time is bound by memory; the longest kernel is {slow}, "
        f"{times[slow].time / whole:.0%} of it."
    )


# --- any GEMM on any GPU


def one_gemm(gpu: str, M: int, N: int, K: int, dtype: str) -> svg.SVG:
    """The chosen roof among the GPU's others, the GEMM's point, and where its time and bytes go."""
    g, shape = chip(gpu), Gemm(M, N, K, dtype)
    hbm, top = g.bandwidth * 1e9, peak(gpu, dtype)
    ax = Axes(42, 30, 430, 330, (0.2, 2e4), (1e11, 9e15))
    parts = [ax.frame()]
    for rate in {peak(gpu, d) for d in dtypes(gpu)} - {top}:
        names = ", ".join(d for d in dtypes(gpu) if peak(gpu, d) == rate)
        parts.append(ax.roof(rate, hbm, names, "", GREY, opacity=0.5))
    if gpu in L2_READ:
        parts.append(ax.roof(top, L2_READ[gpu], "", f"L2 {L2_READ[gpu] / 1e12:.1f} TB/s", GREY, dashed=True))
        inner = shape.flop / shape.l2_bytes()
        x, y = ax.at(inner, attainable(inner, top, L2_READ[gpu]))
        parts += [dot(x, y, 7, ORANGE, hollow=True), draw.text(x - 12, y - 6, "from L2", anchor="end", size=12)]
    parts.append(ax.roof(top, hbm, f"{dtype}: {top / 1e12:.4g} TFLOP/s", f"HBM {g.bandwidth / 1e3:.3g} TB/s", TEAL))
    x, y = ax.at(shape.intensity, attainable(shape.intensity, top, hbm))
    parts.append(draw.line(x, y, x, ax.y + ax.height, color=ORANGE, dashed=True, width=1))
    end, words = x > ax.x + 0.6 * ax.width, f"{short(shape.intensity)} FLOP/B"
    at = (x - 8 if end else x + 12, y + 20, words)
    parts += [dot(x, y, 8, ORANGE), draw.text(*at, anchor="end" if end else "start", bold=True)]
    cal, mem = shape.flop / top, shape.bytes / hbm
    for y, name, t, color in ((40, "T_cal", cal, PURPLE), (84, "T_mem", mem, TEAL)):
        parts.append(draw.text(560, y + 19, name, anchor="end"))
        parts.append(draw.box(568, y, 150 * t / max(cal, mem), 28, color))
        parts.append(draw.text(574 + 150 * t / max(cal, mem), y + 19, seconds(t)))
    parts.append(draw.text(520, 158, f"bytes: {shape.bytes / 1e6:.4g} MB", bold=True))
    for row, (name, n) in enumerate((("x", M * K), ("w", K * N), ("y", M * N))):
        y, share = 170 + row * 36, n / shape.elements
        parts.append(draw.text(560, y + 18, name, anchor="end", mono=True))
        parts.append(draw.box(568, y, max(1.5, 150 * share), 26, (BLUE, ORANGE, GREEN)[row]))
        parts.append(draw.text(574 + 150 * share, y + 18, f"{share:.1%}"))
    parts.append(draw.text(520, 308, f"y = x·w: [{M:,}, {K:,}] · [{K:,}, {N:,}]"))
    parts.append(draw.text(520, 332, f"bound by {'memory' if mem >= cal else 'products'}", bold=True, size=16))
    return draw.canvas(790, 410, *parts)


def one_gemm_caption(gpu: str, M: int, N: int, K: int, dtype: str) -> str:
    g = Gemm(M, N, K, dtype)
    cal, mem = g.flop / peak(gpu, dtype), g.bytes / (chip(gpu).bandwidth * 1e9)
    return (
        f"M = {M:,}, N = {N:,}, K = {K:,} in {dtype} on a {gpu}: {g.flop / 1e9:.3g} GFLOP, {g.bytes / 1e6:.3g} MB, "
        f"{short(g.intensity)} FLOP/byte against a ridge of {ridge(gpu, dtype):.3g}. Predicted: "
        f"max({seconds(cal)}, {seconds(mem)})."
    )


def all_roofs() -> svg.SVG:
    """Every GPU of the table, half precision and HBM; the ridge points are dots."""
    ax = Axes(42, 30, 520, 360, (1, 3e3), (2e11, 4e15))
    parts = [ax.frame()]
    for i, g in enumerate(sorted(GPUS, key=lambda g: -g.half * 1e6 - g.bandwidth)):
        top, hbm, color = g.half * 1e12, g.bandwidth * 1e9, rank_color(i)
        parts += [ax.roof(top, hbm, "", "", color), dot(*ax.at(top / hbm, top), 6, color)]
        y = 44 + 40 * i
        parts += [dot(596, y - 4, 6, color), draw.text(610, y, g.name, bold=True)]
        words = f"ridge {g.ridge:.0f} FLOP/B = {g.half:g} / {g.bandwidth / 1e3:.3g}"
        parts.append(draw.text(610, y + 17, words, size=12))
    return draw.canvas(830, 440, *parts)


def all_roofs_caption() -> str:
    low, high = min(GPUS, key=lambda g: g.ridge), max(GPUS, key=lambda g: g.ridge)
    between = f"{low.ridge:.0f} ({low.name}) and {high.ridge:.0f} ({high.name})"
    return f"Datasheet peaks: half precision needs between {between} FLOPs per byte before arithmetic limits it."


def quantisation(gpu: str, N: int, M: int) -> svg.SVG:
    """Efficiency against M as a saw, and the multiprocessors' last wave at the chosen M."""
    sms, parts = chip(gpu).sms, []
    x0, y0, wide, tall, most = 44, 24, 440, 300, 4096
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = y0 + tall * (1 - share)
        parts.append(draw.line(x0, y, x0 + wide, y, color=GREY, width=1, opacity=0.3))
        parts.append(draw.text(x0 - 6, y + 4, f"{share:.0%}", anchor="end", size=12))
    points = sorted({m for edge in range(0, most + 1, 128) for m in (edge, edge + 1) if 0 < m <= most})
    path = "".join(
        f"{'L' if i else 'M'}{x0 + wide * m / most:.1f} {y0 + tall * (1 - quantised(m, N, sms)):.1f}"
        for i, m in enumerate(points)
    )
    parts.append([svg.Path(fill="none", stroke=TEAL, stroke_width=2, extra={"d": path})])
    for m in range(0, most + 1, 1024):
        parts.append(draw.text(x0 + wide * m / most, y0 + tall + 18, f"{m:,}", anchor="middle", size=12))
    parts.append(draw.text(x0 + wide / 2, y0 + tall + 38, "M, rows (tokens)", anchor="middle"))
    x, y = x0 + wide * M / most, y0 + tall * (1 - quantised(M, N, sms))
    parts += [draw.line(x, y0, x, y0 + tall, color=ORANGE, dashed=True), dot(x, y, 7, ORANGE)]
    count, rounds = tiles(M, N), waves(M, N, sms)
    last, left, cell = count - (rounds - 1) * sms, 530, 22
    parts.append(draw.text(left, 20, f"wave {rounds} of {rounds}: {last} of {sms} busy", bold=True))

    def fill(row: int, column: int) -> tuple[str, float]:
        return (ORANGE, 1) if row * 12 + column < last else (GREY, 0.2)

    parts.append(draw.matrix(left, 32, sms // 12, 12, cell, fill))
    parts.append(draw.text(left, 56 + math.ceil(sms / 12) * cell, f"{count:,} tiles of 128 × 128"))
    useful = f"{quantised(M, N, sms):.0%} useful"
    parts.append(draw.text(left, 80 + math.ceil(sms / 12) * cell, useful, bold=True, size=16))
    return draw.canvas(800, 372, *parts)


def quantisation_caption(gpu: str, N: int, M: int) -> str:
    sms = chip(gpu).sms
    return (
        f"A GEMM with N = {N:,} and M = {M:,} on the {sms} multiprocessors of a {gpu}: {tiles(M, N):,} tiles take "
        f"{waves(M, N, sms)} wave{'s' * (waves(M, N, sms) > 1)}, and {quantised(M, N, sms):.1%} of the products "
        f"that the chip could do meanwhile are wanted."
    )


def fusing(function: str, step: int) -> svg.SVG:
    """Kernels above the memory; arrows as thick as the bytes that come up and go down."""
    whole = counted(function)
    parts, across = [], 764 / len(whole.ops)
    parts.append(draw.text(4, 18, f"{function} of {SIZE:,} × {SIZE:,} in fp16, the first {step} fused", bold=True))
    at = 0.0
    for group, read, written in partly_fused(whole, step):
        x, wide = 4 + at, across * len(group) - 14
        at += across * len(group)
        parts.append(draw.box(x, 32, wide, 46, PURPLE if len(group) > 1 else BLUE, " · ".join(
            op.name for op in group)))
        for n, (moved, up) in enumerate(((read, True), (written, False))):
            ax, thick = x + wide * (0.28 + 0.44 * n), max(1.5, 14 * moved / 2**26)
            tip, back, color = (88, 97, TEAL) if up else (170, 161, ORANGE)
            parts.append(draw.line(ax, 172 if up else 84, ax, back, color=color, width=thick))
            head = f"{ax - 8:.0f},{back} {ax + 8:.0f},{back} {ax:.0f},{tip}"
            parts.append([svg.Polygon(fill=color, extra={"points": head})])
            parts.append(draw.text(ax, 196, f"{moved / 1e6:.3g}", anchor="middle", size=12))
    parts += [draw.box(4, 206, 750, 26, GREY, "HBM (numbers: MB)")]
    now = sum(read + written for _, read, written in partly_fused(whole, step))
    apart = whole.unfused().bytes
    parts.append(draw.text(4, 262, f"{now / 1e6:.4g} MB move, {now / apart:.0%} of unfused", bold=True, size=15))
    parts.append(draw.box(4, 274, 750, 18, GREY, opacity=0.18))
    parts.append(draw.box(4, 274, 750 * now / apart, 18, TEAL))
    return draw.canvas(768, 300, *parts)


def fusing_caption(function: str, step: int) -> str:
    whole = counted(function)
    now = sum(read + written for _, read, written in partly_fused(whole, step))
    flop, hbm = whole.unfused().flop, chip("H100 SXM").bandwidth * 1e9
    left = len(whole.ops) - step + 1
    return (
        f"{function} in {left} kernel{'s' * (left > 1)}: {now / 1e6:.4g} MB, {flop / now:.2f} FLOP/byte, "
        f"at least {seconds(now / hbm)} on an H100."
    )
