"""What the llama chapter draws: the block with its sizes, training, sampling, and the layers' guesses."""

import functools
import math
import re
from collections.abc import Callable

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.hardware import gpu
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RANKS, RED, TEAL

from . import baselines, corpus, shipped
from .config import PUBLISHED
from .counts import Point, kv_bytes, parameters, times, walk
from .train import PROMPTS as BEGINNINGS

WIDTH, PITCH, CHIP = 860, 32, "H100 SXM"

# --- the picture: every point of a pass, with its sizes

STAGES = {"prefill 2,048 tokens": (1, 2048, 0), "decode 1 sequence": (1, 1, 2048), "decode 64 sequences": (64, 1, 2048)}
ROWS = (  # what a row shows, which points it joins, its colour, and what to say of it
    ("embedding", ("embedding",), GREY, "Each id picks its row of the table: bytes move, nothing is multiplied."),
    ("RMSNorm", ("RMSNorm",), TEAL, "A copy of the stream is scaled to root mean square 1; the stream passes by."),
    ("Q · K · V", ("query", "key", "value"), BLUE, "Three projections; K and V are narrow where heads share them."),
    ("RoPE", ("RoPE",), TEAL, "Queries and keys turn by their positions: no weights at all."),
    ("scores", ("scores",), ORANGE, "Every new query meets every key, new and cached."),
    ("softmax · V", ("softmax · V",), ORANGE, "The weights mix the values; only here do tokens see each other."),
    ("output", ("output",), BLUE, "The heads' results are mixed back to the width of the stream."),
    ("⊕ add", ("add",), GREY, "Attention's answer is added to the stream."),
    ("RMSNorm", ("RMSNorm 2",), TEAL, "Again a scaled copy, for the second half."),
    ("gate · up", ("gate", "up"), GREEN, "Two projections to the wide inside of SwiGLU."),
    ("silu(gate) ⊙ up", ("SiLU · up",), GREEN, "One decides how much of the other passes, number by number."),
    ("down", ("down",), GREEN, "Back to the width of the stream."),
    ("⊕ add", ("add 2",), GREY, "Added too; the next layer takes the sum."),
    ("RMSNorm", ("last RMSNorm",), TEAL, "After the last layer the stream itself is scaled."),
    ("LM head", ("LM head",), PURPLE, "A score for every token of the vocabulary."),
)


@functools.cache
def _rows(model: str, stage: str) -> list[tuple[str, int, int]]:
    """Shape, bytes read (weights, KV; bf16) and FLOP of each row, over all layers."""
    c, (B, S, past) = PUBLISHED[model], STAGES[stage]
    points = {p.name: p for p in walk(c, B, S, past)}
    # Of the table only the rows of the ids are read.
    points["embedding"] = points["embedding"]._replace(weights=min(B * S, c.vocab) * c.dim)
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {"query": f"{B:,} × {S:,} × ({wide:,} + 2 · {narrow:,})"}

    def total(row: list[Point], what: str) -> int:
        return sum(times(c, p) * getattr(p, what) for p in row)

    rows = [[points[name] for name in names] for _, names, _, _ in ROWS]
    return [
        (shapes.get(row[0].name, " × ".join(f"{n:,}" for n in row[0].out)),
         2 * (total(row, "weights") + total(row, "cached")), total(row, "flop"))
        for row in rows
    ]


