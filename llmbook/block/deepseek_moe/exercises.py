"""Checkers for the deepseek_moe chapter's exercises."""

from collections.abc import Callable

import torch

from llmbook.kit.exercise import exercise, expect

from .balance import update_bias
from .gate import Rule, select

Tensor = torch.Tensor


def _sets(expert: Tensor) -> list[list[int]]:
    rows: list[list[int]] = expert.sort(1).values.tolist()
    return rows


@exercise
def group_limited(answer: Callable[[Tensor, Tensor, int, int, int], Tensor]) -> str:
    """answer(scores, bias, groups, keep, k) → experts [T, k] by V3's rule; scores [T, E] in (0, 1), bias [E]."""
    torch.manual_seed(0)
    shapes = ((16, 4, 2, 3, 0.0), (64, 8, 4, 8, 0.0), (12, 3, 1, 2, -2.0), (8, 1, 1, 4, 0.0))
    for experts, groups, keep, k, low in shapes:
        rule = Rule(experts, groups, keep, k)
        scores, bias = torch.rand(40, experts), 0.3 * torch.randn(experts) + low
        choice = scores + bias
        _, wanted = select(choice, rule)
        given = answer(scores.clone(), bias.clone(), groups, keep, k)
        expect(isinstance(given, Tensor) and given.shape == wanted.shape, f"it should be a tensor {list(wanted.shape)}")
        mine, right = _sets(given), _sets(wanted)
        if mine == right:
            continue
        expect(mine != _sets(choice.topk(k).indices), "these are the best of all experts: first keep the best groups")
        expect(mine != _sets(select(scores, rule)[1]), "the bias takes no part in your choice")
        by_max = select(choice, rule._replace(best=1))[1]
        expect(mine != _sets(by_max), "you rank groups by their best expert (V2): V3 adds up the best two")
        if low:
            size = experts // groups
            outside = ~select(choice, rule)[0].gather(1, given // size)
            expect(not outside.any(), "with negative biased scores you pick from closed groups: mask with −inf, not 0")
        wrong = sum(a != b for a, b in zip(mine, right, strict=True))
        expect(False, f"with {experts} experts in {groups} groups, {wrong} of 40 tokens get other experts")
    return "right for four shapes, negative biases included."


@exercise
def update_the_bias(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """answer(bias, load, gamma) → the bias for the next step, [E]."""
    torch.manual_seed(1)
    for load in ([9, 2, 5, 4], [100, 0, 0, 0, 0], [3, 3, 3]):
        bias, counts = torch.randn(len(load)), torch.tensor(load)
        wanted = update_bias(bias, counts, 0.01)
        given = answer(bias.clone(), counts.clone(), 0.01)
        expect(isinstance(given, Tensor) and given.shape == bias.shape, f"it should be a tensor [{len(load)}]")
        step, right = given - bias, wanted - bias
        moved = bool(right.any())
        expect(not moved or not torch.allclose(step, -right, atol=1e-6), "the busy must fall and the idle rise")
        size = step.abs()[right != 0]
        even = not len(size) or bool((size - size[0]).abs().max() < 1e-6)
        expect(even, f"for loads {load} experts move by different amounts: only the sign of the deviation counts")
        expect(not step[right == 0].abs().gt(1e-6).any(), f"for loads {load} an expert at the mean should stay")
        expect(torch.allclose(given, wanted, atol=1e-6), f"for loads {load} it should move by ±0.01, not {step[0]:.4f}")
    return "the busy fall, the idle rise, all by γ."


@exercise
def row_tiles(answer: Callable[[list[int], int], list[tuple[int, int, int]]]) -> str:
    """answer(loads, tile) → (expert, first row, end row) of every tile of a grouped product, in the rows' order."""
    for loads, tile in (([5, 0, 9, 1], 4), ([0, 0, 8], 8), ([3, 2], 16), ([0, 0], 4)):
        wanted, start = [], 0
        for e, n in enumerate(loads):
            wanted += [(e, start + a, start + min(a + tile, n)) for a in range(0, n, tile)]
            start += n
        given = [tuple(t) for t in answer(list(loads), tile)]
        where = f"for loads {loads} and tiles of {tile}"
        expect(all(len(t) == 3 for t in given), f"{where}: each tile is (expert, first row, end row)")
        expect(all(a < b for _, a, b in given), f"{where}: a tile is empty; an expert without rows has none")
        ends = [sum(loads[: e + 1]) for e in range(len(loads))]
        crossing = [t for t in given if not 0 <= t[0] < len(loads) or t[2] > ends[t[0]]]
        expect(not crossing, f"{where}: the tile {crossing[:1]} reaches into the next expert's rows")
        expect(given == wanted, f"{where}: the tiles should be {wanted}, not {given}")
    return "every row in one tile, no tile over two experts."
