"""Checkers for the backprop chapter's exercises; the last five lead, step by step, to RMSNorm's backward pass."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from llmbook.kit.exercise import Wrong, exercise, expect

Tensor = torch.Tensor
EPS = 1e-5
BATCHES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3))


class ByHand(TorchFunctionMode):
    """Inside, asking PyTorch for a gradient is a wrong answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__qualname__", "") + getattr(func, "__name__", "")
        setter = getattr(getattr(func, "__self__", None), "__name__", "")
        asked = kwargs.get("requires_grad") or "requires_grad_" in name or "backward" in name
        if asked or func is torch.autograd.grad or (setter == "requires_grad" and "__set__" in name):
            raise Wrong("autograd is not to be asked here, by requires_grad, backward or autograd.grad: derive it")
        return func(*args, **kwargs)


def _by_hand(answer: Callable[..., Any], *inputs: Any) -> Any:
    """The answer on copies of the inputs, with no way to ask autograd."""
    copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    with ByHand():
        return answer(*copies)


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _off(got: Any, wanted: Tensor, what: str, hints: dict[str, Tensor] | None = None) -> None:
    """Type, shape, known mistakes, values: in this order, in words."""
    expect(isinstance(got, Tensor), f"{what} should be a tensor, not {type(got).__name__}")
    expect(got.shape == wanted.shape, f"{what} should be {list(wanted.shape)}, but yours is {list(got.shape)}")
    error = float((got - wanted).abs().max())
    for hint, mistake in (hints or {}).items():
        close = mistake.shape == wanted.shape and torch.allclose(got, mistake, rtol=1e-9, atol=1e-12)
        expect(not close or error < 1e-10, f"{what} is off by {error:.2g}: {hint}")
    expect(error < 1e-10, f"{what} has the right shape, but is off by {error:.2g}")


def _two(got: Any, case: str) -> tuple[Any, Any]:
    expect(isinstance(got, tuple | list) and len(got) == 2, f"{case}, give two tensors")
    return got[0], got[1]


@exercise
def what_backward_needs(answer: Any) -> str:
    """The set of names of what SwiGLU's backward needs, out of x, a, b, s, m, y and the weights W1, W2, W3."""
    needed = {"x", "a", "b", "s", "m", "W1", "W2", "W3"}
    expect(isinstance(answer, set | list | tuple), f"give a set of names, not {type(answer).__name__}")
    given = set(answer)
    why = {
        "y": "y leaves the block: only what comes next may want it",
        "a": "silu's slope depends on its input a",
        "s": "dL/db is g ∘ s: the product needs its other factor",
        "b": "dL/ds is g ∘ b: the product needs its other factor",
        "m": "dL/dW2 = mᵀ g: a matmul needs its input",
        "x": "dL/dW1 = xᵀ g: a matmul needs its input",
    }
    for name in sorted(given - needed):
        expect(False, f"{name} is not needed; {why.get(name, 'there is no such tensor here')}")
    for name in sorted(needed - given):
        expect(False, f"{name} is missing; {why.get(name, 'the gradient of a matmul by its input is g Wᵀ')}")
    return "right: eight, of which three are parameters. y is the only one that this block need not keep."


