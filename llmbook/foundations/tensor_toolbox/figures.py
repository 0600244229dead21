"""What the toolbox chapter draws: the chapter's own moves, layouts and routing, one step at a time."""

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import GREY, RED, YELLOW, rank_color, text_on

from . import strides
from .moves import Cell, Move, apply, bincount_moves, cells
from .routing import Routing
from .scenes import (
    EXPERTS,
    FUNCTIONS,
    LABELS,
    ROUTERS,
    TOKENS,
    VIEWS,
    address_sum,
    call,
    code,
    counting_caption,
    frames,
    moving_caption,
    plan,
    routing_caption,
    rule,
    scene,
    storage_caption,
    view_cells,
)

__all__ = [
    "FUNCTIONS", "LABELS", "ROUTERS", "STEPS", "VIEWS", "counting", "counting_caption", "frames", "moving",
    "moving_caption", "routing", "routing_caption", "storage", "storage_caption", "view_cells",
]
WIDTH, CELL, STEPS = 760, 46, 7
def moving(function: str, dim: int, step: int) -> svg.SVG:
    """Source left, target right, the index under the tensor whose shape it has; the last move is bold."""
    source, index, start, moves, add = scene(function, dim)
    made, after = moves[:step], apply(moves[:step], source, start, add)
    now = made[-1] if made else None
    left, right, top, low = 30, WIDTH - 30 - start.shape[1] * CELL, 60, 252
    hit = [move.target for move in made]

    def color(cell: Cell) -> str:
        return rank_color(cell[1 - dim])  # the lane: what a move along dim never leaves

    def look(r: int, c: int) -> tuple[str, float]:
        return (color((r, c)), 1.0) if (r, c) in hit else (GREY, 0.2)

    names = {"gather": ("x", "out"), "topk": ("x", "values")}.get(function, ("src", "out, zeros before"))
    parts = [
        draw.text(left, 22, f"{call(function, dim)}", size=17, bold=True, mono=True),
        draw.matrix(left, top, source.shape[0], source.shape[1], CELL, lambda r, c: (color((r, c)), 1), label=names[0],
                    values=source.tolist()),
        draw.matrix(right, top, start.shape[0], start.shape[1], CELL, look, label=names[1], values=after.tolist()),
    ]
    side = left if function.startswith("scatter") else right
    shape = start.shape if index is None else index.shape
    for n, move in enumerate(moves):
        aligned = move.source if function.startswith("scatter") else move.target
        at = move.source[dim] if function in ("gather", "topk") else move.target[dim]
        shown = index is not None or n < step
        fill = YELLOW if move == now else GREY
        parts.append(draw.box(
            side + aligned[1] * CELL, low + aligned[0] * CELL, CELL - 2, CELL - 2, fill, str(at) if shown else "",
            opacity=1 if move == now else 0.25,
        ))
    parts.append(draw.text(side, low - 8, "indices" if index is None else "index", bold=True))
    rows = [f"the index replaces coordinate {dim}:", *rule(function, dim, now, after)]
    far = left if side == right else left + shape[1] * CELL + 40
    for n, words in enumerate(rows):
        parts.append(draw.text(far, low + 22 + 26 * n, words, size=15, mono=n > 0, bold=n == 2))
    for move in made:
        parts.append(_way(move, (left, source.shape[1]), right, top, color(move.source),
                          int(source[move.source]) if move is now else None))
    if now:
        crowded = hit.count(now.target) > 1
        for (x, y), edge in ((_middle(left, top, now.source), YELLOW),
                             (_middle(right, top, now.target), RED if crowded else YELLOW)):
            parts.append([_frame(x - CELL / 2 - 1, y - CELL / 2 - 1, CELL, edge)])
    return draw.canvas(WIDTH, 396, *parts)


def _way(
    move: Move, source: tuple[float, int], right: float, top: float, color: str, value: int | None
) -> draw.Elements:
    """A move's arrow, along the grid's lines so that no number is struck through; its value travels as a tile.

    An old move has no value any more: a thin line across the gap.
    """
    (x1, y1), (x2, y2) = _middle(source[0], top, move.source), _middle(right, top, move.target)
    edge, y1, y2 = source[0] + source[1] * CELL + 4, y1 - CELL / 2, y2 - CELL / 2
    if value is None:
        return draw.line(edge, y1 + 8, right - 6, y2 + 8, color=color, opacity=0.5)
    return [
        *draw.line(x1, y1, edge, y1, color=color, width=4), *draw.line(edge, y1, right - 6, y2, color=color, width=4),
        *draw.line(right - 6, y2, x2, y2, color=color, width=4),
        *draw.line(x2, y2 - 2, x2, y2 + 13, width=3, arrow=True),
        *draw.box((edge + right) / 2 - 22, (y1 + y2) / 2 - 17, 38, 34, color, str(value), size=17, stroke=YELLOW),
    ]


