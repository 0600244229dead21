"""What the flash_attention chapter draws: recordings of its own algorithms, and its own traffic formulas."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.hardware import GPUS, SHARED_PER_BLOCK, gpu
from llmbook.kit.style import BLUE, COLORS, GREY, ORANGE, RED, plot
from llmbook.kit.trace import trace

from . import eleven_steps
from .forward import (
    block_sizes,
    flash_attention,
    flash_traffic,
    paper_block_sizes,
    sram_peak,
    standard_attention,
    standard_traffic,
)
from .memory import Memory

WIDTH, CODE = 800, 396
# Lines after which the stepper stops; the lines between two stops are shown together.
FLASH_STOPS = (
    "m = mem.new", "Vj =", "Qi =", "S =", 'mem.free("Q")', "lt =", "ln =", "Oi = (", "mem.store(m", "mem.free_all",
    'mem.free("K"',
)
STANDARD_STOPS = ("Kall =", "Vall =", "mem.store", "mem.free", "Qi =", "Si = mem.load", "Pi = mem.load")


class Frame(NamedTuple):
    """What one picture shows: the lines just run, loop positions, SRAM, traffic, and the running m and l."""

    lines: tuple[int, ...]
    i: int
    j: int
    live: dict[str, int]
    moved: int
    m: list[float]
    l: list[float]
    seen: frozenset[tuple[int, int]]
    written: dict[str, int]


def sram_choices(N: int, d: int) -> list[int]:
    """Two sizes of SRAM for the stepper: one in which half of K fits at a time, and one in which all of it does."""
    return [sram_peak(Bc, min(Bc, d), d) for Bc in (N // 2, N)]


@functools.cache
def flash_frames(N: int, d: int, M: int) -> tuple[list[str], list[Frame]]:
    """The recording of `flash_attention` on random Q, K, V: its source and one frame per stop."""
    torch.manual_seed(N + d)
    Q, K, V = torch.randn(3, N, d)
    Bc, Br = block_sizes(M, d)
    return _record(flash_attention, FLASH_STOPS, Q, K, V, Memory(M), Bc, Br)


@functools.cache
def standard_frames() -> tuple[list[str], list[Frame]]:
    """The recording of `standard_attention` with N = 6, d = 2, two rows at a time."""
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 6, 2)
    return _record(standard_attention, STANDARD_STOPS, Q, K, V, Memory(), 2)


def _record(function: Callable[..., Any], stops: Sequence[str], *args: Any) -> tuple[list[str], list[Frame]]:
    seen: set[tuple[int, int]] = set()
    written = {"O": 0, "S": 0, "P": 0}

    def keep(v: dict[str, Any]) -> tuple:
        mem, i, j = v["mem"], v.get("i", -1), v.get("j", -1)
        m, l = (v[name].flatten().tolist() if name in v else [] for name in ("m", "l"))
        return i, j, dict(mem.live), mem.reads + mem.writes, m, l

    recording = trace(function, *args, keep=keep)
    body = next(n for n, words in enumerate(recording.source) if words.strip().startswith("N, d ="))
    frames, lines = [], []
    for step in recording.steps:
        words = recording.source[step.line].strip()
        lines.append(step.line - body)
        i, j, live, moved, m, l = step.state
        if "S" in live or "P" in live:
            seen.add((i, j))
        for name in written:
            if words.startswith(f"mem.store({name},"):
                written[name] += 1
        if words.startswith(tuple(stops)):
            frames.append(Frame(tuple(lines), i, j, live, moved, m, l, frozenset(seen), dict(written)))
            lines = []
    return [line[4:] for line in recording.source[body:]], frames


def stepper(N: int, d: int, M: int, step: int) -> svg.SVG:
    """One stop of FlashAttention: the matrices, the line of code, the SRAM bar and the HBM counter."""
    source, frames = flash_frames(N, d, M)
    Bc, Br = block_sizes(M, d)
    total, naive = flash_traffic(N, d, Bc), standard_traffic(N, d)
    return _picture(source, frames[step - 1], N, d, Bc, Br, M, max(total, naive), naive)


def stepper_caption(N: int, d: int, M: int, step: int) -> str:
    source, frames = flash_frames(N, d, M)
    frame = frames[step - 1]
    Bc, Br = block_sizes(M, d)
    held = ", ".join(f"{name} {size}" for name, size in frame.live.items()) or "nothing"
    where = f"Keys from row {frame.j}, queries from row {max(frame.i, 0)}. " if frame.j >= 0 else "In HBM. "
    return (
        f"B_c = {Bc}, B_r = {Br}. {where}Just ran: {source[frame.lines[-1]].strip()} "
        f"SRAM holds {held}: {sum(frame.live.values())} of {M} elements. {frame.moved} elements have crossed HBM."
    )


def standard_stepper(step: int) -> svg.SVG:
    """One stop of standard attention, drawn like FlashAttention's."""
    source, frames = standard_frames()
    naive = standard_traffic(6, 2)
    return _picture(source, frames[step - 1], 6, 2, 6, 2, None, naive, None)