@exercise
def p_minus_y(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(z, labels) → ∂L/∂z of the mean cross-entropy; z [n, C], labels [n]."""
    for n, classes, scale in ((4, 3, 1.0), (1, 5, 1.0), (6, 2, 1e4)):
        z, labels = scale * _numbers(n, classes, seed=n), torch.arange(n) % classes
        p, y = z.softmax(-1), F.one_hot(labels, classes)
        leaf = z.clone().requires_grad_()
        F.cross_entropy(leaf, labels).backward()
        assert leaf.grad is not None
        got = _by_hand(answer, z, labels)
        if isinstance(got, Tensor) and got.isnan().any():
            expect(False, f"with logits up to {float(z.abs().max()):.0f} it is NaN: subtract each row's maximum first")
        _off(got, leaf.grad, f"for {n} rows of {classes} logits, ∂L/∂z", {
            "a mean over rows divides by their number": p - y, "that is p; subtract the labels' ones": p / n,
            "the sign is turned": (y - p) / n,
        })
    return "right, and finite at logits of ten thousand."


@exercise
def gain_backward(answer: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """answer(x, w, g) → (dx, dw) of y = w ∘ x; x, g [..., n], w [n]."""
    for seed, batch in enumerate(BATCHES):
        x, g, w = _numbers(*batch, 4, seed=seed), _numbers(*batch, 4, seed=seed + 10), _numbers(4, seed=seed + 20)
        case = f"for x {list(x.shape)} and w [4]"
        dx, dw = _two(_by_hand(answer, x, w, g), case)
        _off(dx, g * w, f"{case}, dx", {"that is g ∘ x; by x the factor is w": g * x, "g is missing": w.expand_as(x)})
        if isinstance(dw, Tensor) and dw.shape == x.shape != w.shape:
            expect(False, f"{case}, dw should be as large as w: each row used the same w, so sum over the rows")
        rows = (g * x).reshape(-1, 4)
        mistakes = {"a copy's gradients add up; do not average": rows.mean(0)}
        _off(dw, rows.sum(0), f"{case}, dw", mistakes if len(rows) > 1 else {})
    return "right: what forward copies, backward sums."


@exercise
def mean_backward(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(x, g) → dx of m = mean(x²) over the last axis; x [..., n], g [..., 1]."""
    for seed, batch in enumerate(BATCHES):
        x, g = _numbers(*batch, 5, seed=seed), _numbers(*batch, 1, seed=seed + 10)
        _off(_by_hand(answer, x, g), 2 * x * g / 5, f"for x {list(x.shape)} and g {list(g.shape)}, dx", {
            "a mean over n passes on 1/n of g": 2 * x * g, "the derivative of x² is 2x": x * g / 5,
            "x² still has a derivative": (g / 5).expand_as(x),
        })
    return "right: what forward sums, backward copies, here times 2x/n."


@exercise
def scaled_vector_backward(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """answer(x, r, dr, g) → dx of u = r(x) · x; x, g [..., n], r [..., 1], dr = ∂r/∂x [..., n]."""
    for seed, batch in enumerate(BATCHES):
        x, g, dr = (_numbers(*batch, 4, seed=seed + 10 * i) for i in range(3))
        r = _numbers(*batch, 1, seed=seed + 30)
        inner = (g * x).sum(-1, keepdim=True)
        _off(_by_hand(answer, x, r, dr, g), r * g + inner * dr, f"for x {list(x.shape)}, dx", {
            "x reaches u a second time, through r": r * g, "x reaches u directly, too: r g is missing": inner * dr,
            "⟨g, x⟩ is a sum: every uᵢ hears of r, so r's gradient collects all of them": r * g + g * x * dr,
            "⟨g, x⟩ is one number per row, not one for all rows": r * g + (g * x).sum() * dr,
        })
    return "right: r g directly, and ⟨g, x⟩ ∂r/∂x through r. Its Jacobian is r I + x (∂r/∂x)ᵀ."


@exercise
def inverse_rms_gradient(answer: Callable[[Tensor, float], Tensor]) -> str:
    """answer(x, eps) → ∂r/∂x of r = 1/sqrt(mean(x²) + eps) over the last axis; x [..., n]."""
    for seed, batch in enumerate(BATCHES):
        x = _numbers(*batch, 5, seed=seed)
        x[..., 0] *= 1e-3
        for eps in (EPS, 0.5):
            r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            got = _by_hand(answer, x, eps)
            bare = x.square().mean(-1, keepdim=True).rsqrt()
            _off(got, -(r**3) * x / 5, f"for x {list(x.shape)} and eps {eps}, ∂r/∂x", {
                "the mean's 1/n is missing": -(r**3) * x, "r falls when |x| grows: the sign": r**3 * x / 5,
                "the power falls from -1/2 to -3/2, so r³": -r * x / 5,
                "the 1/2 of the root and the 2 of the square cancel": -2 * r**3 * x / 5,
                "eps is missing in r": -(bare**3) * x / 5,
            })
    return "right: -r³ x / n."


@exercise
def rms_norm_backward(answer: Callable[[Tensor, Tensor, float, Tensor], Any]) -> str:
    """answer(x, w, eps, g) → (dx, dw) of y = w ∘ x / sqrt(mean(x²) + eps); x, g [..., n], w [n]. By hand."""
    for seed, batch in enumerate((*BATCHES, (0,))):
        for n, eps in ((6, EPS), (3, 0.5), (1, 0.1)):
            x, g, w = _numbers(*batch, n, seed=seed), _numbers(*batch, n, seed=seed + 10), _numbers(n, seed=seed + 20)
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = leaves[1] * leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + eps).rsqrt()
            wanted = torch.autograd.grad(y, leaves, g)
            case = f"for x {list(x.shape)}, w {[n]} and eps {eps}"
            dx, dw = _two(_by_hand(answer, x, w, eps, g), case)
            if x.numel():
                _off(dx, wanted[0], f"{case}, dx", _mistakes(x, w, eps, g) if n > 1 else {})
            if isinstance(dw, Tensor) and dw.shape == x.shape != w.shape:
                expect(False, f"{case}, dw should be as large as w: sum over the rows that shared it")
            r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            rows = (g * x * r).reshape(-1, n)
            several = {"sum over the rows, do not average": rows.mean(0)} if len(rows) > 1 else {}
            _off(dw, wanted[1], f"{case}, dw", several | {
                "w multiplied x · r, not x": (g * x).reshape(-1, n).sum(0), "dw does not contain w": rows.sum(0) * w,
            } if x.numel() else {})
    return "right, derived and not asked for: no autograd was used, and float64 autograd agrees to 1e-10."


def _mistakes(x: Tensor, w: Tensor, eps: float, g: Tensor) -> dict[str, Tensor]:
    """dx with one term wrong, and what to say about it."""
    n = x.shape[-1]
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    v = g * w
    through = x * (v * x).sum(-1, keepdim=True) * r**3
    bare = (g * x).sum(-1, keepdim=True) * x * r**3 / n
    return {
        "x reaches y a second time, through the RMS": r * v,
        "the mean's 1/n is missing in the second term": r * v - through,
        "the second term is subtracted: r falls when |x| grows": r * v + through / n,
        "g reaches x · r through w, so both terms contain g ∘ w": r * g - bare,
        "w is missing in the second term": r * v - bare,
        "the second term needs r³, not r": r * v - through / r**2 / n,
        "the second term needs r³, not r²": r * v - through / r / n,
    }
