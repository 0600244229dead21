"""What the dropout chapter draws: layers under the chapter's own masks, moments with their bands, ranks' real masks."""

import functools
from collections.abc import Sequence
from typing import Any

import svg
import torch

from llmbook.kit import draw, ranks
from llmbook.kit.style import BLUE, GREEN, GREY, INK, ORANGE, RED, YELLOW, plot, rank_color, text_on

from .masks import dropout
from .philox import Stream, uniform_at
from .tensor_parallel import Streams, megatron_streams
from .theory import kept_band

Tensor = torch.Tensor
WIDTH, ROWS, COLUMNS, CELL, PASSES = 760, 4, 6, 37.5, 8
LAYER = (uniform_at(torch.arange(24).view(ROWS, COLUMNS), 5) * 15 + 5).round() / 10
SCALINGS = ("inverted, ÷ (1 − p) in training", "2014, × (1 − p) at test", "none")


@functools.cache
def passes(p: float) -> list[Tensor]:
    """The layer's output on each pass, one stream for all of them."""
    stream = Stream(12)
    return [dropout(LAYER, p, stream) for _ in range(PASSES)]


def layer(p: float, step: int) -> svg.SVG:
    """x, the mask, and y on one pass; below, the mean of y on every pass so far."""
    y, scale = passes(p)[step - 1], f"{1 / (1 - p):.3g}" if p < 1 else "–"
    kept, gap, top = y != 0, 40, 34
    xs = [4 + n * (COLUMNS * CELL + gap) for n in range(3)]

    def dim(color: str) -> Any:
        return lambda r, c: (color, 1.0) if kept[r, c] else (GREY, 0.18)

    masks = [[scale if one else "0" for one in row] for row in kept.tolist()]
    plain = [[f"{v:.1f}" for v in row] for row in LAYER.tolist()]
    values = [[f"{v:.1f}" if v else "0" for v in row] for row in y.tolist()]
    size = (ROWS, COLUMNS, CELL)
    middle = top + ROWS * CELL / 2 + 6
    return draw.canvas(
        WIDTH, 400,
        draw.matrix(xs[0], top, *size, lambda r, c: (BLUE, 1.0), label="the layer x", values=plain),
        draw.matrix(xs[1], top, *size, dim(YELLOW), label=f"mask, pass {step}", values=masks),
        draw.matrix(xs[2], top, *size, dim(GREEN), label="what the next layer sees", values=values),
        draw.text(xs[1] - gap / 2 - 1, middle, "×", size=22, anchor="middle"),
        draw.text(xs[2] - gap / 2 - 1, middle, "=", size=22, anchor="middle"),
        _means(232, 144, p, step),
    )


def spread(p: float) -> float:
    """The standard deviation of the mean of y over masks."""
    return float((p / (1 - p) * LAYER.square().sum()).sqrt() / LAYER.numel()) if p < 1 else 0.0


def _means(y: float, height: float, p: float, step: int) -> draw.Elements:
    """Pass by pass the mean of y as a dot, around the mean of x and two standard deviations."""
    left, right, most = 150.0, WIDTH - 150.0, 4.2
    mean, half = float(LAYER.mean()), 2 * spread(p)

    def at(value: float) -> float:
        return y + height - value / most * height

    low, high = at(max(mean - half, 0)), at(min(mean + half, most))
    parts = draw.text(left, y - 16, "mean of what the next layer sees, pass by pass", bold=True)
    parts += draw.box(left, high, right - left, low - high, GREEN, opacity=0.22)
    parts += draw.line(left, at(mean), right, at(mean), color=BLUE, width=2.5)
    parts += draw.line(left, at(0), right, at(0), opacity=0.5)
    parts += draw.text(left - 10, at(mean) + 4, f"mean of x {mean:.2f}", anchor="end")
    parts += draw.text(left - 10, at(0) + 4, "0", anchor="end")
    if p < 1:
        parts += draw.text(right + 10, at(mean) - 2, "± 2 standard")
        parts += draw.text(right + 10, at(mean) + 14, f"deviations, {half:.2f}")
    for n in range(step):
        x = left + (n + 0.5) * (right - left) / PASSES
        value = float(passes(p)[n].mean())
        color = GREEN if n == step - 1 else GREY
        parts.append(svg.Circle(cx=round(x), cy=round(at(value), 1), r=8 if n == step - 1 else 6, fill=color))
        parts += draw.text(x, at(0) + 18, str(n + 1), anchor="middle", bold=n == step - 1)
    return parts


