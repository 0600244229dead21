"""What the first chapter draws: a sentence walking through a model, a block at real sizes, FLOPs, and held memory."""

from collections.abc import Callable, Sequence
from math import log

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.hardware import gpu
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW

from .llama import PUBLISHED
from .walks import (
    SENTENCES,
    STAGES,
    WORDS,
    Size,
    Stop,
    flop_per_token,
    largest,
    matmul_parameters,
    real_block,
    sentence,
    step_memory,
)

WIDTH = 780
ROWS = [word for words in SENTENCES for word in words.split()]
ROLE = {
    "ids": GREY, "embed": TEAL, "norm": TEAL, "scores": COLORS["S"], "softmax": COLORS["P"], "O": COLORS["O"],
    "+": TEAL, "FFN": "#b5651d", "+ ": TEAL, "head": COLORS["S"], "loss": COLORS["P"],
}
STEPS = range(len(sentence(2)))


def color_of(stop: Stop) -> str:
    if stop.stage == "Q K V":
        return str(COLORS[stop.title[0]])
    return TEAL if stop.title.startswith("x,") else ROLE[stop.stage]


def human(amount: float, unit: str = "B") -> str:
    """An amount with a decimal prefix: 1.5 GB."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if amount >= 10**power:
            return f"{amount / 10**power:.3g} {prefix}{unit}"
    return f"{amount:g} {unit}"


def walk(heads: int, step: int) -> svg.SVG:
    """The model as a map, the tensor as it is now, what is known about it, and the memory held so far."""
    stop, every = sentence(heads)[step], sentence(heads)
    return draw.canvas(
        WIDTH, 566, _map(stop), draw.text(4, 132, stop.title, bold=True, size=19),
        draw.text(4, 154, stop.formula, size=14), _tensor(stop, 4, 176), _facts(stop, 540, 132), _held(every, step),
    )


def _map(stop: Stop) -> draw.Elements:
    """The whole model in one row; arcs are what is carried past attention and past the feed-forward layer."""
    wide, gap = 55.0, 10.0
    parts: draw.Elements = []
    now, left = STAGES.index(stop.stage), {name: 2 + i * (wide + gap) for i, name in enumerate(STAGES)}
    for start, end, first, words in (("embed", "+", "norm", "attention"), ("+", "+ ", "FFN", "feed-forward")):
        x1, x2 = left[start] + wide - 8, left[end] + wide / 2
        parts.append(svg.Path(
            fill="none", stroke=TEAL, stroke_width=3, stroke_opacity=1 if now >= STAGES.index(end) else 0.35,
            extra={"d": f"M{x1:.0f} 40V24Q{x1:.0f} 14 {x1 + 10:.0f} 14H{x2 - 10:.0f}Q{x2:.0f} 14 {x2:.0f} 24V38"},
        ))
        parts += draw.line(left[first] - 2, 88, left[end] + wide + 2, 88, opacity=0.5)
        parts += draw.text((left[first] + left[end] + wide) / 2, 104, words, anchor="middle", opacity=0.8)
    for i, name in enumerate(STAGES):
        x, fill = left[name], BLUE if name == "Q K V" else ROLE[name]
        parts += draw.box(x, 42, wide, 38, fill, name.strip(), opacity=1 if i <= now else 0.18, size=12,
                          stroke="currentColor" if i == now else None)
        if i:
            parts += draw.line(x - gap + 1, 61, x - 1, 61, width=1.5, opacity=1 if i <= now else 0.3)
    return parts


def _tensor(stop: Stop, x: float, y: float) -> draw.Elements:
    """Every element as a tile, stronger for larger; leading axes as panels."""
    value, color = stop.value, color_of(stop)
    if not value.dim():
        guess = f"a blind guess among {len(WORDS)} words costs ln {len(WORDS)} = {log(len(WORDS)):.3f}"
        return draw.box(x, y + 30, 200, 76, color, f"{value:.3f}", size=32) + draw.text(x, y + 134, guess, size=14)
    if stop.title == "O, a mean of values":
        value = value.view(2, -1, *value.shape[1:])
    if stop.title == "O, heads side by side":
        value = value.flatten(2)
    if value.dtype == torch.int64 or value.shape[-1] == 1:  # few enough to be read
        return _numbers(value, x, y, color)
    strength = value.exp() if stop.title == "log-probabilities" else value.abs().nan_to_num(posinf=0)
    strength = (strength / strength.max().clamp(min=1e-9)).sqrt()
    panels = strength.reshape(-1, *strength.shape[-2:])
    across = value.shape[1] if value.dim() == 4 else 1
    cell = min(18, 420 / (panels.shape[2] * across + across), 212 / (panels.shape[1] * len(panels) / across + 1))
    parts: draw.Elements = []
    for n, panel in enumerate(panels.tolist()):
        row, column = divmod(n, across)
        at = x + 58 + column * (panels.shape[2] + 1) * cell, y + 6 + row * (panels.shape[1] + 1) * cell
        parts += draw.matrix(*at, panels.shape[1], panels.shape[2], cell, _shade(panel, color))
        if not column:
            for r in range(panels.shape[1]):
                word = ROWS[(row * panels.shape[1] + r) % 12]
                parts += draw.text(x + 52, at[1] + r * cell + cell * 0.75, word, anchor="end", size=12)
    return parts


def _numbers(value: torch.Tensor, x: float, y: float, color: str) -> draw.Elements:
    """The ids under their words, or what each next word got."""
    parts, scores = draw.Elements(), value.is_floating_point()
    for n, number in enumerate(value.flatten().tolist()):
        target = ROWS[n + 1] if n % 6 < 5 else "<pad>"
        ignored = scores and target == "<pad>"
        label = ROWS[n] if not scores else "ignored" if ignored else f"→ {target}"
        at = x + n % 6 * 84, y + 20 + n // 6 * 92
        parts += draw.text(at[0] + 39, at[1] - 6, label, anchor="middle")
        words = f"{number:.2f}" if scores else str(number)
        parts += draw.box(*at, 78, 44, color, words, size=18, opacity=0.2 if ignored else 1)
    return parts


def _shade(panel: Sequence[Sequence[float]], color: str) -> Callable[[int, int], tuple[str, float]]:
    levels = (0.1, 0.28, 0.46, 0.64, 0.82, 1.0)
    return lambda r, c: (GREY, 0.12) if panel[r][c] == 0 else (color, levels[min(int(panel[r][c] * 6), 5)])


def _facts(stop: Stop, x: float, y: float) -> draw.Elements:
    op = stop.op
    fresh = op and not op.view
    inside = op.module.removeprefix("model.layers.0.").removeprefix("model.") if op else "–"
    rows = [
        ("operation", op.name if op else "none: the input"),
        ("in block 0" if op and op.module.startswith("model.layers.0.") else "inside", inside),
        ("reads", " ".join(str(list(spec.shape)) for spec in op.inputs) if op else "–"),
        ("shape", str(list(stop.spec.shape))),
        ("dtype", str(stop.spec.dtype).removeprefix("torch.")),
        ("bytes", f"{stop.spec.bytes:,}" + ("" if fresh or not op else ", a view: 0 new")),
        ("FLOP", f"{stop.flop:,}"),
        ("held now", f"{op.held if op else 0:,} bytes"),
    ]
    parts = draw.box(x - 14, y - 22, 254, 252, GREY, opacity=0.13)
    for i, (name, words) in enumerate(rows):
        at, strong = y + 2 + i * 30.5, name in ("shape", "bytes")
        parts += draw.text(x - 4, at, name, size=12, opacity=0.8)
        parts += draw.text(x + 62, at, words, size=13 if strong else 12, mono=True, bold=strong)
    return parts


def _held(every: Sequence[Stop], step: int) -> draw.Elements:
    """Bytes held at each stop as columns, those of the tensor itself at their top."""
    base, tall = 556.0, 112.0
    most = max(stop.op.held for stop in every if stop.op)
    wide = (WIDTH - 8) / len(every)
    looks: dict[tuple[str, float], str] = {}
    for i, stop in enumerate(every):
        held = stop.op.held if stop.op else 0
        own = 0 if not stop.op or stop.op.view else min(stop.spec.bytes, held)
        lit, top = 1.0 if i == step else 0.55 if i < step else 0.16, base - held / most * tall
        for look, y, h in (((GREY, 0.6 * lit), top, held), ((color_of(stop), lit), top, own)):
            path = f"M{4 + i * wide:.1f} {y:.1f}h{wide - 3:.1f}v{h / most * tall:.1f}h{3 - wide:.1f}z"
            looks[look] = looks.get(look, "") + path
    parts = draw.text(4, 424, "memory held after each step, the new tensor on top", bold=True)
    parts += [svg.Path(fill=color, fill_opacity=round(lit, 2), extra={"d": d}) for (color, lit), d in looks.items()]
    now = every[step].op
    anchor = "start" if step < 3 else "end" if step > len(every) - 4 else "middle"
    at = 4 + (step + {"start": 0, "middle": 0.5, "end": 1}[anchor]) * wide
    held = now.held if now else 0
    parts += draw.text(at, base - held / most * tall - 5, f"{held:,}", anchor=anchor, bold=True)
    return parts + draw.line(4, base, WIDTH - 4, base, opacity=0.5)


def walk_caption(heads: int, step: int) -> str:
    stop, every = sentence(heads)[step], sentence(heads)
    spent = sum(one.flop for one in every[: step + 1])
    last = f" Its value is {stop.value.item():.3f}." if not stop.spec.shape else ""
    return (
        f"{heads} head{'s' * (heads > 1)}, step {step} of {len(every) - 1}. {stop.title[0].upper()}{stop.title[1:]}: "
        f"{list(stop.spec.shape)}, {stop.spec.bytes:,} bytes; {spent:,} of {sum(s.flop for s in every):,} FLOP "
        f"are spent.{last}"
    )


SIZE_COLORS = (TEAL, BLUE, YELLOW, RED, PURPLE, "#b5651d", YELLOW, RED, RED)


def sizes(B: int, S: int, D: int, heads: int, V: int, step: int) -> svg.SVG:
    """Nine tensors of one block and the head as bars, and what is held by now against one GPU's memory."""
    found = real_block(B, S, D, heads, V)
    most = largest(found).spec.bytes
    parts = draw.text(4, 16, "tensor", opacity=0.75) + draw.text(160, 16, "shape", opacity=0.75)
    parts += draw.text(606, 16, "bytes", anchor="end", opacity=0.75)
    parts += draw.text(WIDTH - 4, 16, "FLOP since last row", anchor="end", opacity=0.75)
    for i, (one, color) in enumerate(zip(found, SIZE_COLORS, strict=True)):
        y, now = 26 + i * 33, i + 1 == step
        row = draw.box(0, y, WIDTH, 30, GREY, opacity=0.22) if now else []
        row += draw.box(340, y + 5, 200 * one.spec.bytes / most + 1, 20, color)
        row += draw.text(4, y + 20, one.title, bold=now) + draw.text(160, y + 20, str(list(one.spec.shape)))
        row += draw.text(606, y + 20, human(one.spec.bytes), anchor="end", bold=now)
        row += draw.text(WIDTH - 4, y + 20, human(one.flop, "FLOP") if one.flop else "–", anchor="end")
        parts.append(svg.G(elements=row, opacity=None if i < step else 0.4))
    return draw.canvas(WIDTH, 400, parts, _against_a_gpu(found[step - 1], 350))