def _middle(x: float, y: float, cell: Cell) -> tuple[float, float]:
    return x + cell[1] * CELL + CELL / 2 - 1, y + cell[0] * CELL + CELL / 2 - 1


def _frame(x: float, y: float, side: float, edge: str) -> svg.Rect:
    return svg.Rect(x=round(x, 1), y=round(y, 1), width=side, height=side, rx=4, fill="none", stroke=edge,
                    stroke_width=4)


def counting(step: int) -> svg.SVG:
    """The notes' labels fall into their bins."""
    moves, size = bincount_moves(torch.tensor(LABELS)), 46
    ones = torch.ones(len(LABELS), dtype=torch.long)
    count = apply(moves[:step], ones, torch.zeros(max(LABELS) + 1, dtype=torch.long), add=True).tolist()
    left, top, low = 100, 46, 190
    parts = [draw.text(left, 26, "labels", bold=True), draw.text(left, low + size + 44, "bin = label value")]
    parts.append(draw.text(left, low - 12, "count", bold=True))
    for n, label in enumerate(LABELS):
        parts.append(draw.box(left + n * size, top, size - 2, size - 2, rank_color(label), str(label), size=16,
                              opacity=1 if n < step else 0.3))
    for label, value in enumerate(count):
        fill = rank_color(label) if value else GREY
        parts.append(draw.box(left + label * size, low, size - 2, size - 2, fill, str(value), size=16,
                              opacity=1 if value else 0.2))
        parts.append(draw.text(left + label * size + 22, low + size + 16, str(label), anchor="middle"))
    for n, move in enumerate(moves[:step]):
        bold = n == step - 1
        parts.append(draw.line(left + n * size + 22, top + size, left + move.target[0] * size + 22, low - 3,
                               color=rank_color(LABELS[n]), width=4 if bold else 1.5, arrow=bold,
                               opacity=1 if bold else 0.4))
    return draw.canvas(WIDTH, 286, *parts)


