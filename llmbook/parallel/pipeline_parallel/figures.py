"""The pictures of the pipeline chapter: timelines, what ranks hold, and a walk through time."""

from collections.abc import Sequence
from typing import Any

import svg

from llmbook.kit import draw, style
from llmbook.kit.ranks import Run

from .closed_forms import bubble, bubble_of_total
from .schedules import Op, Schedule, crossings, gpipe, interleaved, naive, one_f_one_b, with_recompute
from .simulate import Timeline, memory, peaks, simulate

WIDTH, LABEL, RIGHT = 740, 62, 70
# A rank's second chunk is paler; recomputation is purple: a forward, but not a new one.
SHADES = {"F": (style.BLUE, "#a6d3f0"), "B": (style.ORANGE, "#fbd08f"), "R": (style.PURPLE, "#d3b9ec")}
NAMES = ("naive", "GPipe", "GPipe, recomputing", "1F1B", "interleaved 1F1B")
RATIOS = {"1 : 1": 1.0, "1 : 2": 2.0, "1 : 3": 3.0}


def make(name: str, ranks: int, micros: int) -> Schedule:
    """The schedule that an explorer's menu names."""
    if name == "interleaved 1F1B":
        return interleaved(ranks, micros, 2)
    return {"naive": naive(ranks), "GPipe": gpipe(ranks, micros), "1F1B": one_f_one_b(ranks, micros),
            "GPipe, recomputing": with_recompute(gpipe(ranks, micros))}[name]


def timed(name: str, ranks: int, micros: int, ratio: float) -> Timeline:
    """Its simulation; F takes 1. The naive schedule's one batch is as long as all micro-batches together."""
    size = micros if name == "naive" else 1
    return simulate(make(name, ranks, micros), {"F": size, "B": size * ratio})


def lanes(
    y: float, height: float, timeline: Timeline, *, width: float = WIDTH, until: float = 0, unit: int = 1
) -> draw.Elements:
    """One lane per rank, micro-batch numbers inside the work; `unit`: micro-batches in each piece of work."""
    spans = [
        draw.Span(rank, span.start, span.end, shade(span.op, timeline.schedule), label)
        for rank, mine in enumerate(timeline.spans)
        for span in mine
        for label in [str(span.op.micro) if unit == 1 else f"0–{unit - 1}"]
    ]
    names = [f"rank {rank}" for rank in range(timeline.schedule.ranks)]
    how = {"until": until or timeline.total, "label_width": LABEL, "gap": 4}
    return draw.timeline(0, y, width, height, spans, names, **how)