def alive(model: str, stage: str, step: int) -> svg.SVG:
    """The block from bottom to top; beside each point its shape, bytes and FLOP."""
    c, rows = PUBLISHED[model], _rows(model, stage)
    bottom = 62 + PITCH * len(ROWS)
    most = [max(row[1] for row in rows), max(row[2] for row in rows)]
    parts = [draw.text(0, 18, f"{model}, {stage}", bold=True, size=16)]
    for x, words in ((232, "leaves it as"), (486, "weights and KV read"), (686, "FLOP")):
        parts.append(draw.text(x, 46, words, color=GREY, bold=True))
    top, low = bottom - 13 * PITCH + 1, bottom - PITCH - 4
    parts.append([svg.Rect(x=12, y=top, width=192, height=low - top + 3, rx=8, fill="none", stroke=GREY,
                           stroke_dasharray=[5, 4])])
    parts.append(draw.text(12, top - 6, f"× {c.layers}", bold=True, color=GREY))
    for norm, add in ((1, 7), (8, 12)):  # what goes past each half of the block: the stream
        low_y, high_y = bottom - norm * PITCH - 4, bottom - (add + 1) * PITCH + 12
        ink = ORANGE if norm < step <= add + 1 else GREY
        parts.append(draw.line(128, low_y, 36, low_y, color=ink, width=2.5))
        parts.append(draw.line(36, low_y, 36, high_y, color=ink, width=2.5))
        parts.append(draw.line(36, high_y, 57, high_y, color=ink, width=2.5, arrow=True))
    for i, ((name, _, color, _), (shape, moved, flop)) in enumerate(zip(ROWS, rows, strict=True)):
        y, lit = bottom - (i + 1) * PITCH, i == step - 1
        if lit:
            parts.append(draw.box(0, y - 3, WIDTH, PITCH, COLORS["S"], opacity=0.3))
        parts.append(draw.box(58, y, 140, PITCH - 7, color, name, opacity=1 if i < step else 0.18))
        parts.append(draw.text(232, y + 17, shape, mono=True, opacity=1 if lit else 0.75))
        bars = ((486, moved, most[0], "B", COLORS["parameters"]), (686, flop, most[1], "", RED))
        for x, value, full, unit, ink in bars:
            if value:
                parts.append(draw.box(x, y + 4, max(1.5, 100 * value / full), 15, ink, opacity=1 if lit else 0.45))
                parts.append(draw.text(x + 6 + 100 * value / full, y + 16, f"{_short(value)}{unit}", size=12, bold=lit))
    read, flop = sum(row[1] for row in rows), sum(row[2] for row in rows)
    ratio, ridge = flop / read, gpu(CHIP).ridge
    bound = "computes longer than it reads" if ratio > ridge else "reads longer than it computes"
    parts.append(draw.line(0, bottom + 6, WIDTH, bottom + 6, color=GREY, opacity=0.5))
    words = f"{_short(flop)}FLOP over {_short(read)}B: {ratio:,.0f} FLOP/B; an {CHIP} (ridge {ridge:.0f}) {bound}."
    parts.append(draw.text(0, bottom + 30, words, bold=True))
    return draw.canvas(WIDTH, bottom + 42, *parts)


