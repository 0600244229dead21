"""What the switch_routing chapter draws: real routings, their waste, and recorded training runs."""

import functools
from collections.abc import Callable
from typing import Any

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, plot, rank_color

from .routing import capacity, expert_choice, load_balance_loss, route
from .training import Run, effective_experts, train
from .waste import skewed_logits, waste, waste_of

WIDTH, T, E = 800, 16, 4
ROUTERS = {"even": 0.0, "skewed": 0.7, "nearly collapsed": 2.2}
STAGES = ("the tokens", "router", "queues", "experts", "gates and residual")
FACTORS = (0.5, 1.0, 1.25, 2.0)


def _logits(router: str) -> torch.Tensor:
    return skewed_logits(T, E, ROUTERS[router], seed=3)


def bus(router: str, factor: float, step: int) -> svg.SVG:
    """16 tokens on their way through a Switch layer, stage by stage."""
    places = capacity(T, E, factor)
    r = route(_logits(router), places)
    p, expert, place, kept = r.p, r.expert.tolist(), r.place.tolist(), r.kept.tolist()
    x0, pitch, side = 64, 46, 34
    at = [x0 + pitch * t + side / 2 for t in range(T)]
    parts = [draw.text(0, 34, "tokens", bold=True)]
    for t in range(T):
        fill = rank_color(expert[t]) if step >= 2 else GREY
        parts.append(draw.box(at[t] - side / 2, 14, side, 30, fill, str(t)))
    if step >= 2:
        for e in range(E):
            parts.append(draw.text(52, 77 + 18 * e, f"router {e}", anchor="end", size=12))
            for t in range(T):
                lit = e == expert[t]
                shade = 0.12 + 0.88 * float(p[t, e])
                parts.append(draw.box(
                    at[t] - side / 2, 64 + 18 * e, side, 16, rank_color(e), f"{float(p[t, e]):.2f}"[1:] if lit else "",
                    opacity=shade, size=12, stroke="currentColor" if lit else None,
                ))
    top, wide = 216, 178
    slots = {}
    for e in range(E):
        left = x0 - 4 + e * 186
        parts.append(draw.text(left, top - 8, f"expert {e}", bold=True, opacity=1 if step >= 3 else 0.35))
        count = expert.count(e)
        if step >= 3:
            words = f"{count} came, {places} places"
            parts.append(draw.text(left + wide, top - 8, words, anchor="end", size=12))
        size = min(34, (wide - 4) / max(places, 1))
        for c in range(places):
            x = left + c * size
            slots[e, c] = (x + size / 2, top)
            parts.append(draw.box(x, top, size - 3, 34, rank_color(e), opacity=0.16, stroke=rank_color(e)))
    out = 344
    for t in range(T):
        if step >= 3 and kept[t]:
            x, y = slots[expert[t], place[t]]
            parts.append(draw.line(at[t], 138, x - 1.5, y - 24, color=rank_color(expert[t]), width=1.6))
            size = min(34, (wide - 4) / max(places, 1))
            parts.append(draw.box(x - size / 2, top, size - 3, 34, rank_color(expert[t]), str(t), size=12))
            if step >= 4:
                parts.append(draw.line(x - 1.5, top + 34, at[t], out, color=rank_color(expert[t]), width=1.6))
        elif step >= 3:
            parts.append(draw.line(at[t], 138, at[t], 160, color=RED, width=2.5))
            parts.append(draw.text(at[t], 174, "×", anchor="middle", color=RED, bold=True, size=16))
    if step >= 5:
        parts.append(draw.text(0, out + 20, "x + g·y", bold=True))
        for t in range(T):
            parts.append(draw.box(at[t] - side / 2, out, side, 30, GREY, opacity=0.25, stroke=GREY))
            if kept[t]:
                tall = 28 * float(r.gate[t])
                parts.append(draw.box(at[t] - side / 2, out + 29 - tall, side, tall, rank_color(expert[t])))
            parts.append(draw.text(at[t], out + 48, str(t), anchor="middle", size=12, opacity=1 if kept[t] else 0.5))
        words = "filled: how much of the expert's answer is added; grey alone: only x came through"
        parts.append(draw.text(x0 - 4, out + 74, words))
    return draw.canvas(WIDTH, out + 84, *parts)


