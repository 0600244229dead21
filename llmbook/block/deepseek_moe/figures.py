"""What the deepseek_moe chapter draws: a token through the gate, routers compared, training runs, the dispatch."""

import functools
from collections.abc import Callable
from typing import Any

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, rank_color

from .balance import entropy, load_of, peak
from .dispatch import plan
from .gate import V3, Routing, Rule, route
from .lab import EXPERTS, GROUPS, RULES, fitted_bias, groups_touched, lab_logits, lab_route
from .training import SMALL, Run, train

WIDTH, SKEW = 800, 0.7
STAGES = (
    "a sigmoid score per expert", "the bias is added, for the choice alone", "a score per group",
    "the best 4 groups stay open", "the best 8 experts in them", "gates from the raw scores",
)
BIASES = ("zero", "learned")


@functools.cache
def gate_of(token: int, bias: str, best: int) -> tuple[Routing, torch.Tensor, torch.Tensor, Rule]:
    """One token's routing at V3's sizes, its biased scores [8, 32], and its group scores [8]."""
    rule = V3._replace(best=best)
    b = fitted_bias(SKEW) if bias == "learned" else torch.zeros(V3.experts, dtype=torch.float64)
    r = route(lab_logits(8, SKEW, V3.experts)[token : token + 1], rule, b)
    choice = (r.scores[0] + b).view(8, 32)
    return r, choice, choice.topk(best, -1).values.sum(-1), rule