def _short(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "


def alive_caption(model: str, stage: str, step: int) -> str:
    c, (B, S, past) = PUBLISHED[model], STAGES[stage]
    name, _, _, words = ROWS[step - 1]
    held = kv_bytes(c, B * (S + past)) / 1e9
    return (f"{model} ({parameters(c) / 1e9:.2f} billion parameters), {stage}, {name}, point {step} of {len(ROWS)}: "
            f"{words} The KV cache then holds {held:.2f} GB.")


# --- training: babble becomes words


@functools.cache
def references() -> dict[str, float]:
    """Bits per held-out byte of what needs no network."""
    data = corpus.split(corpus.read())
    grams = {f"{name} counts": baselines.ngram_bits(data.train, data.held_out, order)
             for name, order in (("unigram", 0), ("bigram", 1), ("4-byte context", 4))}
    return {"uniform": 8.0, **grams}


def babble(step: int) -> svg.SVG:
    """The loss so far, and what the model wrote at that moment."""
    log = shipped.log()
    at, last, (left, top, wide, tall) = log.at.index(step), log.at[-1], (40, 40, 300, 330)

    def place(i: float, bits: float) -> tuple[float, float]:
        return left + wide * (i / last) ** 0.5, top + tall * (8.4 - bits) / 7

    parts = [draw.text(0, 16, f"After {step} steps: {log.held_out[at]:.2f} bits per byte", bold=True, size=16)]
    for tick in range(2, 9):
        y = place(0, tick)[1]
        parts.append(draw.line(left, y, left + wide, y, color=GREY, width=1, opacity=0.25))
        parts.append(draw.text(left - 8, y + 4, str(tick), anchor="end", color=GREY))
    for name, bits in references().items():
        y = place(0, bits)[1]
        parts.append(draw.line(left, y, left + wide, y, color=ORANGE, dashed=True))
        side = ("start", left + 6) if bits < 3 else ("end", left + wide)  # where the curves are not
        parts.append(draw.text(side[1], y - 5, name, anchor=side[0], size=12, color=ORANGE))
    for values, color, width in ((list(enumerate(log.train)), BLUE, 1.2),
                                 (list(zip(log.at, log.held_out, strict=True)), PURPLE, 3.0)):
        path = "M" + "L".join("{:.0f} {:.1f}".format(*place(*v)) for v in values if v[0] <= step)
        parts.append([svg.Path(fill="none", stroke=color, stroke_width=width, extra={"d": path})])
    x, y = place(step, log.held_out[at])
    parts.append([svg.Circle(cx=round(x), cy=round(y), r=7, fill=PURPLE)])
    for i, (name, color) in enumerate((("training text", BLUE), ("held-out chapters", PURPLE))):
        parts.append(draw.text(left + 150 * i, top + tall + 24, f"━ {name}", color=color, bold=True))
    share = shipped.real_words(log.seen[at])
    parts.append(draw.text(380, 46, f"{share:.0%} of its words are words of the book", bold=True))
    parts.append(draw.box(380, 56, 470, 10, GREY, opacity=0.2))
    parts.append(draw.box(380, 56, 470 * share, 10, GREEN))
    for i, (text, prompt) in enumerate(zip(log.seen[at], BEGINNINGS, strict=True)):
        parts.append(_sample(380, 104 + 100 * i, text, prompt))
    return draw.canvas(WIDTH, 408, *parts)


def _sample(x: float, y: float, text: str, prompt: str, columns: int = 55) -> draw.Elements:
    """A text in lines: the prompt bold, the book's words green, other words red, the rest grey."""
    colors = [GREY] * len(text)
    for found in re.finditer(shipped.WORD, text):
        if found.start() >= len(prompt):
            known = found.group().lower() in shipped.vocabulary()
            colors[found.start() : found.end()] = [GREEN if known else RED] * len(found.group())
    parts = draw.text(x, y, prompt, size=14, bold=True, mono=True)
    shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
    at = len(prompt)
    while at < min(len(text), 3 * columns):
        color, row, column = colors[at], at // columns, at % columns
        end = at + 1
        while end < len(text) and colors[end] == color and end % columns:
            end += 1
        run = shown[at:end]
        skip = len(run) - len(run.lstrip())  # by position: browsers drop leading spaces
        if run.strip():
            parts += draw.text(x + 8.43 * (column + skip), y + 24 * row, run.strip(), size=14, color=color, mono=True)
        at = end
    return parts


def babble_caption(step: int) -> str:
    log = shipped.log()
    at = log.at.index(step)
    seen = step * 8 * 256 / len(corpus.split(corpus.read()).train)
    return (f"After {step} steps ({seen:.1f} passes over the text) a held-out byte costs {log.held_out[at]:.2f} bits, "
            f"and {shipped.real_words(log.seen[at]):.0%} of the words it writes are words of the book.")


# --- the sampling lab

PROMPTS = {
    "mid-word": "The memory of a G", "after a word": "The cache holds keys and ", "a heading": "## What does it ",
}


def lab(text: str, temperature: float, top_p: float) -> svg.SVG:
    """Three bars of width 1: the model's p, after the temperature, after top-p; and three texts drawn so."""
    found = shipped.choice(PROMPTS[text], temperature, top_p)
    stages = (
        (f"the model's p of the next byte after “{PROMPTS[text]}▮”", found.p),
        (f"temperature {temperature}", found.heated),
        (f"the nucleus of {top_p}, stretched to 1: a draw is a dart on this bar", found.drawn_from),
    )
    order = found.p.argsort(descending=True).tolist()
    edges = [[0.0, *(p[order].cumsum(0) * WIDTH).tolist()] for _, p in stages]
    parts = []
    for row, (words, _) in enumerate(stages):
        y = 24 + 84 * row
        parts.append(draw.text(0, y - 8, words, bold=True))
        for i, byte in enumerate(order):
            left, right = edges[row][i : i + 2]
            if right - left < 4:
                continue  # the tail stays as the bar's grey ground
            color = RANKS[i % 7]
            parts.append(draw.box(left, y, right - left - 1, 32, color, _glyph(byte) if right - left > 15 else ""))
            if row < 2 and edges[row + 1][i + 1] - edges[row + 1][i] > 2:
                x1, x2 = edges[row + 1][i : i + 2]
                corners = f"{left:.0f},{y + 32} {right - 1:.0f},{y + 32} {x2 - 1:.0f},{y + 84} {x1:.0f},{y + 84}"
                parts.append([svg.Polygon(fill=color, fill_opacity=0.16, extra={"points": corners})])
        parts.insert(0, draw.box(0, y, WIDTH, 32, GREY, opacity=0.35))
    for i, continuation in enumerate(found.texts):
        shown = "".join(c if c.isprintable() else "⏎" for c in continuation)
        parts.append(draw.text(0, 262 + 26 * i, PROMPTS[text], mono=True, color=GREY, size=14))
        parts.append(draw.text(8.43 * len(PROMPTS[text]), 262 + 26 * i, shown, mono=True, bold=True, size=14))
    return draw.canvas(WIDTH, 326, *parts)


def _glyph(byte: int) -> str:
    return {32: "␣", 10: "⏎", 0: "∅"}.get(byte, chr(byte) if 32 < byte < 127 else f"{byte:02x}")


def lab_caption(text: str, temperature: float, top_p: float) -> str:
    found = shipped.choice(PROMPTS[text], temperature, top_p)
    bits = float(torch.special.entr(found.drawn_from).sum()) / math.log(2)
    left = int((found.drawn_from > 0).sum())
    how = "greedy: the likeliest" if temperature == 0 else f"temperature {temperature}, top-p {top_p}: {left}"
    return f"After “{PROMPTS[text]}”, {how} of 256 bytes can be drawn, {bits:.2f} bits of surprise."


# --- what each layer adds

EXCERPTS = ("The gradient of the loss", "attention reads the cache", "every block of queries", "a matrix of numbers is")


def layers(text: str) -> svg.SVG:
    """A row per layer, a column per byte: the likeliest next byte, and how sure of the right one."""
    p = shipped.read_by_layers(text)
    true = corpus.encode(text).tolist()[1:]
    guess = p[:, :-1].argmax(-1)
    right = p[:, range(len(true)), true]
    cell, left, parts = 30, 92, [draw.text(0, 18, "read so far", color=GREY)]
    for j, byte in enumerate(corpus.encode(text).tolist()[:-1]):
        parts.append(draw.text(left + cell * j + 14, 18, _glyph(byte), anchor="middle", mono=True, bold=True))
    for i in range(len(p)):
        y = 30 + cell * (len(p) - 1 - i)
        parts.append(draw.text(0, y + 19, "embedding" if i == 0 else f"layer {i}", color=GREY))
        glyphs = [[_glyph(int(byte)) for byte in guess[i]]]
        parts.append(draw.matrix(left, y, 1, len(true), cell, _shades(right[i].tolist()), values=glyphs))
    y = 30 + cell * len(p) + 18
    parts.append(draw.text(0, y, "next byte", color=GREY))
    for j, byte in enumerate(true):
        x = left + cell * j + 14
        parts.append(draw.text(x, y, _glyph(byte), anchor="middle", mono=True, bold=True, color=GREEN))
    return draw.canvas(left + cell * len(true), y + 12, *parts)


def _shades(row: list[float]) -> Callable[[int, int], tuple[str, float]]:
    return lambda _, column: (GREEN, 0.06 + 0.94 * round(row[column] * 10) / 10)


def layers_caption(text: str) -> str:
    p = shipped.read_by_layers(text)
    true = corpus.encode(text).tolist()[1:]
    right = p[:, range(len(true)), true]
    hits = (p[:, :-1].argmax(-1) == p.new_tensor(true)).sum(-1).tolist()
    return (f"“{text}”: without any layer {hits[0]} of {len(true)} bytes are guessed right, after layer 4 {hits[4]}, "
            f"after all {len(p) - 1} {hits[-1]}; the right byte's mean probability rises from {right[0].mean():.2f} to "
            f"{right[-1].mean():.2f}.")