def bus_caption(router: str, factor: float, step: int) -> str:
    places = capacity(T, E, factor)
    r = route(_logits(router), places)
    counts = torch.bincount(r.expert, minlength=E)
    lost = waste(counts, places)
    balance = float(load_balance_loss(r.p, r.expert))
    return (
        f"Stage {step}, {STAGES[step - 1]}. A {router} router, capacity factor {factor:g}: {places} places per expert "
        f"for loads {counts.tolist()}; {int((~r.kept).sum())} of {T} tokens dropped, {lost.empty:.0%} of the places "
        f"empty, balance loss {balance:.2f}."
    )


def trade(tokens: int, experts: int, skew: float) -> Any:
    """Dropped tokens and empty places against the capacity factor, measured on routed batches."""
    factors = _factors()
    with plot(7.4, 3.7) as (figure, axes):
        rows = [_mean_waste(tokens, experts, f, skew) for f in factors]
        axes.plot(factors, [100 * row[0] for row in rows], color=RED, label="tokens dropped")
        axes.plot(factors, [100 * row[1] for row in rows], color=BLUE, linestyle="--", label="places empty")
        axes.fill_between(factors, [100 * row[0] for row in rows], color=RED, alpha=0.15)
        axes.axvline(1.25, color=GREY, linewidth=1.2, linestyle=":")
        axes.annotate("1.25, the paper's", (1.25, 96), xytext=(6, 0), textcoords="offset points", va="top")
        axes.set(xlabel="capacity factor: places computed per token", ylabel="percent", ylim=(-2, 100), xlim=(0.2, 4))
        axes.legend(loc="center right")
    return figure


def _factors() -> list[float]:
    return [0.25 * n for n in range(1, 17)]


@functools.cache
def _mean_waste(tokens: int, experts: int, factor: float, skew: float) -> tuple[float, float]:
    rows = [waste_of(tokens, experts, factor, skew, seed) for seed in range(5)]
    return sum(r.dropped for r in rows) / len(rows), sum(r.empty for r in rows) / len(rows)


def trade_caption(tokens: int, experts: int, skew: float) -> str:
    dropped, empty = _mean_waste(tokens, experts, 1.25, skew)
    none = next((f for f in _factors() if _mean_waste(tokens, experts, f, skew)[0] == 0), None)
    until = f"from factor {none:g} on nobody is dropped" if none else "even factor 4 drops somebody"
    return (
        f"{tokens:,} tokens, {experts} experts, popularity e^±{skew:g}: at factor 1.25 {dropped:.1%} of the tokens are "
        f"dropped and {empty:.1%} of the places are empty; {until}."
    )


ALPHAS = (0.0, 0.3, 1.0)


@functools.cache
def recorded(alpha: float) -> Run:
    """The training run with this α, from the same start and on the same tokens."""
    return train(alpha)


def collapse(alpha: float, step: int) -> svg.SVG:
    """Each expert's share of the tokens over the training steps, and the loss of the task."""
    run = recorded(alpha)
    total = len(run.load)
    done, columns, x0, wide, tall = step * total // 8, 80, 60, 700, 190
    each = total // columns
    parts: list[draw.Elements] = [draw.text(x0, 16, "share of the tokens, by expert", bold=True)]
    pieces: dict[tuple[int, bool], list[str]] = {}  # one path per expert, before and after this step
    for c in range(columns):
        y = 26.0
        for e, part in enumerate(run.load[c * each : (c + 1) * each].mean(0).tolist()):
            if part:
                left, width = x0 + c * wide / columns, wide / columns
                box = f"M{left:.1f} {y:.1f}h{width:.1f}v{tall * part:.1f}h-{width:.1f}z"
                pieces.setdefault((e, (c + 1) * each <= done), []).append(box)
            y += tall * part
    for (e, seen), boxes in pieces.items():
        parts.append([svg.Path(
            fill=rank_color((e + 1) % 8), fill_opacity=1 if seen else 0.18, extra={"d": "".join(boxes)},
        )])
    for words, y in (("100%", 34), ("0", 26 + tall)):
        parts.append(draw.text(x0 - 8, y, words, anchor="end", size=12))
    top = 262
    parts.append(draw.text(x0, top - 8, "the task's loss (log scale)", bold=True))
    under = 0.0
    for a, color in zip(ALPHAS, (RED, ORANGE, GREEN), strict=True):
        heights = [
            top + 110 * (1.15 - float(v)) / 1.7 for v in recorded(a).loss.view(columns, each).mean(1).log10()
        ]
        points = " ".join(f"{x0 + (c + 0.5) * wide / columns:.1f},{y:.1f}" for c, y in enumerate(heights))
        parts.append([svg.Polyline(
            fill="none", stroke=color, stroke_width=3.5 if a == alpha else 1.5, extra={"points": points},
            opacity=1 if a == alpha else 0.5,
        )])
        under = max(heights[-1] + 4, under + 15)  # labels that would overlap move down
        parts.append(draw.text(x0 + wide + 6, under, f"α={a:g}", size=12, color=color, bold=a == alpha))
    x = x0 + wide * done / total
    parts.append(draw.line(x, 22, x, top + 118, width=1.5, dashed=True))
    parts.append(draw.text(min(x, x0 + wide - 30), top + 134, f"step {done}", anchor="middle"))
    return draw.canvas(WIDTH + 20, top + 142, *parts)