def _against_a_gpu(now: Size, y: float) -> draw.Elements:
    device = gpu("H100 SXM")
    wide = now.held * (WIDTH - 8) / 2 / (device.memory * 1e9)  # half the width is one GPU
    parts = draw.text(4, y - 2, f"held so far, backward pass in mind: {human(now.held)}", bold=True)
    parts += draw.box(4, y + 8, min(wide, WIDTH - 8), 26, COLORS["activations"])
    half = 4 + (WIDTH - 8) / 2
    parts += draw.line(half, y + 2, half, y + 40, color=RED, width=2.5)
    return parts + draw.text(half + 6, y - 2, f"an {device.name}'s {device.memory:g} GB", color=RED, bold=True)


def sizes_caption(B: int, S: int, D: int, heads: int, V: int, step: int) -> str:
    found = real_block(B, S, D, heads, V)
    now, top = found[step - 1], largest(found)
    return (
        f"B = {B}, S = {S:,}, D = {D:,}, {heads} heads, V = {V:,}. Step {step}, {now.title}: {list(now.spec.shape)} in "
        f"{str(now.spec.dtype).removeprefix('torch.')}, {human(now.spec.bytes)}. The largest of all is "
        f"{top.title} with {human(top.spec.bytes)}."
    )


PARTS = {"feed-forward": "#b5651d", "Q, K, V, O": BLUE, "scores, values": YELLOW, "LM head": RED}