def one_token(token: int, bias: str, best: int, step: int) -> svg.SVG:
    """256 experts in 8 groups: scores, bias, group scores, open groups, the 8 chosen, their gates."""
    r, choice, group_score, _ = gate_of(token, bias, best)
    shown = choice if step >= 2 else r.scores[0].view(8, 32)
    bias_of = (choice - r.scores[0].view(8, 32)).tolist()
    chosen, cell = set(r.expert[0].tolist()), 22
    parts = [draw.text(6, 16, f"{step}. {STAGES[step - 1]}", bold=True, size=15)]
    for g in range(8):
        x, y = 6 + g % 4 * 200, 58 + g // 4 * 130
        dim = step >= 4 and not bool(r.open[0, g])
        top = set(shown[g].topk(best).indices.tolist())

        def fill(row: int, column: int, g: int = g, dim: bool = dim) -> tuple[str, float]:
            e = 8 * row + column
            if step >= 5 and 32 * g + e in chosen:
                return ORANGE, 1
            shade = round(0.08 + 0.82 * float(shown[g, e].clamp(0, 1)) ** 2, 1)
            return (GREY, 0.15) if dim else (BLUE, shade)

        parts.append(draw.matrix(x, y, 4, 8, cell, fill))
        for e, b in enumerate(bias_of[g] if step == 2 else ()):
            if abs(b) > 0.1:
                at = (x + e % 8 * cell + 10, y + e // 8 * cell + 15)
                parts.append(draw.text(*at, "+" if b > 0 else "−", anchor="middle", bold=True))
        if step == 3 or (step == 4 and not dim):
            for e in top:
                parts.append(draw.box(x - 1 + e % 8 * cell, y - 1 + e // 8 * cell, cell, cell, "none", stroke=TEAL))
        title = f"group {g}"
        parts.append(draw.text(x, y - 8, title, bold=True, opacity=0.5 if dim else 1))
        if step >= 3:
            words = "−∞" if dim else f"{float(group_score[g]):.3f}"
            parts.append(draw.text(x + 174, y - 8, words, anchor="end", color=GREY if dim else TEAL, bold=not dim))
            if step >= 4 and not dim:
                parts.append(draw.box(x - 5, y - 5, 184, 96, "none", stroke=TEAL))
    if step == 6:
        order = r.weight[0].argsort(descending=True)
        left = 6.0
        for weight, e in zip(r.weight[0][order].tolist(), r.expert[0][order].tolist(), strict=True):
            wide = 640 * weight / 2.5
            parts.append(draw.box(left, 320, wide - 2, 34, ORANGE, f"{weight:.2f}"))
            parts.append(draw.text(left + wide / 2, 371, str(e), anchor="middle", size=12))
            left += wide
        parts.append(draw.box(664, 320, 130, 34, PURPLE, "shared, 1.00"))
        parts.append(draw.text(6, 312, "gates of the chosen experts: sum 2.5", bold=True))
    else:
        keys = {"score": BLUE, f"its group's best {best}, and open groups": TEAL, "chosen": ORANGE}
        for words, color, x in zip(keys, keys.values(), (6, 106, 366), strict=True):
            parts.append(draw.box(x, 324, 16, 16, color))
            parts.append(draw.text(x + 22, 337, words))
        if step == 2:
            none = "all biases are 0" if bias == "zero" else "+ and −: moved by more than 0.1"
            parts.append(draw.text(466, 337, none, bold=True))
    return draw.canvas(WIDTH, 380, *parts)


def one_token_caption(token: int, bias: str, best: int, step: int) -> str:
    r, choice, group_score, rule = gate_of(token, bias, best)
    opened = r.open[0].nonzero()[:, 0].tolist()
    said = {
        1: f"the highest is expert {int(r.scores[0].argmax())} with {float(r.scores[0].max()):.3f}",
        2: f"the highest for the choice is now expert {int(choice.argmax())}" if bias == "learned" else "all zero",
        3: f"the sum of its best {best}: group {int(group_score.argmax())} leads with {float(group_score.max()):.3f}",
        4: f"groups {opened}; all others are masked with −∞",
        5: f"experts {sorted(r.expert[0].tolist())}",
        6: f"normalised, times {rule.scale:g}: they sum to {float(r.weight.sum()):.2f}",
    }[step]
    how = f"bias {bias}, groups ranked by their best {best}"
    return f"Token {token}, {how}. Stage {step}, {STAGES[step - 1]}: {said}."


@functools.cache
def _summary(router: str, skew: float) -> tuple[Routing, torch.Tensor, float, float, torch.Tensor]:
    r = lab_route(router, skew)
    load, touched = load_of(r.expert, EXPERTS), groups_touched(r.expert)
    return r, load, float(peak(load)), float(entropy(load).exp()), torch.bincount(touched, minlength=GROUPS + 1)[1:]


def lab(router: str, skew: float) -> svg.SVG:
    """Load per expert, groups per token, the gates by rank, and all four routers side by side."""
    r, load, _, _, touched = _summary(router, skew)
    mean, base, wide = float(load.double().mean()), 190, 11.6
    parts = [draw.text(4, 16, "tokens per expert, by group (dashed: the mean)", bold=True)]
    scale = 150 / max(float(load.max()), 4 * mean)
    for e, n in enumerate(load.tolist()):
        x = 4 + e * wide + e // 8 * 7
        parts.append(draw.box(x, base - n * scale, wide - 2, n * scale, rank_color(e // 8)))
    parts.append(draw.line(4, base - mean * scale, 796, base - mean * scale, dashed=True))
    parts.append(draw.text(4, 226, "groups a token enters", bold=True))
    for g, n in enumerate(touched.tolist()):
        tall = 100 * n / int(touched.sum())
        parts.append(draw.box(4 + 27 * g, 350 - tall, 23, tall, TEAL))
        parts.append(draw.text(15 + 27 * g, 366, str(g + 1), anchor="middle", size=12))
    parts.append(draw.text(248, 226, "mean gate, 1st to 6th", bold=True))
    gates = r.weight.sort(1, descending=True).values.mean(0).tolist()
    for i, weight in enumerate(gates):
        parts.append(draw.box(248 + 27 * i, 350 - 180 * weight, 23, 180 * weight, ORANGE))
        parts.append(draw.text(259 + 27 * i, 366, f"{weight:.2f}"[1:], anchor="middle", size=12))
    for i, words in enumerate(("peak", "in use", "groups")):
        parts.append(draw.text((650, 722, 796)[i], 226, words, anchor="end", size=12, bold=True))
    for i, name in enumerate(RULES):
        _, _, top, used, groups = _summary(name, skew)
        y, bold = 250 + 27 * i, name == router
        mean_groups = float((groups * torch.arange(1, 9)).sum() / groups.sum())
        parts.append(draw.text(440, y, "sigmoid, groups" if "3 of" in name else name, bold=bold))
        for j, words in enumerate((f"{top:.2f}", f"{used:.1f}", f"{mean_groups:.1f}")):
            parts.append(draw.text((650, 722, 796)[j], y, words, anchor="end", bold=bold))
    return draw.canvas(WIDTH, 374, *parts)


def lab_caption(router: str, skew: float) -> str:
    _, load, top, used, touched = _summary(router, skew)
    most = int(touched.nonzero().max()) + 1
    return (
        f"{router}, popularity e^±{skew:g}, the same 1,024 tokens: the busiest expert has {top:.2f} times the mean, "
        f"{used:.1f} of {EXPERTS} experts are in use (exp of the entropy), {int((load == 0).sum())} have nothing, and "
        f"a token enters up to {most} groups."
    )


RUNS: dict[str, dict[str, float]] = {
    "none": {}, "loss, α = 0.1": {"alpha": 0.1}, "bias, γ = 0.01": {"gamma": 0.01}, "bias, γ = 0.1": {"gamma": 0.1},
}
RUN_COLORS = dict(zip(RUNS, (RED, BLUE, GREEN, PURPLE), strict=True))
STEPS = 240


@functools.cache
def recorded(balancing: str) -> Run:
    """The run with this balancing, from the same start and on the same tokens."""
    return train(**RUNS[balancing], steps=STEPS)  # type: ignore[arg-type]


def _curve(values: list[float], x: float, y: float, wide: float, tall: float, color: str, bold: bool) -> draw.Elements:
    """A line through values between 0 and 1, upwards."""
    points = " ".join(f"{x + i * wide / (len(values) - 1):.1f},{y + tall * (1 - v):.1f}" for i, v in enumerate(values))
    return [svg.Polyline(
        fill="none", stroke=color, stroke_width=3.5 if bold else 1.3, opacity=1 if bold else 0.55,
        extra={"points": points},
    )]


def balancing(by: str, step: int) -> svg.SVG:
    """Shares by expert over training; below, the load's entropy for all runs, and this run's bias."""
    run, done, columns, x0, wide, tall = recorded(by), step * STEPS // 8, 40, 50, 700, 160
    each = STEPS // columns
    parts: list[draw.Elements] = [draw.text(x0, 16, "share of the tokens, by expert", bold=True)]
    share = run.load.view(columns, each, -1).sum(1).double()
    share /= share.sum(1, keepdim=True)
    pieces: dict[tuple[int, bool], list[str]] = {}
    for c in range(columns):
        y = 26.0
        for e, part in enumerate(share[c].tolist()):
            left, across = x0 + c * wide / columns, wide / columns
            box = f"M{left:.1f} {y:.1f}h{across:.1f}v{tall * part:.1f}h-{across:.1f}z"
            pieces.setdefault((e, (c + 1) * each <= done), []).append(box)
            y += tall * part
    for (e, seen), boxes in pieces.items():
        opacity = (1 if e < 8 else 0.6) if seen else 0.15
        parts.append([svg.Path(fill=rank_color(e), fill_opacity=opacity, extra={"d": "".join(boxes)})])
    top, half = 232, 330
    parts.append(draw.text(x0, top - 12, "entropy of the load ÷ ln 16", bold=True))
    for name in RUNS:
        h = entropy(recorded(name).load.view(columns, each, -1).sum(1)) / torch.tensor(16.0).log()
        parts.append(_curve(h.tolist(), x0, top, half, 110, RUN_COLORS[name], name == by))
    for i, (name, color) in enumerate(RUN_COLORS.items()):
        x, y = x0 + 8 + i % 2 * 140, top + 88 + 18 * (i // 2)
        parts.append(draw.text(x, y, name, color=color, bold=name == by, size=12))
    right = x0 + half + 50
    parts.append(draw.text(right, top - 12, "the bias of each expert", bold=True))
    largest = float(run.bias.abs().max())
    if largest:
        for e, values in enumerate((run.bias[::each] / largest * 0.5 + 0.5).T.tolist()):
            parts.append(_curve(values, right, top, half - 10, 110, rank_color(e), False))
        parts.append(draw.text(right - 6, top + 6, f"{largest:.2f}", anchor="end", size=12))
        parts.append(draw.text(right - 6, top + 114, f"−{largest:.2f}", anchor="end", size=12))
    else:
        parts.append(draw.text(right + 8, top + 40, "not used", opacity=0.6))
    for x, long in ((x0, wide), (x0, half), (right, half - 10)):
        at, low, high = x + long * done / STEPS, (22 if long == wide else top - 4), (190 if long == wide else top + 114)
        parts.append(draw.line(at, low, at, high, width=1.5, dashed=True))
    parts.append(draw.text(x0 + wide * done / STEPS, 204, f"step {done}", anchor="end", size=12))
    return draw.canvas(WIDTH, 352, *parts)


def balancing_caption(by: str, step: int) -> str:
    run, done = recorded(by), step * STEPS // 8
    load, loss = run.load[done - 30 : done].sum(0), float(run.loss[done - 30 : done].mean())
    return (
        f"Balancing: {by}. Steps {done - 30} to {done}: {float(entropy(load).exp()):.1f} of {SMALL.experts} experts in "
        f"use, the busiest has {float(peak(load)):.2f} times the mean; the task's loss is {loss:.3f}."
    )


LOADS = {
    "even": ((0, 1), (2, 3), (1, 0), (3, 2), (0, 2), (1, 3), (2, 0), (3, 1)),
    "skewed": ((0, 1), (0, 3), (1, 0), (0, 1), (0, 3), (0, 1), (1, 0), (0, 1)),
    "all on one": ((2,),) * 8,
}
MOVES = ("choices", "sort", "tiles", "products", "weighted sum")


def dispatch_rows(load: str, tile: int, step: int) -> svg.SVG:
    """Eight tokens: choices, rows sorted by expert, row tiles of one launch, answers added back."""
    expert = torch.tensor(LOADS[load])
    rows, k = plan(expert, 4), expert.shape[1]
    flat, order, ends = expert.flatten().tolist(), rows.order.tolist(), [0, *rows.ends.tolist()]
    pitch, x0, side = 700 / len(flat), 84, 34
    at = [x0 + pitch * (i + 0.5) for i in range(len(flat))]
    parts = [draw.text(0, 40, "choices", bold=True)]
    for i, e in enumerate(flat):
        parts.append(draw.box(at[i] - side / 2, 20, side, 30, rank_color(e), f"t{i // k}"))
    top = 132
    parts.append(draw.text(0, top + 20, "sorted", bold=True, opacity=1 if step >= 2 else 0.3))
    for r, i in enumerate(order):
        if step >= 2:
            parts.append(draw.line(at[i], 52, at[r], top - 3, color=rank_color(flat[i]), width=1.8))
            parts.append(draw.box(at[r] - side / 2, top, side, 30, rank_color(flat[i]), f"t{i // k}"))
    if step >= 3:
        parts.append(draw.text(0, top + 62, "tiles", bold=True))
        for e in range(4):
            for start in range(ends[e], ends[e + 1], tile):
                end = min(start + tile, ends[e + 1])
                left, wide = at[start] - pitch / 2 + 2, (end - start) * pitch - 4
                words = f"· W{e}" if step >= 4 else f"expert {e}" if wide > 58 else f"e{e}"
                parts.append(draw.box(
                    left, top + 42, wide, 32, rank_color(e), words, opacity=1 if step >= 4 else 0.25,
                    stroke=rank_color(e), size=12,
                ))
        parts.append(draw.text(0, 340, f"ends = {ends[1:]}", mono=True, size=12))
    out = 290
    if step >= 5:
        parts.append(draw.text(0, out + 20, "y", bold=True))
        for r, i in enumerate(order):
            to = x0 + 700 / 8 * (i // k + 0.5)
            parts.append(draw.line(at[r], top + 76, to, out - 2, color=rank_color(flat[i]), width=1.8, arrow=True))
        for t in range(8):
            x = x0 + 700 / 8 * (t + 0.5)
            parts.append(draw.box(x - 26, out, 52, 30, GREY, f"y{t}", opacity=0.25, stroke=GREY))
    return draw.canvas(WIDTH, 348, *parts)


def dispatch_caption(load: str, tile: int, step: int) -> str:
    expert = torch.tensor(LOADS[load])
    counts = load_of(expert, 4)
    tiles = (counts + tile - 1) // tile
    waste = int(tiles.sum()) * tile - int(counts.sum())
    said = (
        "each token names its experts, coloured", "a stable sort by expert: rows of one expert lie together",
        f"{int(tiles.sum())} tiles of {tile} rows in one launch; {waste} rows of padding on the chip, none in HBM",
        "every tile meets its own expert's matrix", "answers, times their gates, are added back to their tokens",
    )[step - 1]
    return f"Step {step}, {MOVES[step - 1]}; loads {counts.tolist()}, tiles of {tile}: {said}."


EXPLORERS: dict[str, tuple[Callable[..., Any], Callable[..., str], dict[str, Any]]] = {
    "one_token": (
        one_token, one_token_caption, {"token": (0, 1, 2), "bias": BIASES, "best": (1, 2), "step": range(1, 7)},
    ),
    "lab": (lab, lab_caption, {"router": tuple(RULES), "skew": (0.0, 0.5, 1.0, 2.0)}),
    "balancing": (balancing, balancing_caption, {"by": tuple(RUNS), "step": range(1, 9)}),
    "dispatch_rows": (
        dispatch_rows, dispatch_caption, {"load": tuple(LOADS), "tile": (2, 4), "step": range(1, 6)},
    ),
}