def storage(view: str, step: int) -> svg.SVG:
    """The view's cells with their storage offsets, over the one row of storage; the step's cell is addressed."""
    layout = VIEWS[view]
    order = list(cells(layout.shape))
    now = order[step - 1]
    left, size, low = 22, 60, 318
    deep = len(layout.shape) == 3

    def place(cell: Cell) -> tuple[float, float]:
        return left + cell[-1] * size, 62 + cell[0] * (size + (10 if deep else 0) - 12)

    parts = [draw.text(left, 26, view, size=17, bold=True, mono=True)]
    for n, cell in enumerate(order):
        x, y = place(cell)
        at = strides.address(layout, cell)
        parts.append(draw.box(x, y, size - 3, size - 15, rank_color(at // 4), str(at), size=16,
                              opacity=1 if n < step else 0.3))
    text = draw.text
    parts += [
        text(330, 70, f"shape   {list(layout.shape)}", size=15, mono=True),
        text(330, 96, f"strides {list(layout.stride)}", size=15, mono=True),
        text(330, 122, f"offset  {layout.offset}", size=15, mono=True),
        text(330, 148, "contiguous" if strides.is_contiguous(layout) else "not contiguous", size=15, bold=True),
        text(330, 186, f"{list(now)} lies at", size=15),
        text(330, 212, address_sum(layout, now), size=15, mono=True, bold=True),
        text(left, low + 90, "storage: one row, which no view moves", bold=True),
    ]
    read = [strides.address(layout, cell) for cell in order[:step]]
    for n in range(12):
        parts.append(draw.box(left + n * size, low, size - 3, 44, rank_color(n // 4), str(n), size=16,
                              opacity=1 if n in read else 0.3))
    x, y = place(now)
    at = read[-1]
    # Down the gap between columns, so that no number is struck through.
    bottom = place(order[-1])[1] + size - 8
    parts.append(draw.line(x + size - 1.5, y + 20, x + size - 1.5, bottom, color=YELLOW, width=4))
    parts.append(draw.line(x + size - 1.5, bottom, left + at * size + size / 2, low - 2, color=YELLOW, width=4,
                           arrow=True))
    for px, py, tall in ((x, y, size - 15), (left + at * size, low, 44)):
        parts.append([svg.Rect(x=px, y=py, width=size - 3, height=tall, rx=3, fill="none", stroke=YELLOW,
                               stroke_width=4)])
    if step > 1:
        hop = read[-1] - read[-2]
        parts.append(text(left + at * size + size / 2 - 2, low + 64, f"{hop:+d}", anchor="middle", bold=True, size=15))
    return draw.canvas(WIDTH, 420, *parts)


TILE = 40


def routing(router: str, k: int, step: int) -> svg.SVG:
    """The code with the step's line lit; the tensor it reads left, what it makes right; tokens by expert below."""
    logits, made = plan(router, k)
    top, right = 188, 430
    chosen = made.mask

    def by_token(r: int, c: int) -> tuple[str, float]:
        return rank_color(r), 1.0 if step == 0 or bool(chosen[r, c]) else 0.18

    parts = [
        draw.source(4, 8, 780 - 8, code(k), {step - 1} if step else set()),
        draw.matrix(74, top, TOKENS, EXPERTS, TILE, by_token, label="logits [T, E], one colour per token",
                    values=[[f"{v:.1f}" for v in row] for row in logits.tolist()]),
    ]
    for t in range(TOKENS):
        parts.append(draw.text(64, top + t * TILE + 24, f"token {t}", anchor="end"))
    for e in range(EXPERTS):
        parts.append(draw.text(74 + e * TILE + 19, top + TOKENS * TILE + 14, f"e{e}", anchor="middle"))
    if 1 <= step <= 3:
        parts += _tensor(made, k, step, right, top)
    if step >= 4:
        parts += _ways(made, 74 + EXPERTS * TILE + 4, right - 6, top)
        parts += _bins(made, step, right, top)
    if step >= 5:
        parts += _packed(made, step, top + TOKENS * TILE + 46)
    return draw.canvas(780, 568, *parts)


def _ways(made: Routing, x1: float, x2: float, top: float) -> list[draw.Elements]:
    """Every token's arrows to its experts, as wide as the gates."""
    pairs = zip(made.chosen.tolist(), made.gates.tolist(), strict=True)
    return [
        draw.line(x1, top + t * TILE + 19, x2, top + e * 58 + 19, color=rank_color(t), width=1 + round(5 * gate, 1),
                  arrow=True)
        for t, (experts, gates) in enumerate(pairs) for e, gate in zip(experts, gates, strict=True)
    ]


def _tensor(made: Routing, k: int, step: int, x: float, y: float) -> list[draw.Elements]:
    def own(r: int, c: int) -> tuple[str, float]:
        return rank_color(r), 1.0

    if step == 1:
        return [draw.matrix(x, y, TOKENS, k, TILE, own, label=f"chosen [T, {k}]", values=made.chosen.tolist())]
    if step == 2:
        gates = [[f"{v:.2f}" for v in row] for row in made.gates.tolist()]
        return [draw.matrix(x, y, TOKENS, k, TILE, own, label=f"gates [T, {k}]: a row sums to 1", values=gates)]

    def hit(r: int, c: int) -> tuple[str, float]:
        return (rank_color(r), 1.0) if made.mask[r, c] else (GREY, 0.18)

    values = [["1" if one else "" for one in row] for row in made.mask.tolist()]
    return [draw.matrix(x, y, TOKENS, EXPERTS, TILE, hit, label="mask [T, E], True where chosen", values=values)]


def _bins(made: Routing, step: int, x: float, y: float) -> list[draw.Elements]:
    parts = [draw.text(x, y - 7, "load [E]: tokens per expert" if step == 4 else "token, expert by expert", bold=True)]
    for e in range(EXPERTS):
        top, load = y + e * 58, int(made.load[e])
        parts.append(draw.text(x, top + 26, f"e{e}", bold=True))
        parts.append(draw.text(x + 26, top + 26, f"{load}", size=17, bold=True))
        for n, t in enumerate(made.token[made.expert == e].tolist()):
            label = f"t{t}" if step >= 5 else ""
            parts.append(draw.box(x + 52 + n * TILE, top, TILE - 2, TILE - 2, rank_color(t) if step >= 5 else GREY,
                                  label, opacity=1 if step >= 5 else 0.6))
    return parts


def _packed(made: Routing, step: int, y: float) -> list[draw.Elements]:
    names = {5: "expert, token: pairs in the order of the experts", 6: "rows [T·k, D]: the token's number, D times, "
             "one address", 7: "packed [T·k, D]: the rows of x, side by side for each expert"}
    parts = [draw.text(4, y, names[step], bold=True)]
    pairs = list(zip(made.expert.tolist(), made.token.tolist(), strict=True))
    wide = min(TILE, (780 - 8) // len(pairs))
    for n, (e, t) in enumerate(pairs):
        x = 4 + n * wide + 3 * e
        ends = step == 7
        for d in range(1 if step == 5 else 3):
            tall = 20 if step > 5 else 38
            label = f"{e},{t}" if step == 5 else (str(t) if not ends else "")
            parts.append(draw.box(x, y + 10 + d * 22, wide - 2, tall, rank_color(t), label, size=12,
                                  opacity=0.35 if step == 6 and d else 1))
        if ends:
            parts.append(draw.text(x + wide / 2 - 1, y + 24, f"x{t}", anchor="middle", size=12,
                                   color=text_on(rank_color(t))))
            if n == 0 or pairs[n - 1][0] != e:
                parts.append(draw.line(x, y + 10, x, y + 76, color=YELLOW, width=4))
    return parts