def where_flop(S: int) -> svg.SVG:
    """FLOPs per token of four published models in units of 2 × parameters, by part."""
    left, scale, tall = 130.0, 150.0, 62.0
    line, bottom = left + scale, 50 + 4 * tall
    parts = draw.line(line, 40, line, bottom, dashed=True, width=2)
    parts += draw.text(line, bottom + 14, "2 FLOP per parameter", anchor="middle")
    for i, (name, color) in enumerate(PARTS.items()):
        parts += draw.box(4 + i * 180, 4, 20, 20, color) + draw.text(30 + i * 180, 19, name)
    for n, name in enumerate(PUBLISHED):
        y, unit = 50 + n * tall, 2 * matmul_parameters(name)
        flop, at = flop_per_token(name, S), left
        total = sum(flop.values())
        parts += draw.text(4, y + 26, name, bold=True)
        for part, color in PARTS.items():
            wide = flop[part] / unit * scale
            share = f"{flop[part] / total:.0%}"
            parts += draw.box(at, y + 4, wide, 34, color, share if wide > 34 else "")
            at += wide
        parts += draw.text(at + 8, y + 18, human(total, "FLOP"), bold=True)
        parts += draw.text(at + 8, y + 34, f"{total / unit:.2f} × 2N", size=12)
    return draw.canvas(WIDTH, bottom + 18, parts)


