"""Checkers for the matrix calculus chapter's exercises."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmbook.kit.exercise import exercise, expect

from .vjp import jacobian_bytes

Tensor = torch.Tensor


def _numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _compare(got: Any, wanted: Tensor, what: str) -> None:
    """Shape first, then values, in words."""
    expect(isinstance(got, Tensor), f"{what} should be a tensor, not {type(got).__name__}")
    if got.shape != wanted.shape:
        hint = ""
        if wanted.ndim == 2 and got.shape == wanted.T.shape and torch.allclose(got, wanted.T):
            hint = ": that is its transpose, the other layout"
        words = f"{what} should be {list(wanted.shape)}, but yours is {list(got.shape)}{hint}"
        expect(False, words)
    off = float((got - wanted).abs().max())
    hint = ""
    if off > 1e-10 and wanted.ndim == 2 and wanted.shape[0] == wanted.shape[1] and torch.allclose(got, wanted.T):
        hint = ": that is its transpose, the other layout"
    expect(off < 1e-10, f"{what} has the right shape, but is off by {off:.3g}{hint}")


@exercise
def denominator_chain(answer: Callable[[Sequence[Tensor]], Tensor]) -> str:
    """answer(steps) → the chain's derivative; steps in denominator layout [in, out], the first applied first."""
    for n, sizes in enumerate(((2, 3, 4), (3, 3, 3, 3), (5, 1, 2, 4))):
        steps = [_numbers(a, b, seed=10 * n + i) for i, (a, b) in enumerate(pairwise(sizes))]
        wanted = steps[0]
        for step in steps[1:]:
            wanted = wanted @ step
        path = " → ".join(map(str, sizes))
        try:
            got = answer(steps)
        except RuntimeError:
            expect(False, f"for {path}: your factors do not fit; in denominator layout the first step stands leftmost")
        _compare(got, wanted, f"for {path}, the derivative")
    return "right; first step leftmost, and no transpose anywhere."


@exercise
def backward_of_a_matrix_product(answer: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """answer(X, W, G) → (dX, dW) for Y = X W; X [t, n], W [n, m], G = ∂L/∂Y [t, m]."""
    for n, (t, rows, columns) in enumerate(((2, 3, 4), (1, 5, 2), (3, 3, 3))):
        x, w = _numbers(t, rows, seed=n), _numbers(rows, columns, seed=n + 50)
        g = _numbers(t, columns, seed=n + 90)
        case = f"for X [{t}, {rows}] and W [{rows}, {columns}],"
        try:
            got = answer(x, w, g)
        except RuntimeError:
            expect(False, f"{case} your factors do not fit: dX is {[t, rows]} and dW is {[rows, columns]}")
        expect(isinstance(got, tuple) and len(got) == 2, f"{case} give two tensors, dX and dW")
        inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
        wanted = torch.autograd.grad(inputs[0] @ inputs[1], inputs, g)
        for name, mine, theirs in zip(("dX", "dW"), got, wanted, strict=True):
            _compare(mine, theirs, f"{case} {name}")
    return "right; for each of them only one order of factors and transposes fits."


@exercise
def bytes_of_a_weight_jacobian(answer: Any) -> str:
    """Bytes, in bf16, of ∂Y/∂W for Y = X W with X [2048, 4096] and W [4096, 11008]."""
    t, n, m = 2048, 4096, 11008
    wanted = jacobian_bytes((t, m), (n, m), 2)
    expect(isinstance(answer, int), f"{answer!r} is not a whole number of bytes")
    mistakes = {
        wanted // 2: "those are elements; a bf16 takes two bytes",
        2 * wanted: "a bf16 takes two bytes, not four",
        wanted // t: "that is one token's; Y has 2,048 rows",
        2 * n * m: "that is the VJP's result, as large as W; the Jacobian has it for every element of Y",
        2 * t * m * t * n: "that is the derivative by X; the question is about W",
        wanted // m: "every element of Y has a derivative by every element of W, the zeros too",
    }
    expect(answer not in mistakes, mistakes.get(answer, ""))
    expect(answer == wanted, f"{answer:,} is not 2 · (t·m) · (n·m), with t = {t}, n = {n}, m = {m}")
    return f"{answer / 1e15:.2f} PB; the VJP's result is {2 * n * m / 1e6:.0f} MB."


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@exercise
def softmax_vjp(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(p, g) → ∂L/∂x for p = softmax(x), g = ∂L/∂p, both [n], with nothing larger than n built."""
    for n in (200, 3, 1):
        x, g = _numbers(n, seed=n).requires_grad_(), _numbers(n, seed=n + 1)
        p = x.softmax(0)
        (wanted,) = torch.autograd.grad(p, x, g)
        with _Largest() as seen:
            got = answer(p.detach(), g)
        hint = f"for n = {n}, ∂L/∂x"
        if isinstance(got, Tensor) and n > 1 and torch.equal(got, p.detach() * g):
            hint += " (yours is the diagonal part alone)"
        _compare(got, wanted, hint)
        expect(
            seen.elements <= n,
            f"right, but for n = {n} you built a tensor of {seen.elements:,} elements: multiply (diag(p) - ppᵀ)g out "
            "before coding it",
        )
    return "right, in n numbers; attention's backward does this once per row of scores."
