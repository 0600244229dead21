"""What the flash_attention_2 chapter draws: its own schedules, ledgers and recordings."""

import functools
from collections.abc import Callable
from typing import Any

import svg
import torch

from llmbook.gpu.flash_attention.forward import block_sizes, flash_traffic
from llmbook.gpu.flash_attention.memory import Memory
from llmbook.kit import draw
from llmbook.kit.hardware import SHARED_PER_BLOCK, gpu
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, plot, rank_color
from llmbook.kit.trace import trace

from .schedule import Span, busy, heads_at_once, key_tiles, launch_flash_1, launch_flash_2, makespan, run
from .tiled import tiled_backward, tiled_peak, tiled_traffic

WIDTH, CHIP, D = 800, "H100 SXM", 128
BM, BN = 128, 64
ORDERS = {
    "rows in order": (False, False), "longest first": (True, False), "longest first, fixed shares": (True, True),
}


# --- who works: multiprocessors and HBM, by batch, heads and length


@functools.cache
def launches(heads: int, N: int) -> tuple[list[Span], list[Span]]:
    """Both algorithms' full (not causal) launches on one GPU."""
    sms = gpu(CHIP).sms
    return run(launch_flash_1(heads, N, BM, BN), sms), run(launch_flash_2(heads, N, BM, BN), sms)


