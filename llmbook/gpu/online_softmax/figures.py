"""What the online_softmax chapter draws: the states that its own `stream` and `merge` went through, and its counts."""

import functools
import math
from typing import Any

import svg
import torch

from llmbook.kit import draw
from llmbook.kit.style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, YELLOW, plot

from .passes import PER_SCORE, elements
from .rounding import errors
from .state import State, absorb, empty, finish, merge, stream
from .trees import Tree, balanced_tree, chain_tree, depth, random_tree

WIDTH, KEYS = 800, 12  # pixels, and logits in the streaming row
RISING = [-3.0, -2.4, -1.8, -1.2, -0.6, 0.0, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0]
ROWS = {
    "rising": RISING, "falling": RISING[::-1],
    "one outlier": [-1.0, 0.5, -0.5, 1.0, 0.0, -1.5, 0.8, 4.0, 0.2, -0.8, 1.2, 0.4],
    "masked start": [-math.inf] * 4 + [-0.5, 1.0, 0.2, -1.0, 1.8, 0.6, 2.2, -0.3],
}
VALUES = [3.0, -1.0, 2.0, -2.0, 1.0, 3.0, -3.0, 2.5, -1.5, 0.5, -2.5, 1.5]


def _number(value: float, places: int = 2) -> str:
    return "−∞" if value == -math.inf else f"{value:.{places}f}".replace("-", "−")


@functools.cache
def _run(row: str, block: int) -> list[State]:
    s, v = torch.tensor(ROWS[row]).double(), torch.tensor(VALUES).double()[:, None]
    return list(stream(s, v, block))