def where_flop_caption(S: int) -> str:
    ratios = sorted((sum(flop_per_token(n, S).values()) / 2 / matmul_parameters(n), n) for n in PUBLISHED)
    (low, least), *_, (high, most) = ratios
    return (
        f"Forward FLOPs per token at S = {S:,}: from {low:.2f} × 2N ({least}) to {high:.2f} × 2N ({most}), N being the "
        "parameters that multiply. What exceeds 1 is attention's scores and values."
    )


def mountain(attention: str, run: str, tokens: int) -> svg.SVG:
    """Bytes held after every operation of one step, forward and backward, on one scale per number of tokens."""
    forward, backward, weights = step_memory(attention, run == "training", tokens)
    most = max(max(held) for held in step_memory("every tensor", True, tokens)[:2])
    steps, base, tall = sum(map(len, step_memory("every tensor", True, tokens)[:2])), 300.0, 264.0
    wide, right = 610 / steps, 632
    parts: draw.Elements = []
    for held, first, color, word in ((forward, 0, GREEN, "forward"), (backward, len(forward), ORANGE, "backward")):
        if not held:
            continue
        path = "".join(f"H{10 + (first + i) * wide:.1f}V{base - h / most * tall:.1f}" for i, h in enumerate(held))
        end, start = 10 + (first + len(held)) * wide, 10 + first * wide
        shape = f"M{start:.1f} {base}{path}H{end:.1f}V{base}z"
        parts.append(svg.Path(fill=color, fill_opacity=0.75, extra={"d": shape}))
        parts += draw.text((start + end) / 2, base + 20, word, anchor="middle", bold=True)
    peak = max((*forward, *backward))
    y, level = base - peak / most * tall, base - weights / most * tall
    parts += draw.line(10, y, right, y, dashed=True, opacity=0.7)
    parts += draw.line(10, level, right, level, color=BLUE, width=2)
    # The two labels keep apart when their lines do not.
    for at, number, words, color in ((min(y, level - 34), peak, "held at most", "currentColor"),
                                     (level, weights, "its parameters", BLUE)):
        parts += draw.text(right + 8, at - 1, human(number), bold=True, color=color, size=15)
        parts += draw.text(right + 8, at + 14, words, color=color)
    return draw.canvas(WIDTH, 326, parts, draw.line(10, base, right, base, opacity=0.5))


def mountain_caption(attention: str, run: str, tokens: int) -> str:
    forward, backward, weights = step_memory(attention, run == "training", tokens)
    after = f"; after it {human(backward[-1])} remain, gradients above all" if backward else ""
    peak = max((*forward, *backward))
    return (
        f"{run.capitalize()} on 2 sequences of {tokens} tokens, attention {attention}: {len(forward) + len(backward)} "
        f"operations hold up to {human(peak)}, {peak / weights:.1f} times the parameters{after}."
    )