def standard_caption(step: int) -> str:
    source, frames = standard_frames()
    frame = frames[step - 1]
    held = ", ".join(f"{name} {size}" for name, size in frame.live.items()) or "nothing"
    return (
        f"N = 6, d = 2, two rows at a time. Just ran: {source[frame.lines[-1]].strip()} SRAM holds {held}. "
        f"{frame.moved} of {standard_traffic(6, 2)} elements have crossed HBM."
    )


def _picture(
    source: list[str], frame: Frame, N: int, d: int, Bc: int, Br: int, M: int | None, most: int, naive: int | None
) -> svg.SVG:
    step = 15.5
    height = max(340, len(source) * step + 30)
    parts = [
        draw.text(0, 16, "HBM", bold=True),
        _matrices(frame, N, d, Bc, Br, flash=M is not None),
        draw.source(CODE, 8, WIDTH - CODE, source, frame.lines, step=step),
    ]
    vectors = sum(size for name, size in frame.live.items() if name not in COLORS or name in "ml")
    bars = [draw.Bar(name, frame.live[name], name) for name in "KVQOSP" if name in frame.live]
    bars.append(draw.Bar("vectors", vectors, "m"))
    y = height + 24
    capacity = M if M is not None else max(2 * N * N, 4 * N * d)
    parts.append(draw.text(0, y - 6, "SRAM" if M is not None else "SRAM, as much as one kernel needs", bold=True))
    parts.append(draw.ledger(0, y, WIDTH, 30, bars, capacity, unit="elements"))
    y += 62
    parts.append(draw.text(0, y - 6, "Elements that crossed HBM", bold=True))
    parts.append(draw.ledger(0, y, WIDTH, 22, [draw.Bar("", frame.moved, "hbm")], most))
    if naive is not None:
        x = WIDTH * naive / most - 1
        parts.append(draw.line(x, y - 3, x, y + 26, color=RED, width=3))
        parts.append(draw.text(x, y + 41, f"standard attention: {naive}", anchor="end", color=RED))
    return draw.canvas(WIDTH, y + 46, *parts)


