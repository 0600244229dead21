"""Checkers for the chapter's exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmbook.kit.exercise import exercise, expect

from .rotation import frequencies, rotate_half_split, rotate_interleaved, tables, to_half_split


@exercise
def unfinished_pair(answer: int) -> str:
    """The first pair of Llama-3-8B (d = 128, base 500,000) that makes no full turn in 8,192 tokens."""
    expect(isinstance(answer, int), f"a pair's index is a whole number, not {answer!r}.")
    theta = frequencies(128, 500_000.0)
    first = int((8192 * theta < 2 * math.pi).nonzero()[0])
    wrong = {
        2 * first: "that is the dimension 2i; the question asks for the pair i.",
        int((8192 * frequencies(128) < 2 * math.pi).nonzero()[0]): "that is the pair for base 10,000.",
        int((8192 * theta < 1).nonzero()[0]): "that pair does not make one radian; a turn is 2π radians.",
        first + 1: "off by one: pairs are counted from 0, and there is an earlier one.",
    }
    expect(answer not in wrong, wrong.get(answer, ""))
    expect(0 <= answer < 64, f"there are 64 pairs, 0 to 63; {answer} is none of them.")
    turns = 8192 * float(theta[answer]) / (2 * math.pi)
    expect(
        answer == first,
        f"pair {answer} makes {turns:.2f} turns in 8,192 tokens; look for the first pair below 1.",
    )
    return f"pair {first} of 64; from there on, {64 - first} pairs never complete a turn in training."


@exercise
def permute_weights(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Reorder wq so that a model that turns halves gives the scores of one that turned neighbours."""
    heads, d, width = 3, 8, 5
    weight = torch.arange(heads * d * width, dtype=torch.float64).view(heads * d, width)
    mine = answer(weight.clone(), heads)
    expect(isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}.")
    expect(mine.shape == weight.shape, f"the shape must stay {list(weight.shape)}, not {list(mine.shape)}.")
    expect(not torch.equal(mine, weight), "the weights are as they were.")
    right = to_half_split(weight, heads)
    backwards = weight.view(heads, 2, d // 2, width).transpose(1, 2).reshape_as(weight)
    expect(
        not torch.equal(mine, backwards),
        "that is the inverse: it takes half-split weights back to interleaved ones.",
    )
    whole = to_half_split(weight, 1)
    expect(not torch.equal(mine, whole), "rows moved from one head to another: permute within each head.")
    expect(
        torch.equal(mine.sort(0).values, weight.sort(0).values),
        "some rows are lost, doubled or changed: a permutation of rows only moves them.",
    )
    expect(
        torch.equal(mine, right),
        "the rows are in the wrong order: in each head the even dimensions first, then the odd.",
    )
    return "each head's even rows, then its odd rows; both layouts now give the same scores."


@exercise
def renumber_cache(answer: Callable[[Tensor, int, float], Tensor]) -> str:
    """The cache holds rotated keys; move them `by` positions towards 0 without the unrotated keys."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(6, 2, 8, dtype=torch.float64, generator=generator)
    base, by = 10_000.0, 100
    theta = frequencies(8, base)
    at = torch.arange(by, by + 6)
    old, new = (
        rotate_half_split(raw, *tables(p, theta, torch.float64)) for p in (at, at - by)
    )
    mine = answer(old.clone(), by, base)
    expect(isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}.")
    expect(mine.shape == old.shape, f"the shape must stay {list(old.shape)}, not {list(mine.shape)}.")
    wrong = {
        "the keys are where they were.": old,
        "the keys moved away from 0: turn by minus `by`.":
            rotate_half_split(raw, *tables(at + by, theta, torch.float64)),
        "every key was turned back to position 0: all move by the same amount, not each by its own.": raw,
        "these keys are in half-split layout; you turned neighbours.":
            rotate_interleaved(old, *tables(torch.full((6,), -by), theta, torch.float64)),
        "key j was turned by j, not by `by`.":
            rotate_half_split(old, *tables(-torch.arange(6), theta, torch.float64)),
    }
    for words, result in wrong.items():
        expect(not torch.allclose(mine, result), words)
    error = float((mine - new).abs().max())
    expect(error < 1e-9, f"the keys are off by up to {error:.2g} from those rotated at positions 0 to 5.")
    return "rotations compose, so a cached key can be renumbered: one turn by −by for all."


@exercise
def derive_ntk_base(answer: Callable[[int, float, float], float]) -> str:
    """The base for which the last pair turns exactly s times slower and the first as before."""
    for d, base, factor in ((128, 10_000.0, 8.0), (64, 500_000.0, 4.0)):
        mine = float(answer(d, base, factor))
        expect(math.isfinite(mine) and mine > 0, f"the base for d={d} came out as {mine}.")
        got = float(frequencies(d, base)[-1] / frequencies(d, mine)[-1])
        hint = ""
        if math.isclose(mine, base * factor, rel_tol=1e-9):
            hint = " Multiplying the base by s is not enough: the last exponent is −(d−2)/d, not −1."
        elif math.isclose(mine, base * factor ** ((d - 2) / d), rel_tol=1e-9):
            hint = " The exponent is upside down."
        elif math.isclose(mine, base / factor ** (d / (d - 2)), rel_tol=1e-9):
            hint = " That speeds it up."
        expect(
            math.isclose(got, factor, rel_tol=1e-9),
            f"with d={d} the last pair turns {got:.4g} times slower, not {factor:g} times.{hint}",
        )
    return "b·s^(d/(d−2)): the NTK-aware base, as Hugging Face's 'dynamic' scaling computes it."
