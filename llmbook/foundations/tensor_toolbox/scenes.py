"""What the toolbox chapter's pictures show, and the sentences under them; `figures` draws it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import strides
from .moves import Move, apply, cells, gather_moves, scatter_moves, topk_moves
from .routing import Routing, route
from .strides import Layout

Tensor = torch.Tensor
FUNCTIONS = ("gather", "scatter_", "scatter_add_", "topk")
X = torch.tensor([[3, 8, 1, 6], [7, 2, 9, 4], [5, 11, 0, 10]])
# By dim: the index of gather, and the index of scatter (which has cells that two values want).
FETCH = (torch.tensor([[2, 0, 0, 1], [1, 1, 2, 0]]), torch.tensor([[3, 1], [0, 0], [2, 3]]))
PUT = (torch.tensor([[1, 0, 2, 2], [2, 0, 1, 0]]), torch.tensor([[2, 0], [3, 1], [1, 1]]))


class Scene(NamedTuple):
    """A call: what is read, its index, the first state of what is written, its moves, and whether they add."""

    source: Tensor
    indices: Tensor | None
    start: Tensor
    moves: list[Move]
    add: bool


@functools.cache
def scene(function: str, dim: int) -> Scene:
    if function == "gather":
        index = FETCH[dim]
        return Scene(X, index, torch.zeros_like(index), gather_moves(index, dim, X.shape[dim]), False)
    if function == "topk":
        shape = (2, 4) if dim == 0 else (3, 2)
        return Scene(X, None, torch.zeros(shape, dtype=X.dtype), topk_moves(X, 2, dim), False)
    index = PUT[dim]
    source = X[: index.shape[0], : index.shape[1]]
    moves = scatter_moves(index, dim, X.shape[dim])
    return Scene(source, index, torch.zeros_like(X), moves, function == "scatter_add_")


def frames(function: str, dim: int) -> range:
    return range(len(scene(function, dim)[3]) + 1)


def call(function: str, dim: int) -> str:
    return {
        "gather": f"x.gather({dim}, index)", "topk": f"x.topk(2, dim={dim})",
        "scatter_": f"out.scatter_({dim}, index, src)", "scatter_add_": f"out.scatter_add_({dim}, index, src)",
    }[function]


def rule(function: str, dim: int, now: Move | None, after: Tensor) -> list[str]:
    sign = "+=" if function == "scatter_add_" else "="
    where = ["i", "j"]
    where[dim] = "index[i][j]"
    looked = f"[{where[0]}][{where[1]}]"
    names = {"gather": f"out[i][j] = x{looked}", "topk": f"values[i][j] = x{looked.replace('index', 'indices')}"}
    rows = [names.get(function, f"out{looked} {sign} src[i][j]")]
    if now:
        out, x = ("values" if function == "topk" else "out"), ("src" if function.startswith("scatter") else "x")
        rows.append(f"{out}[{now.target[0]}][{now.target[1]}] {sign} {x}[{now.source[0]}][{now.source[1]}]")
        rows.append(f"now {int(after[now.target])}")
    return rows


def moving_caption(function: str, dim: int, step: int) -> str:
    source, _, start, moves, add = scene(function, dim)
    lane = "row" if dim == 1 else "column"
    if step == 0:
        return f"{call(function, dim)}: {len(moves)} moves to come; each {lane} has a colour, and no value leaves it."
    move, after = moves[step - 1], apply(moves[:step], source, start, add)
    told = f"Move {step} of {len(moves)}: {source[move.source]} goes from {list(move.source)} to {list(move.target)}"
    before = [m for m in moves[: step - 1] if m.target == move.target]
    if not before:
        if step == len(moves):
            kept = start.numel() - len({m.target for m in moves})
            left = f"{kept} cells were not written" if kept else "every cell was written"
            return f"{told}, and {call(function, dim)} is done; {left}."
        return f"{told}, in the same {lane}, by {call(function, dim)}."
    if add:
        return f"{told}, where {source[before[-1].source]} was already: the cell now holds {after[move.target]}."
    return f"{told} and overwrites {source[before[-1].source]}: two values wanted this cell, and one is lost."


LABELS = [1, 1, 2, 2, 10]


def counting_caption(step: int) -> str:
    if step == 0:
        return f"bincount of {LABELS}: {max(LABELS) + 1} bins, one per value from 0 to the largest, all empty."
    label = LABELS[step - 1]
    return f"Label {step} of {len(LABELS)} is {label}: bin {label} grows to {LABELS[:step].count(label)}."


BASE = strides.packed((3, 4))
VIEWS: dict[str, Layout] = {
    "x": BASE,
    "x.transpose(0, 1)": strides.transpose(BASE, 0, 1),
    "x.unsqueeze(1)": strides.unsqueeze(BASE, 1),
    "x[:, 1:3]": strides.cut(BASE, 1, 1, 3),
    "x[1:]": strides.cut(BASE, 0, 1, 3),
    "x[:, ::2]": strides.cut(BASE, 1, 0, 4, 2),
    "x[:, :1].expand(3, 4)": strides.expand(strides.cut(BASE, 1, 0, 1), (3, 4)),
}


def view_cells(view: str) -> range:
    return range(1, len(list(cells(VIEWS[view].shape))) + 1)


def address_sum(layout: Layout, cell: Sequence[int]) -> str:
    terms = " + ".join(f"{i}·{s}" for i, s in zip(cell, layout.stride, strict=True))
    return f"{layout.offset} + {terms} = {strides.address(layout, cell)}"


def storage_caption(view: str, step: int) -> str:
    layout = VIEWS[view]
    order = list(cells(layout.shape))
    shared = len(order) - len({strides.address(layout, cell) for cell in order})
    end = "the cells lie side by side, in order" if strides.is_contiguous(layout) else "reading row by row jumps"
    if shared:
        end = f"{len(order)} cells share {len(order) - shared} addresses"
    return f"{view}, cell {list(order[step - 1])}: storage cell {address_sum(layout, order[step - 1])}; {end}."


TOKENS, EXPERTS = 6, 4
ROUTERS = ("spread out", "one favourite")
LOGITS = torch.tensor([
    [2.0, 0.5, -1.0, 0.1], [0.3, 1.8, 0.9, -0.5], [-0.2, 0.4, 2.2, 1.1], [0.6, -1.0, 0.2, 1.7], [1.5, 1.2, -0.3, 0.0],
    [-0.6, 0.1, 1.0, 1.6],
])


@functools.cache
def plan(router: str, k: int) -> tuple[Tensor, Routing]:
    logits = LOGITS.clone()
    if router == ROUTERS[1]:
        logits[:, 2] += 2.5
    return logits, route(logits, k)


def code(k: int) -> list[str]:
    return [
        f"chosen = logits.topk({k}, dim=1).indices", "gates = logits.gather(1, chosen).softmax(1)",
        "mask = zeros.scatter_(1, chosen, True)", "load = chosen.flatten().bincount(minlength=4)",
        "expert, token = mask.transpose(0, 1).nonzero(as_tuple=True)",
        "rows = token.unsqueeze(1).expand(-1, D)", "packed = x.gather(0, rows)",
    ]


def routing_caption(router: str, k: int, step: int) -> str:
    made, t = plan(router, k)[1], 3
    told: dict[int, str] = {
        0: f"Router: {router}. Six tokens have a logit for each of four experts; {k} of them will be chosen per token.",
        1: f"topk: each token keeps its {k} largest logits; token {t} goes to {_experts(made, t)}.",
        2: f"gather fetches the chosen logits, softmax makes gates: token {t} has "
           f"{', '.join(f'{v:.2f}' for v in made.gates[t].tolist())}.",
        3: f"scatter_ writes True at every chosen cell: {int(made.mask.sum())} of {made.mask.numel()}.",
        4: f"bincount: the experts' loads are {made.load.tolist()}, {int(made.load.sum())} in all; "
           f"an even share would be {TOKENS * k / EXPERTS:g}.",
        5: f"transpose: read by columns, the mask lists the tokens by expert: {made.token.tolist()}.",
        6: f"unsqueeze and expand: {len(made.token)} numbers serve as an index of {len(made.token)} × D cells.",
        7: f"gather copies row after row; expert 2 finds its {int(made.load[2])} rows side by side, "
           f"of {len(made.token)} in all.",
    }
    return f"{router}, k = {k}. {told[step]}" if step else told[step]


def _experts(made: Routing, t: int) -> str:
    return " and ".join(f"e{e}" for e in made.chosen[t].tolist())