def steps(block: int) -> range:
    """0 before the first block, then one per block."""
    return range(-(-KEYS // block) + 1)


def streaming(row: str, block: int, step: int) -> svg.SVG:
    """A row of logits arriving block by block: the running m, l, o, and the weights if the row ended here."""
    states, read = _run(row, block), min(step * block, KEYS)
    now, before = states[step], states[max(step - 1, 0)]
    logits = _logits(row, block, step, read, before.m.item(), now.m.item())
    return draw.canvas(WIDTH, 470, logits, _weights(row, read, now), _ledger(before, now, step, states[-1]))


def _logits(row: str, block: int, step: int, read: int, m_old: float, m: float) -> draw.Elements:
    wide, unit, base = 44, 24.0, 132
    parts = draw.text(0, 16, "logits s", bold=True)
    top, bottom = base - 4.3 * unit, base + 3.4 * unit
    for j in range(0, KEYS, block):
        last = min(j + block, KEYS)
        if step and j == (step - 1) * block:
            parts += draw.box(j * wide, top, (last - j) * wide - 2, bottom - top, YELLOW, opacity=0.2, stroke=YELLOW)
        parts += draw.line(last * wide - 1, top, last * wide - 1, bottom, opacity=0.25)
    for k, s in enumerate(ROWS[row]):
        x, seen = k * wide + 7, 1.0 if k < read else 0.25
        if s > -math.inf:
            parts += draw.box(x, base - max(s, 0) * unit, 30, max(abs(s) * unit, 2), COLORS["S"], opacity=seen)
        at = base + (14 if s >= 0 else -5)  # across the base line from the bar, clear of the line for m
        parts += draw.text(x + 15, at, _number(s, 1) if k < read else "", anchor="middle", size=12)
    end = KEYS * wide
    if m > -math.inf:
        if m_old != m and m_old > -math.inf:
            parts += draw.line(0, base - m_old * unit, end, base - m_old * unit, color=TEAL, dashed=True, opacity=0.6)
            rise = (end - 8, base - m_old * unit, end - 8, base - m * unit + 3)
            parts += draw.line(*rise, color=TEAL, width=3, arrow=True)
        parts += draw.line(0, base - m * unit, end, base - m * unit, color=TEAL, width=3)
        parts += draw.text(end + 6, base - m * unit + 5, "m", color=TEAL, bold=True, size=16)
    return parts


def _weights(row: str, read: int, now: State) -> draw.Elements:
    s = torch.tensor(ROWS[row]).double()
    true, base, unit = s.softmax(0).tolist(), 440, 170
    parts = draw.text(0, 252, "weights if the row ended here", bold=True, color=RED)
    parts += draw.text(258, 252, "and in the whole row", bold=True)
    parts += draw.line(258, 258, 410, 258, dashed=True, width=2)
    parts += draw.line(0, base, KEYS * 44, base, opacity=0.5)
    for k in range(KEYS):
        x = k * 44 + 7
        if k < read and now.l > 0:
            weight = float((s[k] - now.m).exp() / now.l)
            parts += draw.box(x, base - weight * unit, 30, weight * unit, RED)
            if weight >= 0.005:
                parts += draw.text(x + 15, base + 16, _number(weight), anchor="middle", size=12, color=RED)
        y = base - true[k] * unit
        parts += draw.line(x - 3, y, x + 33, y, width=2, dashed=True)
    return parts


def _ledger(before: State, now: State, step: int, last: State) -> draw.Elements:
    """The state at the right: the correction factor as a bar from 0 to 1, then l and o being updated."""
    x, wide = 572, WIDTH - 572
    m_old, m, l_old, l, o_old, o = (float(t) for t in (before.m, now.m, before.l, now.l, before.o, now.o))
    factor = math.exp(m_old - m) if m > -math.inf else 0.0
    new_l, new_o = l - factor * l_old, o - factor * o_old
    parts = draw.text(x, 24, "m", bold=True, color=TEAL, size=16)
    moved = f"{_number(m_old)} → {_number(m)}" if step else _number(m)
    parts += draw.text(x + 24, 24, moved)
    parts += draw.text(x, 58, "correction factor", bold=True)
    shown = f"e^({_number(m_old)} − {_number(m)})".replace("− −", "+ ") if step else "nothing to correct"
    parts += draw.text(x, 77, shown, size=12)
    parts += draw.box(x, 84, wide, 26, GREY, opacity=0.15, stroke=GREY)
    parts += draw.box(x, 84, wide * (factor if step else 0), 26, ORANGE)
    parts += draw.text(x + wide / 2, 102, f"× {factor:.3f}" if step else "", anchor="middle", bold=True)
    for y, name, color, old, new, total in ((146, "l", BLUE, l_old, new_l, l), (256, "o", PURPLE, o_old, new_o, o)):
        parts += draw.text(x, y, name, bold=True, color=color, size=16)
        sum_ = f"{_number(old)} × {factor:.3f} + {_number(new)}".replace("+ −", "− ") if step else ""
        parts += draw.text(x + 24, y, sum_)
        parts += draw.text(x + 24, y + 22, f"= {_number(total)}", bold=True, size=15)
    kept, most = factor * l_old, 4.5
    parts += draw.box(x, 178, min(kept / most, 1) * wide, 22, BLUE)
    parts += draw.box(x + kept / most * wide, 178, max(l - kept, 0) / most * wide, 22, YELLOW)
    parts += draw.text(x, 218, "blue: kept, yellow: new" if step else "empty", size=12)
    out, true = (float(finish(state)[0]) for state in (now, last))
    middle = x + wide / 2
    parts += draw.text(x, 330, f"output so far, o / l = {_number(out)}", bold=True, color=PURPLE)
    parts += draw.line(x, 356, x + wide, 356, opacity=0.4)
    parts += draw.line(middle, 346, middle, 366, opacity=0.6)
    parts += draw.box(min(middle, middle + out * 36), 346, abs(out) * 36, 20, PURPLE)
    at = middle + true * 36
    parts += draw.line(at, 338, at, 374, width=2, dashed=True)
    return parts + draw.text(at, 390, f"whole row: {_number(true)}", anchor="middle", size=12)


def streaming_caption(row: str, block: int, step: int) -> str:
    states = _run(row, block)
    now, before = states[step], states[max(step - 1, 0)]
    what = f"A row of 12 logits ({row}), {block} at a time."
    if not step:
        return f"{what} Nothing is read yet: m = −∞, l = 0, o = 0."
    m_old, m, l = before.m.item(), now.m.item(), now.l.item()
    if m == -math.inf:
        return f"{what} Block {step} is masked: m stays −∞ and l stays 0, which is what a row without keys has."
    if m_old == -math.inf:
        change = f"the first scores that count: m = {_number(m, 1)}, and there is nothing to correct"
    elif m > m_old:
        risen = f"m rises from {_number(m_old, 1)} to {_number(m, 1)}"
        change = f"{risen}, so the old sums are multiplied by {math.exp(m_old - m):.3f}"
    else:
        change = f"m stays at {_number(m, 1)}, the correction factor is 1"
    out = float(finish(now)[0])
    end = "That was the whole row: the red bars meet their marks." if step == len(states) - 1 else ""
    return f"{what} After block {step}: {change}; l = {_number(l)}, o/l = {_number(out)}. {end}".strip()


# --- merge trees

TREES: dict[str, Tree] = {
    "chain": chain_tree(6), "balanced": balanced_tree(6), "ring, from rank 3": ((((((3, 4), 5), 0), 1), 2)),
    "as they come": random_tree(6, 3),
}


@functools.cache
def _leaves() -> list[State]:
    generator = torch.Generator().manual_seed(4)
    s = 2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    s[1] = -math.inf  # a block that is masked as a whole
    v = torch.randn(6, 4, 1, generator=generator, dtype=torch.float64)
    return [absorb(empty(d=1, dtype=torch.float64), s[i], v[i]) for i in range(6)]


class _Node:
    """A merge as it is drawn: where, what it merged, and when."""

    def __init__(self, tree: Tree, merges: list["_Node"], left: float) -> None:
        self.children: list[_Node] = []
        if isinstance(tree, int):
            self.state, self.right, self.x, self.y, self.name = _leaves()[tree], left + 132, left + 66, 4.0, f"{tree}"
            return
        a = _Node(tree[0], merges, left)
        b = _Node(tree[1], merges, a.right)
        self.children, self.right, self.state = [a, b], b.right, merge(a.state, b.state)
        self.x, self.y, self.name = (a.x + b.x) / 2, max(a.y, b.y) + 84, a.name + b.name
        merges.append(self)


@functools.cache
def _merges(tree: str) -> list[_Node]:
    merges: list[_Node] = []
    _Node(TREES[tree], merges, 2.0)
    return merges


def merging(tree: str, step: int) -> svg.SVG:
    """Six blocks' states and the merges done so far, each arrow with its correction factor."""
    merges = _merges(tree)
    done = merges[:step]
    shown = {id(child): child for node in merges for child in node.children} | {id(merges[-1]): merges[-1]}
    parts: draw.Elements = []
    for node in merges:
        for child, side in zip(node.children, (-1, 1), strict=True):
            lit = node in done
            parts += draw.line(
                child.x, child.y + 44, node.x + side * 26, node.y - 3, arrow=lit, dashed=not lit, width=2,
                opacity=1 if lit else 0.3,
                color=ORANGE if node is merges[step - 1] and step else "currentColor",
            )
            if lit:
                factor = math.exp(float(child.state.m - node.state.m))
                anchor = "end" if side < 0 else "start"
                parts += draw.text(node.x + 66 * side, node.y + 26, f"×{factor:.2f}", anchor=anchor, bold=True)
    for node in shown.values():
        leaf, lit = not node.children, not node.children or node in done
        fill = YELLOW if leaf else ORANGE if node is merges[step - 1] and step else TEAL
        if not lit:
            parts += draw.box(node.x - 62, node.y, 124, 44, GREY, opacity=0.12)
            continue
        parts += draw.box(node.x - 62, node.y, 124, 44, fill)
        m, l = float(node.state.m), float(node.state.l)
        name = f"block {node.name}" if leaf else f"blocks {'·'.join(node.name)}"
        parts += draw.text(node.x, node.y + 17, name, anchor="middle", bold=True, size=12, color="#000000")
        words = f"m {_number(m)}, l {_number(l)}"
        parts += draw.text(node.x, node.y + 35, words, anchor="middle", size=12, color="#000000")
    if step == len(merges):
        out, lse = (float(t) for t in finish(merges[-1].state))
        words = f"output o/l: {_number(out, 6)},  logsumexp: {_number(lse, 6)}"
        parts += draw.text(400, 478, words, anchor="middle", bold=True, size=16, color=PURPLE)
    return draw.canvas(WIDTH, 490, parts)


def merging_caption(tree: str, step: int) -> str:
    merges = _merges(tree)
    deep = f"{tree.capitalize()}: five merges, at most {depth(TREES[tree])} in a row."
    if not step:
        return f"{deep} Six blocks of four keys, each with its own m and l; block 1 is masked."
    node = merges[step - 1]
    left, right = node.children
    words = (
        f"{deep} Merge {step} joins {'·'.join(left.name)} and {'·'.join(right.name)}: "
        f"m = {_number(float(node.state.m))}, l = {_number(float(node.state.l))}."
    )
    if step < len(merges):
        return words
    out, _ = finish(node.state)
    return f"{words} The output is {_number(float(out), 6)}, as by every other tree."


# --- bytes and errors

WAYS = dict(zip(PER_SCORE, ((3, 1, 1), (2, 1, 1), (1, 1, 1), (1, 0, 0)), strict=True))
PIECES = (("read s", BLUE), ("write p", ORANGE), ("read p", RED), ("read V, write O", GREEN))


def traffic(queries: int, d: int) -> svg.SVG:
    """What crosses memory for n = 4,096 keys, by way, with the softmax's product included."""
    n, top = 4096, elements("three passes", 4096, d, queries)
    parts: draw.Elements = []
    for i, (name, color) in enumerate(PIECES):
        parts += draw.box(150 + i * 120, 2, 16, 16, color)
        parts += draw.text(172 + i * 120, 15, name)
    for i, (way, counts) in enumerate(WAYS.items()):
        y = 34 + i * 58
        parts += draw.text(0, y + 26, way, bold=True)
        x, scale = 140.0, 560 / top
        sizes = [count * queries * n for count in counts] + [n * d + queries * d]
        for (_, color), size, count in zip(PIECES, sizes, (*counts, 1), strict=True):
            label = f"{count}×" if count > 1 and size * scale > 30 else ""
            parts += draw.box(x, y, max(size * scale - 1, 0), 40, color, label)
            x += size * scale
        parts += draw.text(x + 6, y + 25, f"{sum(sizes) / 1e6:.2f} M", bold=True)
    return draw.canvas(WIDTH, 270, parts)


def traffic_caption(queries: int, d: int) -> str:
    most, least = (elements(way, 4096, d, queries) for way in ("three passes", "one pass, fused"))
    rows = "1 query shares" if queries == 1 else f"{queries} queries share"
    return (
        f"{rows} one reading of 4,096 values of length {d}. Elements moved: {most / 1e6:.2f} million in three passes, "
        f"{least / 1e6:.2f} million in one fused pass, {most / least:.2f} times fewer."
    )


def error_plot(spread: int) -> Any:
    """Error of l against the number of keys, for a chain and a balanced tree."""
    lengths = [2**k for k in range(4, 13)]
    with plot(7.4, 3.7) as (figure, axes):
        for (name, found), style in zip(errors(spread).items(), ("o-", "s-", "^-"), strict=True):
            axes.loglog(lengths, [max(one, 1e-9) for one in found], style, label=name)
        axes.axhline(2**-24, color=GREY, linestyle="--")
        axes.text(lengths[-1], 2.9e-8, "dashed: one float32 rounding", ha="right", va="top")
        axes.set(xlabel="keys in the row", ylabel="relative error of l", ylim=(1.5e-8, 2e-5))
        axes.set_xscale("log", base=2)
        axes.legend(loc="upper left")
    return figure


def error_caption(spread: int) -> str:
    found = {name: values[-1] for name, values in errors(spread).items()}
    ratio = found["one key at a time"] / found["balanced tree"]
    return (
        f"Logits with standard deviation {spread}. At 4,096 keys l is off by {found['one key at a time']:.1e} one key "
        f"at a time and by {found['balanced tree']:.1e} in a balanced tree, {ratio:.0f} times less."
    )
