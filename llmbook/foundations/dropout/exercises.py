"""Checkers for the dropout chapter's exercises."""

from collections.abc import Callable
from typing import Any

import torch

from llmbook.kit.exercise import exercise, expect

from .philox import uniform_at
from .theory import sum_variance

Tensor = torch.Tensor


@exercise
def noise_of_a_neuron(answer: Callable[[Tensor, Tensor, float], Any]) -> str:
    """answer(w, x, p) → the variance of w · dropout(x) over masks; w, x: [n]."""
    for n, p in ((1, 0.5), (3, 0.1), (8, 0.75), (5, 0.0)):
        w = torch.linspace(-1, 2, n, dtype=torch.float64)
        x = torch.linspace(3, 1, n, dtype=torch.float64)
        wanted, got = float(sum_variance(w, x, p)), float(answer(w, x, p))
        case = f"for n = {n}, p = {p} the variance is {wanted:.4f}, but you gave {got:.4f}"
        hint = ""
        if wanted and abs(got - float(p * (1 - p) * (w * x).square().sum())) < 1e-9:
            hint = ": that is without the scale 1/(1-p), whose square enters a variance"
        elif wanted and abs(got - float(p / (1 - p) * (w @ x) ** 2)) < 1e-9:
            hint = ": the terms are independent, so their variances add, not the terms"
        elif wanted and abs(got**2 - wanted) < 1e-9:
            hint = ": that is the standard deviation"
        expect(abs(got - wanted) < 1e-9, case + hint)
    return "right; independent terms, so variances add."


@exercise
def bytes_of_the_masks(answer: Any) -> str:
    """One-byte masks of a Transformer layer: batch 8, 2,048 tokens, width 4,096, 32 heads, three dropouts."""
    b, s, h, a = 8, 2048, 4096, 32
    wide, scores = b * s * h, b * a * s * s
    expect(isinstance(answer, int), f"{answer!r} is not a whole number of bytes")
    mistakes = {
        2 * wide: "attention's probabilities, [b, a, s, s], are dropped too",
        scores: "two dropouts on [b, s, h] come on top of attention's",
        wide + scores: "there are two dropouts on [b, s, h]: after attention and after the MLP",
        2 * (2 * wide + scores): "a mask takes one byte an element, not the two of bf16",
        (2 * wide + scores) // 8: "one byte an element, not one bit: that is how PyTorch stores it",
        2 * wide + b * s * s: "every one of the 32 heads has probabilities of its own",
    }
    expect(answer not in mistakes, mistakes.get(answer, ""))
    expect(answer == 2 * wide + scores, f"{answer:,} is not 2·b·s·h + b·a·s², with b = {b}, s = {s}, h = {h}, a = {a}")
    return f"{answer / 1e9:.2f} GB a layer, {scores / answer:.0%} of it attention's; two integers each if replayed."


@exercise
def seeds_of_a_grid(answer: Callable[[int, int, int], tuple[int, int]]) -> str:
    """answer(seed, tp, dp) → the (replicated, sharded) seeds of a rank; tp and dp, its coordinates, are below 64."""
    seen: dict[int, tuple[str, int, int]] = {}
    for seed in (0, 1234):
        seen.clear()
        for dp in range(64):
            shared = answer(seed, 0, dp)[0]
            for tp in range(64):
                replicated, sharded = answer(seed, tp, dp)
                expect(
                    replicated == shared,
                    f"seed {seed}: tp 0 and tp {tp} of dp {dp} hold the same activations, but their replicated "
                    f"streams have the seeds {shared} and {replicated}",
                )
                names = [("sharded", sharded)] + [("replicated", replicated)] * (tp == 0)
                for name, value in names:
                    other = seen.setdefault(value, (name, tp, dp))
                    expect(
                        other == (name, tp, dp),
                        f"seed {seed}: the {name} stream of tp {tp}, dp {dp} and the {other[0]} stream of tp "
                        f"{other[1]}, dp {other[2]} share the seed {value}, so their masks are copies",
                    )
    return "right: replicas agree, and no other two streams are the same."


@exercise
def tile_of_a_mask(answer: Callable[..., Tensor]) -> str:
    """answer(at, p, columns, rows, cols) → that tile of the mask of a [·, columns] tensor; at(positions) → uniforms."""
    tiles = ((7, range(2, 5), range(3, 6)), (16, range(0, 1), range(0, 16)), (5, range(4, 9), range(1)))
    for columns, rows, cols in tiles:
        for seed, p in ((3, 0.5), (4, 0.2)):
            drawn = 0

            def at(position: Tensor, seed: int = seed) -> Tensor:
                nonlocal drawn
                drawn += position.numel()
                return uniform_at(position, seed)

            tile = answer(at, p, columns, rows, cols)
            whole = uniform_at(torch.arange(rows.stop * columns), seed).view(rows.stop, columns) >= p
            wanted = whole[rows.start :, cols.start : cols.stop]
            case = f"rows {rows.start} to {rows.stop - 1}, columns {cols.start} to {cols.stop - 1} of [·, {columns}]"
            expect(
                isinstance(tile, Tensor) and tile.shape == wanted.shape,
                f"{case}: the tile should be a tensor of shape {list(wanted.shape)}",
            )
            off = int((tile.bool() != wanted).sum())
            expect(off == 0, f"{case}: {off} of {wanted.numel()} elements differ from the whole mask")
            expect(
                drawn <= wanted.numel(),
                f"{case}: right, but you drew {drawn} numbers for {wanted.numel()} elements: ask for theirs only",
            )
    return "right, and not one number more than the tile needs."