def shade(op: Op, schedule: Schedule) -> str:
    return SHADES[op.kind][min(op.stage // schedule.ranks, 1)]


def held(y: float, height: float, timeline: Timeline, unit: int = 1) -> draw.Elements:
    """What each rank holds over time, as steps, full height being the whole batch; the peak in words."""
    left, scale = LABEL, (WIDTH - RIGHT - LABEL) / timeline.total
    most = timeline.schedule.micros
    shapes: draw.Elements = []
    path, thin = [], []
    for rank, curve in enumerate(memory(timeline)):
        base, tall = y + (rank + 1) * height - 4, height - 8
        shapes += draw.text(LABEL - 8, base - tall / 2 + 4, f"rank {rank}", anchor="end")
        shapes += draw.line(left, base, WIDTH - RIGHT, base, width=1, opacity=0.35)
        path.append(_steps(left, base, scale, tall / most, [(h.time, h.full) for h in curve]))
        if timeline.schedule.recompute:  # inputs are far smaller: a line, not an area
            thin.append(_steps(left, base, scale, tall / most, [(h.time, h.inputs) for h in curve]))
        peak = peaks(timeline)[rank]
        words = f"{peak.full * unit:g}" + (f" + {peak.inputs} in" if peak.inputs else "")
        shapes += draw.text(WIDTH - RIGHT + 8, base - tall / 2 + 5, words, bold=True)
    green = style.COLORS["activations"]
    shapes.append(svg.Path(fill=green, extra={"d": "".join(path)}))
    if thin:
        shapes.append(svg.Path(
            fill="none", stroke=style.PURPLE, stroke_width=1.5, stroke_dasharray=[4, 2],
            extra={"d": "".join(thin)},
        ))
    return shapes


def _steps(left: float, base: float, scale: float, up: float, points: Sequence[tuple[float, float]]) -> str:
    """A step curve from and to the base line, relative so that it stays short."""
    parts, at, level = [f"M{left:g} {base:g}"], 0, 0
    for time, value in points:
        x, height = round(time * scale), round(value * up)
        parts.append((f"h{x - at}" if x != at else "") + (f"v{level - height}" if height != level else ""))
        at, level = x, height
    return "".join(parts) + "z"


def legend(y: float, pieces: Sequence[tuple[str, str]]) -> draw.Elements:
    shapes, x = [], float(LABEL)
    for color, words in pieces:
        shapes += [*draw.box(x, y, 16, 13, color), *draw.text(x + 21, y + 11, words)]
        x += 34 + 7.1 * len(words)
    return shapes


def overview(schedule: str, ranks: int, micro_batches: int, forward_to_backward: str) -> svg.SVG:
    """The flagship: the timeline, under it what each rank holds, on the same axis of time."""
    if schedule == "interleaved 1F1B" and micro_batches % ranks:
        words = f"{micro_batches} micro-batches do not pass in groups of {ranks}: refused"
        return draw.canvas(WIDTH, 90, draw.text(WIDTH / 2, 50, words, anchor="middle", size=16, bold=True))
    timeline = timed(schedule, ranks, micro_batches, RATIOS[forward_to_backward])
    tall, low = (38, 40) if ranks <= 4 else (30, 30)
    pieces = [(SHADES["F"][0], "forward"), (SHADES["B"][0], "backward")]
    head = "micro-batches whose activations are held"
    if timeline.schedule.recompute:
        pieces.insert(1, (SHADES["R"][0], "forward again"))
        head += "; dashed: bare stage inputs"
    if timeline.schedule.chunks > 1:
        pieces = [
            (SHADES[k][c], f"{w}, chunk {c}")
            for c in (0, 1)
            for k, w in (("F", "forward"), ("B", "backward"))
        ]
    top = 34
    under = top + ranks * tall + 26
    unit = micro_batches if schedule == "naive" else 1
    idle = f"{timeline.bubble_of_total:.0%}"
    side = [
        part
        for rank in range(ranks)
        for part in draw.text(WIDTH - RIGHT + 8, top + rank * tall + tall / 2 + 3, idle, bold=True)
    ]
    heads = [
        *draw.text(WIDTH - RIGHT + 8, 18, "idle", bold=True),
        *draw.text(LABEL, under - 6, head, bold=True),
        *draw.text(WIDTH - RIGHT + 8, under - 6, "peak", bold=True),
    ]
    return draw.canvas(
        WIDTH, under + ranks * low + 4, legend(7, pieces), side, heads,
        lanes(top, tall, timeline, width=WIDTH - RIGHT, unit=unit),
        held(under, low, timeline, unit),
    )


def overview_caption(schedule: str, ranks: int, micro_batches: int, forward_to_backward: str) -> str:
    if schedule == "interleaved 1F1B" and micro_batches % ranks:
        return f"Interleaving refuses {micro_batches} micro-batches on {ranks} ranks."
    ratio = RATIOS[forward_to_backward]
    line = timed(schedule, ranks, micro_batches, ratio)
    size = micro_batches if schedule == "naive" else 1
    formula = bubble(ranks, size, size * ratio, line.schedule.chunks)
    most = max(peaks(line), key=lambda peak: peak.full)
    kept = f"{most.full * size:g} micro-batch{'es' * (most.full * size != 1)}"
    inputs = f" and {most.inputs} bare stage inputs" if most.inputs else ""
    return (
        f"{schedule} on {ranks} ranks, {micro_batches} micro-batches, F : B = {forward_to_backward}. "
        f"Measured: each rank idles {line.bubble:g} units of time, {line.bubble_of_total:.1%} of the total, "
        f"{line.bubble_of_ideal:.1%} of the ideal. Closed form: {formula:g} units. "
        f"The fullest rank holds {kept}{inputs}."
    )


def walk_times(schedule: str) -> range:
    """The moments of the walk: every unit of time of the small pipeline."""
    return range(int(walked(schedule).total) + 1)


def walked(schedule: str) -> Timeline:
    return timed(schedule, 4, 4, 2.0)


def walk(schedule: str, step: int) -> svg.SVG:
    """At one moment: what each rank does, which messages leave, and the activations piled up on it."""
    line, now = walked(schedule), step
    wide, gap, shapes = 150, 34, []
    piles = [[h for h in curve if h.time <= now][-1] for curve in memory(line)]
    for rank, mine in enumerate(line.spans):
        x = 4 + rank * (wide + gap)
        at = next((span for span in mine if span.start <= now < span.end), None)
        after = next((span for span in mine if span.start > now), None)
        shapes += draw.text(x, 16, f"rank {rank}", bold=True)
        if at:
            verb = "forward" if at.op.kind == "F" else "backward"
            shapes += draw.box(x, 24, wide, 44, SHADES[at.op.kind][0], f"{verb} {at.op.micro}", size=15)
        else:
            words = f"waits for {after.op.kind}{after.op.micro}" if after else "done"
            shapes += draw.box(x, 24, wide, 44, style.GREY, words, opacity=0.15, size=15)
        alive = [op.op.micro for op in mine if op.op.kind == "F" and op.start <= now]
        gone = [op.op.micro for op in mine if op.op.kind == "B" and op.end <= now]
        stack = [micro for micro in alive if micro not in gone]
        assert len(stack) == piles[rank].full
        for place, micro in enumerate(stack):
            shapes += draw.box(x + place * 37, 92, 34, 28, style.COLORS["activations"], str(micro), size=14)
        shapes += draw.text(x, 86, f"holds {len(stack)}", size=12)
        for span in mine:  # what was finished at this very moment crosses now
            to = rank + 1 if span.op.kind == "F" else rank - 1
            if span.end == now and 0 <= to < 4:
                a, b = (x + wide + 2, x + wide + gap - 4) if to > rank else (x - 2, x - gap + 4)
                high = 36 if to > rank else 56
                shapes += draw.line(a, high, b, high, color=SHADES[span.op.kind][0], width=4, arrow=True)
    return draw.canvas(WIDTH, 290, shapes, _so_far(140, line, now))


def _so_far(y: float, line: Timeline, now: int) -> draw.Elements:
    """The timeline up to now; what is to come is outlined by the lane alone."""
    scale = (WIDTH - LABEL) / line.total
    spans = [
        draw.Span(r, span.start, min(span.end, now), shade(span.op, line.schedule), str(span.op.micro))
        for r, mine in enumerate(line.spans)
        for span in mine
        if span.start < now
    ]
    shapes = draw.timeline(
        0, y, WIDTH, 34, spans, [f"rank {r}" for r in range(4)], until=line.total, label_width=LABEL, gap=4
    )
    x = LABEL + now * scale
    return shapes + draw.line(
        min(x, WIDTH - 1), y - 6, min(x, WIDTH - 1), y + 4 * 34, color=style.RED, width=3
    )


def walk_caption(schedule: str, step: int) -> str:
    line = walked(schedule)
    busy = [s.op for mine in line.spans for s in mine if s.start <= step < s.end]
    work = ", ".join(f"rank {op.stage} does {op.kind}{op.micro}" for op in busy) or "everybody is done"
    sent = [(op, to) for op, to in crossings(line.schedule) if ends(line)[op] == step]
    crossing = ", ".join(f"{op.kind}{op.micro} from rank {op.stage} to {to}" for op, to in sent) or "nothing"
    idle = f"{4 - len(busy)} of 4 ranks idle"
    return f"{schedule}, time {step} of {line.total:g}: {work}; {idle}. Crossing: {crossing}."


def ends(line: Timeline) -> dict[Op, float]:
    return {span.op: span.end for mine in line.spans for span in mine}


def both(timeline: Timeline, run: Run, unit: float) -> svg.SVG:
    """The simulation over what processes logged; `unit`: seconds per unit of simulated time."""
    schedule, tall = timeline.schedule, 32
    began = min(work.start for work in run.work)
    ended = max(work.end for work in run.work) - began
    until = max(ended / unit, timeline.total)
    scale = (WIDTH - LABEL) / until
    real = []
    for work in run.work:
        kind, stage, micro = work.name.split()
        op = Op(kind, int(stage), int(micro))
        a, b = (work.start - began) / unit, (work.end - began) / unit
        real.append(draw.Span(work.rank, a, b, shade(op, schedule), micro))
    names = [f"rank {rank}" for rank in range(schedule.ranks)]
    low = 24 + schedule.ranks * tall + 34
    path = []
    for message in run.messages:
        x1, x2 = (LABEL + (when - began) / unit * scale for when in (message.sent, message.received))
        y1, y2 = (low + rank * tall + tall / 2 - 2 for rank in (message.source, message.target))
        path.append(f"M{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}")
    wires = svg.Path(fill="none", stroke="currentColor", stroke_width=1.2, extra={"d": "".join(path)})
    logged = "logged by real processes; lines are messages, from sent to received"
    parts: list[Any] = [
        draw.text(LABEL, 15, f"simulated: {schedule.name}", bold=True),
        lanes(24, tall, timeline, until=until),
        draw.text(LABEL, low - 9, logged, bold=True),
        draw.timeline(0, low, WIDTH, tall, real, names, until=until, label_width=LABEL, gap=4), [wires],
    ]
    return draw.canvas(WIDTH, low + schedule.ranks * tall + 4, *parts)


def tradeoff(ax_time: Any, ax_memory: Any, ranks: int = 8) -> None:
    """Bubble and peak memory by the number of micro-batches: markers simulated, lines the closed forms."""
    micros = [8, 16, 32, 64, 128]
    cost = {"F": 1.0, "B": 2.0}
    for chunks, mark, color in ((1, "o", style.BLUE), (2, "s", style.ORANGE), (4, "^", style.GREEN)):
        made = [one_f_one_b(ranks, m) if chunks == 1 else interleaved(ranks, m, chunks) for m in micros]
        lines = [simulate(schedule, cost) for schedule in made]
        name = "1F1B" if chunks == 1 else f"interleaved, v = {chunks}"
        ax_time.plot(micros, [100 * bubble_of_total(ranks, m, chunks) for m in micros], color=color)
        ax_time.plot(
            micros, [100 * line.bubble_of_total for line in lines], mark, color=color, label=name, ms=7
        )
        ax_memory.plot(
            micros, [peaks(line)[0].full for line in lines], mark + "-", color=color, label=name, ms=7
        )
    rows = [simulate(gpipe(ranks, m), cost) for m in micros]
    share = [100 * line.bubble_of_total for line in rows]
    ax_time.plot(micros, share, "x", color=style.RED, ms=10, mew=2, label="GPipe")
    ax_memory.plot(
        micros, [peaks(line)[0].full for line in rows], "x-", color=style.RED, ms=9, mew=2, label="GPipe"
    )
    for ax, title in ((ax_time, "bubble, % of the total"), (ax_memory, "rank 0's peak, micro-batches")):
        ax.set(xscale="log", yscale="log", xlabel="micro-batches m", title=title)
        ax.set_xticks(micros, [str(m) for m in micros])
        ax.minorticks_off()
        ticks = (2, 5, 10, 20, 50) if ax is ax_time else (8, 16, 32, 64, 128)
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.legend(fontsize=10)
