"""Checkers for the toolbox chapter's exercises."""

from collections.abc import Callable
from typing import Any

import torch

from llmbook.kit.exercise import exercise, expect

Tensor = torch.Tensor


@exercise
def inverse_permutation(answer: Callable[[Tensor], Tensor]) -> str:
    """answer(p) → q with q[p[i]] = i; p: a permutation of 0 … n-1, int64 [n]."""
    for order in ([0], [1, 0], [2, 0, 1], [3, 1, 4, 0, 2], list(range(7, -1, -1)), []):
        p = torch.tensor(order, dtype=torch.long)
        kept = p.clone()
        q = answer(p)
        expect(torch.equal(p, kept), f"p = {order} was changed; write to a new tensor")
        shaped = isinstance(q, Tensor) and q.shape == p.shape
        expect(shaped, f"for p = {order} the answer is a tensor of shape [{len(p)}]")
        expect(q.dtype == torch.long, f"q holds positions: int64, not {q.dtype}")
        wanted = sorted(range(len(order)), key=order.__getitem__)
        hint = ": that is p itself, which is its own inverse only if made of swaps" if q.tolist() == order else ""
        expect(q.tolist() == wanted, f"for p = {order} the inverse is {wanted}, but you gave {q.tolist()}{hint}")
    return "right: x.gather(0, p).gather(0, q) is x again."


@exercise
def strides_of_a_view(answer: Any) -> str:
    """x = torch.zeros(2, 3, 4, 5); the strides of x.transpose(1, 3)[:, ::2]."""
    view = torch.zeros(2, 3, 4, 5).transpose(1, 3)[:, ::2]
    expect(
        isinstance(answer, (tuple, list, torch.Size)) and len(answer) == 4,
        f"{answer!r}: the view has four dimensions, so four strides",
    )
    given = tuple(answer)
    mistakes = {
        (60, 20, 5, 1): "those are x's own; transpose exchanges two of them",
        (60, 1, 5, 20): "that is the transpose; ::2 takes two steps at a time along dimension 1",
        (60, 20, 5, 2): "::2 is along dimension 1 of the transpose, which was dimension 3 of x",
        (60, 40, 5, 1): "the slice comes after the transpose: dimension 1 now steps by x's last stride",
        tuple(view.shape): "that is the view's shape",
        tuple(view.contiguous().stride()): "those are the strides of a copy; a view keeps the storage of x",
    }
    expect(given not in mistakes, mistakes.get(given, ""))
    expect(given == view.stride(), f"{given}: begin with x's strides, (60, 20, 5, 1), exchange two, double one")
    return f"{given}, and no byte was moved."


@exercise
def within_capacity(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """answer(chosen, experts, capacity) → which tokens find a place; chosen: [T], int64; bool [T]."""
    cases: tuple[tuple[list[int], int, int], ...] = (
        ([0, 0, 0, 1], 2, 2), ([1, 0, 1, 1, 0, 2, 1], 4, 2), ([2, 2, 2], 3, 1), ([0, 1, 2, 0, 1, 2], 3, 5),
        ([1, 1], 2, 0), ([], 3, 2),
    )
    for chosen, experts, capacity in cases:
        seen, wanted = [0] * experts, []
        for expert in chosen:
            wanted.append(seen[expert] < capacity)
            seen[expert] += 1
        got = answer(torch.tensor(chosen, dtype=torch.long), experts, capacity)
        case = f"chosen {chosen}, capacity {capacity}"
        expect(isinstance(got, Tensor) and got.dtype == torch.bool, f"{case}: the answer is a bool tensor")
        expect(list(got.shape) == [len(chosen)], f"{case}: one answer per token, shape [{len(chosen)}]")
        hint = ""
        if got.sum() < sum(wanted):
            hint = ": an expert takes its first tokens even if more come later"
        elif got.sum() > sum(wanted):
            hint = ": count a token's own place too"
        expect(got.tolist() == wanted, f"{case}: {wanted} find a place, but you gave {got.tolist()}{hint}")
    return "right: first come, first served, without a loop over tokens."