def traffic_of(heads: int, N: int) -> tuple[float, float]:
    """GB through HBM in fp16: FlashAttention with the paper's tiles for this chip, FlashAttention-2 with BM rows."""
    Bc, _ = block_sizes(SHARED_PER_BLOCK[gpu(CHIP).sm] // 2, D)
    return tuple(2 * heads * moved / 1e9 for moved in (flash_traffic(N, D, Bc), tiled_traffic(N, D, BM)))  # type: ignore[return-value]


def occupancy(batch: int, heads: int, N: int) -> svg.SVG:
    """Each multiprocessor as a cell, filled as high as its share of the time; under it time and traffic."""
    both, sms = launches(batch * heads, N), gpu(CHIP).sms
    times, moved = [makespan(spans) for spans in both], traffic_of(batch * heads, N)
    parts = []
    names = ("FlashAttention", "FlashAttention-2")
    for n, (name, spans, color) in enumerate(zip(names, both, (ORANGE, BLUE), strict=True)):
        x, cell, columns = 6 + n * 410, 31, 12
        worked = [0] * sms
        for span in spans:
            worked[span.sm] += span.tile.work
        parts.append(draw.text(x, 18, name, bold=True, size=15))
        parts.append(draw.text(x + columns * cell - 3, 18, f"{len(spans):,} programs", anchor="end"))
        for sm in range(sms):
            left, top, side = x + sm % columns * cell, 30 + sm // columns * cell, cell - 4
            tall = side * worked[sm] / times[n]
            parts.append(draw.box(left, top, side, side, GREY, opacity=0.16))
            if tall > 0.4:
                parts.append(draw.box(left, top + side - tall, side, tall, color))
        y = 30 + 11 * cell + 22
        for row, (what, value, most, words) in enumerate((
            ("time", times[n], max(times), f"{times[n]:,} key tiles, {busy(spans, sms):.0%} of the chip busy"),
            ("HBM", moved[n], max(moved), f"{moved[n]:.3g} GB"),
        )):
            top = y + row * 46
            parts.append(draw.text(x, top, f"{what}: {words}"))
            parts.append(draw.box(x, top + 7, 368, 16, GREY, opacity=0.16))
            parts.append(draw.box(x, top + 7, 368 * value / most, 16, color if what == "time" else COLORS["hbm"]))
    return draw.canvas(WIDTH - 12, 30 + 11 * 31 + 102, *parts)


def occupancy_caption(batch: int, heads: int, N: int) -> str:
    (one, two), sms, moved = launches(batch * heads, N), gpu(CHIP).sms, traffic_of(batch * heads, N)
    return (
        f"{CHIP}, {batch} × {heads} heads of d = {D}, N = {N:,}: FlashAttention keeps {busy(one, sms):.0%} of {sms} "
        f"multiprocessors busy, FlashAttention-2 {busy(two, sms):.0%}, and is done "
        f"{makespan(one) / makespan(two):.1f} times as soon. HBM: {moved[0]:.3g} against {moved[1]:.3g} GB."
    )


# --- in which order: causal tiles on a small GPU


def dealing(order: str, multiprocessors: int, step: int) -> svg.SVG:
    """The causal triangle of two heads, and the same tiles on the multiprocessors' time."""
    heads, N, spans = 2, 12 * BM, _dealt(order, multiprocessors)
    now = _moment(spans, step)
    parts = []
    for head in range(heads):
        x = 4 + head * 210
        parts.append(draw.text(x, 16, f"head {head}", bold=True))
        for block in range(12):
            span = next(s for s in spans if s.tile.head == head and s.tile.block == block)
            wide, y = 8.2 * key_tiles(block, N, BM, BM, True) * 2, 24 + 16 * block
            running, done = span.start <= now < span.end, span.end <= now
            parts.append(draw.box(x, y, 196.8, 14, GREY, opacity=0.1))
            parts.append(draw.box(x, y, wide, 14, rank_color(span.sm), opacity=1 if running or done else 0.3))
            if running:
                parts.append(draw.text(x + wide + 4, y + 12, f"SM {span.sm}", size=12))
    y = 24 + 16 * 12 + 40
    lane = 30 if multiprocessors <= 6 else 22
    parts.append(draw.text(0, y - 12, "time on each multiprocessor →", bold=True))
    shown = [
        draw.Span(s.sm, s.start, min(s.end, now), rank_color(s.sm), f"{s.tile.head}:{s.tile.block}")
        for s in spans if s.start < now
    ]
    longest = max(makespan(_dealt(other, multiprocessors)) for other in ORDERS)
    lanes = [f"SM {sm}" for sm in range(multiprocessors)]
    parts.append(draw.timeline(0, y, WIDTH, lane, shown, lanes, until=longest))
    at = 64 + (WIDTH - 64) * makespan(spans) / longest
    bottom = y + lane * multiprocessors
    parts.append(draw.line(at - 1, y - 4, at - 1, bottom + 4, color=RED, width=2, dashed=True))
    parts.append(draw.text(min(at, WIDTH), bottom + 18, f"done after {makespan(spans)}", anchor="end", color=RED))
    right = 446
    for n, words in enumerate((
        f"{busy(spans, multiprocessors):.0%} of the time is work", f"{makespan(spans)} key tiles until the end",
        f"K and V of {heads_at_once(spans)} head{'s' * (heads_at_once(spans) > 1)} at once",
    )):
        parts.append(draw.text(right, 70 + 28 * n, words, size=16, bold=n == 0))
    return draw.canvas(WIDTH, bottom + 26, *parts)


@functools.cache
def _dealt(order: str, multiprocessors: int) -> list[Span]:
    longest_first, fixed = ORDERS[order]
    return run(launch_flash_2(2, 12 * BM, BM, BM // 2, True, longest_first), multiprocessors, fixed)


def _moment(spans: list[Span], step: int) -> float:
    return makespan(spans) * step / 8


def dealing_caption(order: str, multiprocessors: int, step: int) -> str:
    spans = _dealt(order, multiprocessors)
    now = _moment(spans, step)
    working = sum(s.start <= now < s.end for s in spans)
    return (
        f"Two heads of 12 causal blocks on {multiprocessors} multiprocessors, {order}: after {now:.0f} of "
        f"{makespan(spans)} key tiles {working} work; over the whole run {busy(spans, multiprocessors):.0%} of the "
        "time is work."
    )


# --- one memory, two loop orders


def loop_orders(d: int, chip: str) -> Any:
    """Elements moved by FlashAttention-2 against B_r, all of SRAM in use, beside FlashAttention's own tiles."""
    M, N = SHARED_PER_BLOCK[gpu(chip).sm] // 2, 8192
    rows, moved, Bc1 = _by_rows(d, chip)
    with plot(7.4, 3.8) as (figure, axes):
        one = flash_traffic(N, d, Bc1)
        axes.axhline(one / 1e6, color=ORANGE, label=f"FlashAttention, B_c = {Bc1}")
        axes.plot(rows, [value / 1e6 for value in moved], "o-", color=BLUE, label="FlashAttention-2")
        best = tiled_traffic(N, d, BM)
        axes.plot([BM], [best / 1e6], "D", color=RED, markersize=9, label=f"the kernel's B_r = {BM}")
        axes.annotate(
            f"{one / moved[-1]:.1f}× less", (rows[-1], moved[-1] / 1e6), xytext=(-14, -4), ha="right",
            textcoords="offset points", fontweight="bold",
        )
        axes.set(xlabel="rows of queries per tile, B_r (the keys take what is left)", yscale="log",
                 ylabel="million elements through HBM", title=f"{chip}: M = {M:,} fp16 elements, N = {N:,}, d = {d}")
        axes.set_xscale("log", base=2)
        axes.legend(loc="upper right")
    return figure


@functools.cache
def _by_rows(d: int, chip: str) -> tuple[list[int], list[int], int]:
    """B_r choices that leave room for 16 keys or more, the traffic of each, and FlashAttention's B_c."""
    M, N = SHARED_PER_BLOCK[gpu(chip).sm] // 2, 8192
    rows = [Br for Br in (16, 32, 64, 128, 256, 512, 1024) if tiled_peak(16, Br, d) <= M]
    return rows, [tiled_traffic(N, d, Br) for Br in rows], block_sizes(M, d)[0]


def loop_orders_caption(d: int, chip: str) -> str:
    rows, moved, Bc = _by_rows(d, chip)
    one = flash_traffic(8192, d, Bc)
    return (
        f"{chip}, d = {d}: with the paper's tiles FlashAttention moves {one / 1e6:.0f} million elements per head; with "
        f"queries outside it is {moved[0] / 1e6:.0f} million at B_r = {rows[0]} and {moved[-1] / 1e6:.0f} million at "
        f"B_r = {rows[-1]}."
    )


# --- the backward: who writes what


BACKWARD_N, BACKWARD_D, TILE = 12, 2, 2


@functools.cache
def _backward_steps() -> tuple[list[str], list[tuple[int, tuple[int, int], dict[str, int], int]]]:
    """The recording of `tiled_backward`: its source, and per visited tile the line, its place, SRAM and the traffic."""
    torch.manual_seed(0)
    Q, K, V, dO = torch.randn(4, BACKWARD_N, BACKWARD_D)
    L = (Q @ K.T / BACKWARD_D**0.5).logsumexp(1, keepdim=True)
    mem = Memory()
    recording = trace(
        tiled_backward, Q, K, V, Q, L, dO, mem, TILE, TILE,
        keep=lambda v: (v.get("i", 0), v.get("j", -1), dict(v["mem"].live), v["mem"].reads + v["mem"].writes),
    )
    source = recording.source
    body = next(n for n, line in enumerate(source) if line.strip().startswith("N = "))
    found = [
        (step.line - body, (step.state[0] // TILE, step.state[1] // TILE), step.state[2], step.state[3])
        for step in recording.steps if source[step.line].strip().startswith(("dKj +=", "dQi +="))
    ]
    return [line[4:] for line in source[body:]], found


def backward(step: int) -> svg.SVG:
    """The tiles of P: by columns for dK and dV, then by rows for dQ; each gradient written by one program."""
    source, steps = _backward_steps()
    line, (i, j), live, moved = steps[step - 1]
    tiles, cell = BACKWARD_N // TILE, 34
    by_keys = "dQ" not in live
    x0, y0 = 74, 84
    color = GREEN if by_keys else PURPLE
    before = [(place, "dQ" not in held) for _, place, held, _ in steps[:step]]

    def fill(r: int, c: int) -> tuple[str, float]:
        if (r, c) == (i, j):
            return COLORS["P"], 1.0
        if ((r, c), by_keys) in before:
            return color, 0.55
        return GREY, 0.14

    parts = [
        draw.text(0, 18, "first pass: dK, dV, by columns" if by_keys else "second pass: dQ, by rows", bold=True),
        draw.matrix(x0, y0, tiles, tiles, cell, fill), draw.text(x0, y0 - 46, "keys: dK, dV", bold=True),
        draw.text(0, y0 + tiles * cell + 24, "red: P and dS of this tile, computed again"),
        draw.text(0, y0 + tiles * cell + 46, f"{moved:,} elements through HBM so far"),
    ]
    done_columns = {c for (_, c), first in before if first} if by_keys else set(range(tiles))
    for n in range(tiles):
        lit = (by_keys and n == j) or (not by_keys and n == i)
        column = 1.0 if by_keys and lit else 0.55 if n in done_columns else 0.14
        parts.append(draw.box(x0 + n * cell, y0 - 36, cell - 2, 24, GREEN, opacity=column))
        row = 1.0 if not by_keys and lit else 0.55 if not by_keys and n < i else 0.14
        parts.append(draw.box(x0 - 42, y0 + n * cell, 30, cell - 2, PURPLE, opacity=row))
    parts.append(draw.text(0, y0 + 3 * cell + 4, "dQ", bold=True))
    parts.append(draw.source(316, 6, WIDTH - 316, source, {line}, step=14.6))
    return draw.canvas(WIDTH, 14.6 * len(source) + 16, *parts)


def backward_caption(step: int) -> str:
    _, steps = _backward_steps()
    _, (i, j), live, moved = steps[step - 1]
    mine = "dK and dV of its column stay in SRAM" if "dQ" not in live else "dQ of its row stays in SRAM"
    place = f"Visit {step} of {len(steps)}: the tile of queries {i} and keys {j}."
    return f"{place} {mine}. {moved:,} elements have crossed HBM."


EXPLORERS: dict[str, tuple[Callable[..., Any], Callable[..., str], dict[str, Any]]] = {
    "occupancy": (
        occupancy, occupancy_caption, {"batch": (1, 4, 16), "heads": (8, 16, 64), "N": (512, 2048, 8192, 32_768)},
    ),
    "dealing": (dealing, dealing_caption, {"order": tuple(ORDERS), "multiprocessors": (4, 6, 8), "step": range(1, 9)}),
    "loop_orders": (loop_orders, loop_orders_caption, {"d": (64, 128), "chip": ("T4", "A100-80 SXM", "H100 SXM")}),
    "backward": (backward, backward_caption, {"step": range(1, len(_backward_steps()[1]) + 1)}),
}