def collapse_caption(alpha: float, step: int) -> str:
    run = recorded(alpha)
    now = step * len(run.load) // 8 - 1
    load, loss = run.load[max(now - 9, 0) : now + 1].mean(0), run.loss[max(now - 9, 0) : now + 1].mean()
    return (
        f"α = {alpha:g}, after {now + 1} steps: the busiest expert has {float(load.max()):.0%} of the tokens, "
        f"{float(effective_experts(load)):.1f} of 8 experts are in use (by entropy), and the task's loss is "
        f"{float(loss):.2f}."
    )


def choices(who_chooses: str, router: str, factor: float) -> svg.SVG:
    """The same scores twice: each token picks an expert, or each expert picks tokens."""
    logits, places = _logits(router), capacity(T, E, factor)
    taken, p = _taken(who_chooses, router, factor), logits.softmax(1)
    x0, cell = 96, 42
    parts = []
    for t in range(T):
        parts.append(draw.text(x0 + cell * t + cell / 2 - 1, 18, str(t), anchor="middle", bold=True))
        times = int(taken[t].sum())
        color = RED if not times else GREEN if times == 1 else PURPLE
        parts.append(draw.text(x0 + cell * t + cell / 2 - 1, 224, f"{times}×", anchor="middle", color=color, bold=True))
        for e in range(E):
            lit = bool(taken[t, e])
            parts.append(draw.box(
                x0 + cell * t, 28 + cell * e, cell - 3, cell - 3, rank_color(e),
                f"{float(p[t, e]):.2f}"[1:] if lit else "", opacity=1 if lit else 0.08 + 0.5 * float(p[t, e]), size=12,
            ))
    for e in range(E):
        parts.append(draw.text(x0 - 10, 28 + cell * e + 18, f"expert {e}", anchor="end", bold=True))
        filled = f"{int(taken[:, e].sum())} of {places}"
        parts.append(draw.text(x0 - 10, 28 + cell * e + 34, filled, anchor="end", size=12))
    parts.append(draw.text(x0 - 10, 224, "served", anchor="end", bold=True))
    return draw.canvas(WIDTH - 24, 236, *parts)


def _taken(who_chooses: str, router: str, factor: float) -> torch.Tensor:
    """[T, E], bool: which expert computes which token."""
    logits, places = _logits(router), capacity(T, E, factor)
    taken = torch.zeros(T, E, dtype=torch.bool)
    if who_chooses == "tokens":
        r = route(logits, places)
        taken[torch.arange(T)[r.kept], r.expert[r.kept]] = True
    else:
        token, _ = expert_choice(logits, places)
        taken[token, torch.arange(E)[:, None]] = True
    return taken


def choices_caption(who_chooses: str, router: str, factor: float) -> str:
    taken = _taken(who_chooses, router, factor)
    served = taken.sum(1)
    return (
        f"The {who_chooses} choose, {router} router, factor {factor:g}: {int((served == 0).sum())} tokens get no "
        f"expert, {int((served > 1).sum())} get more than one, and {int(taken.sum())} of "
        f"{E * capacity(T, E, factor)} places are filled."
    )


EXPLORERS: dict[str, tuple[Callable[..., Any], Callable[..., str], dict[str, Any]]] = {
    "bus": (bus, bus_caption, {"router": tuple(ROUTERS), "factor": FACTORS, "step": range(1, 6)}),
    "trade": (trade, trade_caption, {"tokens": (64, 512, 4096), "experts": (8, 64), "skew": (0.0, 0.5, 1.5)}),
    "collapse": (collapse, collapse_caption, {"alpha": ALPHAS, "step": range(1, 9)}),
    "choices": (
        choices, choices_caption,
        {"who_chooses": ("tokens", "experts"), "router": tuple(ROUTERS), "factor": (0.5, 1.0, 2.0)},
    ),
}
