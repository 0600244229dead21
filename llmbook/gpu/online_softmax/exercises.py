"""Checkers for the online_softmax chapter's exercises."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from llmbook.kit.exercise import exercise, expect

Tensor = torch.Tensor
ROW = (1.0, 3.0, 3.0, 2.0)


@exercise
def states_by_hand(answer: Sequence[tuple[float, float]]) -> str:
    """The (m, l) after each element of (1, 3, 3, 2), read one at a time."""
    count = len(answer)
    expect(count == len(ROW), f"the row has {len(ROW)} elements, so there are {len(ROW)} states, not {count}")
    for i, (m, l) in enumerate(answer):
        seen = torch.tensor(ROW[: i + 1], dtype=torch.float64)
        wanted = float(seen.max())
        expect(m == wanted, f"after {seen.tolist()} m is {wanted:g}, the largest so far, not {m:g}")
        right = float((seen - wanted).exp().sum())
        bare = float(sum(math.exp(x - max(ROW[: k + 1])) for k, x in enumerate(ROW[: i + 1])))
        uncorrected = abs(l - bare) < 1e-3 < abs(l - right)
        expect(not uncorrected, f"after {seen.tolist()} l = {l:.4f} is a sum over different maxima: rescale the old l")
        expect(abs(l - right) < 1e-3, f"after {seen.tolist()} l is {right:.4f}, not {l:.4f}")
    return "all four states are right; l lies between 1 and the count."


@exercise
def merge_by_sigmoid(answer: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """answer(o1, lse1, o2, lse2) → (o, lse) for finite lse; o [..., d], lse [...]."""
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 3.0, -40.0, 800.0):
        s = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        s[:, 4:] += shift
        v = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        parts = []
        for keys in (slice(0, 4), slice(4, 6)):
            parts += [s[:, keys].softmax(-1) @ v[keys], s[:, keys].logsumexp(-1)]
        o, lse = answer(*parts)
        expect(lse.shape == (5,), f"lse should have shape [5], one per row, not {list(lse.shape)}")
        finite = bool(torch.isfinite(o).all() and torch.isfinite(lse).all())
        expect(finite, f"with scores {shift:g} apart something is inf or nan: let no exp see a positive number")
        off = float((lse - s.logsumexp(-1)).abs().max())
        expect(off < 1e-9, f"with scores {shift:g} apart lse is off by {off:.3g}: it is the log of a sum of two exps")
        off = float((o - s.softmax(-1) @ v).abs().max())
        expect(off < 1e-9, f"with scores {shift:g} apart o is off by {off:.3g}: which part does σ(lse2 − lse1) weigh?")
    return "one sigmoid weighs both parts, also when they are 800 apart."


@exercise
def top_k_in_one_pass(answer: Callable[[Iterable[Tensor], int], tuple[Tensor, Tensor]]) -> str:
    """answer(blocks, k) → (probabilities, indices) of the k largest of a row that is read once, a block at a time."""
    generator = torch.Generator().manual_seed(1)
    for n, block, k, shift in ((10, 3, 2, 0.0), (64, 16, 5, 0.0), (50, 7, 4, 1e4), (5, 8, 3, -1e4)):
        row = 3 * torch.randn(n, generator=generator, dtype=torch.float64) + shift
        tiles = row.split(block)
        reads: list[int] = []

        def once(tiles: Sequence[Tensor] = tiles, reads: list[int] = reads) -> Iterable[Tensor]:
            for i, tile in enumerate(tiles):
                reads.append(i)
                yield tile.clone()

        p, index = answer(once(), k)
        expect(reads == list(range(len(tiles))), f"read every block once; you read {reads} of {len(tiles)} blocks")
        wanted, at = row.softmax(0).topk(k)
        expect(len(p) == len(index) == k, f"return {k} probabilities and indices, not {len(p)} and {len(index)}")
        expect(bool(torch.isfinite(p).all()), f"with logits near {shift:g} a probability is inf or nan: subtract m")
        same = torch.equal(index, at)
        expect(same, f"indices count from the start of the row: {at.tolist()}, not {index.tolist()}")
        off = float((p - wanted).abs().max())
        expect(off < 1e-9, f"the probabilities are off by {off:.3g}: divide e^(s − m) by the l of the whole row")
    return "exact, and the row was read once."