def layer_caption(p: float, step: int) -> str:
    y = passes(p)[step - 1]
    kept = int((y != 0).sum())
    so_far = sum(float(one.mean()) for one in passes(p)[:step]) / step
    if p == 1:
        return f"p = 1, pass {step}: all 24 elements are zero, and no scale can bring the mean of x back."
    scale = f"each multiplied by {1 / (1 - p):.3g}" if p else "each as it was"
    return (
        f"p = {p:g}, pass {step}: {kept} of 24 elements kept ({24 * (1 - p):g} expected), {scale}. "
        f"The mean is {y.mean():.2f} on this pass, {so_far:.2f} over {step} pass{'es' * (step > 1)}, "
        f"and {LAYER.mean():.2f} without dropout."
    )


GRID = [round(0.05 * k, 2) for k in range(1, 20)]


@functools.cache
def shares(elements: int) -> list[float]:
    """For each p of the grid, the share of a layer of ones that was kept."""
    stream = Stream(17)
    return [float((dropout(torch.ones(elements), p, stream) != 0).double().mean()) for p in GRID]


def _moments(scaling: str, kept: float, p: float) -> tuple[float, float]:
    """Mean and variance of a layer of ones of which a share is kept."""
    scale = 1 / (1 - p) if scaling == SCALINGS[0] else 1.0
    return kept * scale, kept * (1 - kept) * scale**2