def _matrices(frame: Frame, N: int, d: int, Bc: int, Br: int, *, flash: bool) -> draw.Elements:
    """K and V above, Q left, S in the middle, O right, and beside it the running m and l."""
    cell = min(26, 252 // (2 * d + N))
    top, left = 42, 4
    x_s, y_s = left + d * cell + 16, top + 2 * (d * cell + 22)
    x_o = x_s + N * cell + 16
    rows = range(frame.i, frame.i + Br) if frame.i >= 0 else range(0)
    keys = (range(frame.j, frame.j + Bc) if frame.j >= 0 else range(0)) if flash else range(N)

    def tile(name: str, picked: range, axis: int) -> Callable[[int, int], tuple[str, float]]:
        held = name in frame.live
        return lambda r, c: (COLORS[name], 1.0 if held and (r, c)[axis] in picked else 0.22)

    def score(r: int, c: int) -> tuple[str, float]:
        name = "S" if "S" in frame.live else "P" if "P" in frame.live else None
        if name and r in rows and c in keys:
            return COLORS[name], 1.0
        if not flash:
            stored = max(frame.written["S"], frame.written["P"]) * Br
            now = COLORS["P"] if r < frame.written["P"] * Br else COLORS["S"]
            return (now, 0.5) if r < stored else (GREY, 0.1)
        visited = any(r in range(i, i + Br) and c in range(j, j + Bc) for i, j in frame.seen)
        return (GREY, 0.38) if visited else (GREY, 0.1)

    def output(r: int, c: int) -> tuple[str, float]:
        if "O" in frame.live and r in rows:
            return COLORS["O"], 1.0
        rounds = -(-N // Bc) if flash else 1
        done = sum(1 for n in range(frame.written["O"]) if r // Br == n % -(-N // Br))
        return COLORS["O"], 0.15 + 0.45 * done / rounds

    parts = draw.matrix(x_s, top, d, N, cell, tile("K", keys, 1))
    parts += draw.text(x_s - 8, top + d * cell / 2 + 4, "Kᵀ", anchor="end", bold=True)
    parts += draw.matrix(x_s, top + d * cell + 16, d, N, cell, tile("V", keys, 1))
    parts += draw.text(x_s - 8, top + d * cell * 1.5 + 20, "Vᵀ", anchor="end", bold=True)
    parts += draw.matrix(left, y_s, N, d, cell, tile("Q", rows, 0), label="Q")
    parts += draw.matrix(x_s, y_s, N, N, cell, score, label="S, P")
    words = "grey: computed, never stored" if flash else "stored whole, then read back"
    parts += draw.text(left, y_s + N * cell + 18, words, opacity=0.8)
    parts += draw.matrix(x_o, y_s, N, d, cell, output, label="O")
    for n, (name, values) in enumerate((("m", frame.m), ("l", frame.l)) if flash else ()):
        x = x_o + d * cell + 26 + n * 40
        parts += draw.text(x, y_s - 7, name, bold=True, anchor="middle")
        for r, value in enumerate(values):
            lit = {"bold": True} if r in rows and len(frame.live) > 2 else {"opacity": 0.75}
            shown = "−∞" if value == float("-inf") else f"{value:.1f}".replace("-", "−")
            parts += draw.text(x, y_s + r * cell + cell * 0.7, shown, anchor="middle", size=12, **lit)
    return parts


def eleven(Bc_over_d: str, step: int) -> svg.SVG:
    """The notes' running total beside the ledger's, step by step."""
    Bc, d = _sizes(Bc_over_d)
    rows = eleven_steps.compare(Bc, d)
    most = max(max(claimed, held) for _, _, claimed, held in rows)
    parts = [
        draw.text(40, 18, "step", bold=True), draw.text(220, 18, "notes", bold=True),
        draw.text(320, 18, "running totals: notes, ledger", bold=True),
    ]
    for n, (does, change, claimed, held) in enumerate(rows):
        y = 30 + n * 36
        wrong = claimed != held
        if n == step - 1:
            parts.append(draw.box(0, y - 1, WIDTH, 35, COLORS["S"], opacity=0.3))
        faded = 1.0 if n <= step - 1 else 0.35
        parts.append(draw.text(28, y + 21, str(n + 1), anchor="end", bold=True, opacity=faded))
        parts.append(draw.text(40, y + 21, does, opacity=faded))
        parts.append(draw.text(220, y + 21, change, opacity=faded))
        if n <= step - 1:
            width = 340 / most
            parts.append(draw.box(320, y + 2, claimed * width, 14, GREY))
            parts.append(draw.box(320, y + 18, held * width, 14, RED if wrong else COLORS["sram"]))
            parts.append(draw.text(WIDTH, y + 14, f"{claimed:,}", anchor="end", size=12))
            parts.append(draw.text(WIDTH, y + 30, f"{held:,}", anchor="end", size=12, bold=wrong))
    return draw.canvas(WIDTH, 30 + 36 * len(rows) + 4, *parts)


def eleven_caption(Bc_over_d: str, step: int) -> str:
    Bc, d = _sizes(Bc_over_d)
    does, change, claimed, held = eleven_steps.compare(Bc, d)[step - 1]
    verdict = "They agree." if claimed == held else f"They differ by {held - claimed:+,}."
    return (
        f"B_c = {Bc}, B_r = d = {d}. Step {step}, {does}: the notes say {change} and so hold {claimed:,} elements; "
        f"the ledger holds {held:,}. {verdict}"
    )


def _sizes(ratio: str) -> tuple[int, int]:
    return {"B_c = d": (64, 64), "B_c = 2d": (128, 64), "B_c = d/2": (32, 64)}[ratio]


def traffic(d: int, chip: str) -> Any:
    """HBM bytes of one head against N, standard and FlashAttention, fp16."""
    M = SHARED_PER_BLOCK[gpu(chip).sm] // 2
    Bc, _ = block_sizes(M, d)
    lengths = [2**k for k in range(7, 18)]
    with plot(7.4, 3.8) as (figure, axes):
        plain = [2 * standard_traffic(n, d) / 1e6 for n in lengths]
        tiled = [2 * flash_traffic(n, d, Bc) / 1e6 for n in lengths]
        axes.loglog(lengths, plain, "o-", color=ORANGE, label="standard")
        axes.loglog(lengths, tiled, "s-", color=BLUE, label="FlashAttention")
        n = lengths[-1]
        ratio = standard_traffic(n, d) / flash_traffic(n, d, Bc)
        axes.annotate(
            f"{ratio:.1f}× fewer", (n, 2 * flash_traffic(n, d, Bc) / 1e6), xytext=(0, -62), ha="right",
            textcoords="offset points", fontweight="bold",
        )
        axes.set(xlabel="sequence length N", ylabel="MB through HBM, one head", ylim=(0.03, 3e5))
        axes.set_xscale("log", base=2)
        axes.legend(loc="upper left")
    return figure


def traffic_caption(d: int, chip: str) -> str:
    M = SHARED_PER_BLOCK[gpu(chip).sm] // 2
    Bc, Br = block_sizes(M, d)
    n = 2**17
    ratio = standard_traffic(n, d) / flash_traffic(n, d, Bc)
    return (
        f"{chip}: {M:,} fp16 elements of shared memory give B_c = {Bc}, B_r = {Br} for d = {d}. "
        f"Both curves end with slope 2: FlashAttention moves {ratio:.1f} times less, not a lower power of N."
    )


def slack(d: int) -> list[tuple[str, int, int, int]]:
    """Per GPU: name, M in fp16 elements, the paper's B_c, the B_c that fits."""
    return [
        (g.name, M, paper_block_sizes(M, d)[0], block_sizes(M, d)[0])
        for g in GPUS
        if (M := SHARED_PER_BLOCK[g.sm] // 2)
    ]