def _band(scaling: str, n: int, p: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The bands of mean and variance: what the binomial band of the kept share maps to."""
    low, high = kept_band(n, p)
    ends = [low, high, *([0.5] if low < 0.5 < high else [])]
    both = [_moments(scaling, kept, p) for kept in ends]
    means, variances = zip(*both, strict=True)
    return (min(means), max(means)), (min(variances), max(variances))


def moments(scaling: str, elements: int) -> Any:
    """Mean and variance of a layer of ones against p: measured dots, theory, and its band."""
    rows = [(_moments(scaling, kept, p), _band(scaling, elements, p))
            for kept, p in zip(shares(elements), GRID, strict=True)]
    with plot(7.6, 3.7, ncols=2) as (figure, axes):
        for axis, which in zip(axes, (0, 1), strict=True):
            theory = [_moments(scaling, 1 - p, p)[which] for p in GRID]
            low, high = ([band[which][end] for _, band in rows] for end in (0, 1))
            axis.fill_between(GRID, [max(v, 1e-4) for v in low], high, color=GREEN, alpha=0.3, lw=0,
                              label="theory ± 4 standard errors")
            axis.plot(GRID, theory, color=GREEN, lw=1.5)
            axis.plot(GRID, [now[which] for now, _ in rows], "o", color=BLUE, ms=5, label="training, measured")
            axis.set(xlabel="p", xlim=(0, 1))
        axes[0].plot(GRID, [at_test(scaling, p) for p in GRID], "--", color=ORANGE, label="at test")
        axes[0].set(title="mean", ylim=(0, 2.2))
        axes[1].set(title="variance", yscale="log", ylim=(0.01, 60))
        axes[0].legend(loc="upper left", fontsize=10, labelcolor=INK)
    return figure


def at_test(scaling: str, p: float) -> float:
    """What a layer of ones gives at test under a scaling."""
    return 1 - p if scaling == SCALINGS[1] else 1.0


def moments_caption(scaling: str, elements: int) -> str:
    inside = 0
    for kept, p in zip(shares(elements), GRID, strict=True):
        bands = _band(scaling, elements, p)
        values = _moments(scaling, kept, p)
        inside += sum(low <= value <= high for value, (low, high) in zip(values, bands, strict=True))
    mean, variance = _moments(scaling, 0.25, 0.75)
    test = at_test(scaling, 0.75)
    verdict = "they agree" if mean == test else f"a factor of {test / mean:g} apart"
    return (
        f"Scaling: {scaling}; {elements:,} elements. {inside} of {2 * len(GRID)} measured points lie in their band. "
        f"At p = 0.75 the mean in training is {mean:g} and at test {test:g}: {verdict}; the variance is {variance:g}."
    )


ACTIVATIONS, STREAMS = ("replicated", "sharded"), ("the shared stream", "a stream per rank")
P, TOKENS, UNITS = 0.25, 4, 8


def draw_mask(comm: ranks.Comm, streams: str) -> Tensor:
    """On one rank: the mask of a [512, 8] tensor, from the stream that all share or from the rank's own."""
    mine: Streams = megatron_streams(2024, comm.rank)
    stream = mine.replicated if streams == STREAMS[0] else mine.sharded
    return (dropout(torch.ones(512, UNITS), P, stream) != 0).double()


@functools.cache
def drawn(streams: str, count: int) -> list[Tensor]:
    """What real processes drew, by rank."""
    return list(ranks.run(draw_mask, count, streams).results)


def correlations(masks: Sequence[Tensor]) -> list[list[float]]:
    """Correlation of each rank's mask with each other's."""
    return torch.corrcoef(torch.stack([mask.flatten() for mask in masks])).tolist()


def on_ranks(activations: str, streams: str, ranks: int) -> svg.SVG:
    """Every rank's mask, as processes drew it, and the correlation between ranks."""
    masks, copied = drawn(streams, ranks), activations == ACTIVATIONS[0]
    cell, gap, top = 21, 22 if copied else 4, 62
    wide = UNITS * cell + gap
    left = 4
    title = "one tensor, a whole copy on every rank" if copied else "one tensor, its columns split over the ranks"
    parts = [draw.text(left, 18, title, bold=True)]
    for rank, mask in enumerate(masks):
        x, color = left + rank * wide, rank_color(rank)
        shown, first = mask[:TOKENS], masks[0][:TOKENS]

        def fill(r: int, c: int, shown: Tensor = shown, color: str = color) -> tuple[str, float]:
            return (color, 1.0) if shown[r, c] else (GREY, 0.18)

        parts.append(draw.text(x, top - 14, f"rank {rank}"))
        parts.append(draw.matrix(x, top, TOKENS, UNITS, cell, fill))
        wrong = [(r, c) for r in range(TOKENS) for c in range(UNITS) if copied and shown[r, c] != first[r, c]]
        parts.append([
            svg.Rect(x=round(x + c * cell, 1), y=top + r * cell, width=cell - 2, height=cell - 2, fill="none",
                     stroke="currentColor", stroke_width=2.5)
            for r, c in wrong
        ])
        same = bool((shown == first).all())
        words = "" if not rank else "as rank 0" if same else f"{len(wrong)} differ" if copied else "its own"
        bad = rank > 0 and same != copied
        parts.append(draw.text(x, top + TOKENS * cell + 18, words, color=RED if bad else "currentColor", bold=bad))
    y = top + TOKENS * cell + 66
    parts.append(draw.text(left, y - 12, "correlation of the masks, 4,096 elements", bold=True))
    parts.append(_table(left, y, masks, copied))
    good, why = verdict(activations, streams)
    name, color = ("right", GREEN) if good else ("wrong", RED)
    parts.append(draw.text(left + 210, y + 24, name, color=color, bold=True, size=16))
    parts += [draw.text(left + 210, y + 48 + 20 * n, line) for n, line in enumerate(why)]
    return draw.canvas(WIDTH, y + max(38 * ranks, 76) + 4, *parts)


def _table(x: float, y: float, masks: Sequence[Tensor], copied: bool) -> draw.Elements:
    parts: draw.Elements = []
    for r, row in enumerate(correlations(masks)):
        for c, value in enumerate(row):
            off = r != c and (value > 0.5) != copied
            color = GREY if r == c else RED if off else GREEN
            parts += draw.box(x + c * 46, y + r * 38, 43, 35, color, opacity=0.25 if r == c else 1)
            ink = "currentColor" if r == c else text_on(color)
            parts += draw.text(x + c * 46 + 21.5, y + r * 38 + 22, f"{value + 0.0:.1f}".replace("-0.0", "0.0"),
                               anchor="middle", color=ink, size=14)
    return parts


def verdict(activations: str, streams: str) -> tuple[bool, list[str]]:
    """Whether this stream suits these activations, and why."""
    copied, shared = activations == ACTIVATIONS[0], streams == STREAMS[0]
    if copied and shared:
        return True, ["Copies stay copies: every rank zeroes", "the same elements, without a message."]
    if copied:
        return False, ["Copies of one tensor now differ, and so", "do all gradients computed from them."]
    if shared:
        return False, ["Units of different ranks fall together:", "fewer masks than there are units."]
    return True, ["Every unit has a mask of its own,", "as it had on one device."]


def on_ranks_caption(activations: str, streams: str, ranks: int) -> str:
    masks = drawn(streams, ranks)
    differ = max(float((mask != masks[0]).double().mean()) for mask in masks)
    good, words = verdict(activations, streams)
    if activations == ACTIVATIONS[0]:
        count = f"at most {differ:.0%} of a copy's elements differ from rank 0's (2p(1 − p) = {2 * P * (1 - P):.0%})"
        if not differ:
            count = "no element of any copy differs"
    else:
        highest = max(abs(v) for r, row in enumerate(correlations(masks)) for c, v in enumerate(row) if r != c)
        count = f"correlation between ranks up to {highest:.2f}"
    return (
        f"{ranks} ranks, {activations} activations, {streams}, p = {P}: {count}. "
        f"{'Right' if good else 'Wrong'}. {' '.join(words)}"
    )
