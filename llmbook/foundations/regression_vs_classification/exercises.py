"""Checkers for the exercises on regression and classification."""

from collections.abc import Callable
from math import log
from typing import Any

import torch

from llmbook.kit.exercise import exercise, expect

from .likelihoods import gaussian_nll
from .logit_losses import brier_gradient, cross_entropy_gradient

Tensor = torch.Tensor


@exercise
def two_gradients_by_hand(answer: Any) -> str:
    """[∂CE/∂z, ∂Brier/∂z] for z = (ln 9, 0) and the second class right; two numbers each."""
    z, y = torch.tensor([log(9), 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expect(len(answer) == 2 and all(len(row) == 2 for row in answer), "give two rows of two numbers")
    got = torch.tensor(answer, dtype=torch.float64)
    for name, row, gradient in zip(
        ("cross-entropy", "MSE on probabilities"), got, (cross_entropy_gradient, brier_gradient), strict=True
    ):
        wanted, p = gradient(z, y), z.softmax(-1)
        hint = ""
        if torch.allclose(row, -wanted, atol=1e-3):
            hint = ": the signs are turned round; descent must raise the right logit"
        elif torch.allclose(row, p - torch.tensor([1.0, 0.0]), atol=1e-3):
            hint = ": the right class is the second"
        elif torch.allclose(row, 2 * (p - y) / 2, atol=1e-3):
            hint = ": p − y is the slope by p; the softmax's Jacobian is still missing"
        elif torch.allclose(row, 2 * wanted, atol=1e-3):
            hint = ": the mean over two classes halves it"
        told = ", ".join(f"{value:g}" for value in row.tolist())
        expect(torch.allclose(row, wanted, atol=1e-3), f"the gradient of {name} is not ({told}){hint}")
    return "right: 0.9 against 0.162, for the same mistake."


@exercise
def loss_of_one_logit(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(z, y) → the cross-entropy of one logit per example, z any size, y of 0 or 1; both [n]."""
    z = torch.tensor([0.0, 1.5, -2.0, 30.0, -40.0, 800.0, -800.0], dtype=torch.float64).repeat(2)
    y = torch.tensor([0.0] * 7 + [1.0] * 7, dtype=torch.float64)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    got = answer(z, y)
    expect(
        isinstance(got, Tensor) and got.shape == z.shape,
        f"one loss per example, please: a tensor of shape {list(z.shape)}",
    )
    for one, label, mine, theirs in zip(z.tolist(), y.tolist(), got.tolist(), wanted.tolist(), strict=True):
        case = f"at z = {one:g}, y = {label:g} the loss is {theirs:.6g}, but you gave {mine:.6g}"
        hint = ": p is too near 0 or 1 there, or e^z too large; stay with the logit" if abs(one) >= 30 else ""
        expect(abs(mine - theirs) < 1e-9 * max(1.0, theirs), case + hint)
    return "right, from −800 to 800: softplus(z) − yz."


@exercise
def slope_by_log_variance(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """answer(mean, target, s) → ∂NLL/∂s, element by element, of a Gaussian of variance eˢ; all [n]."""
    mean = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    target = torch.tensor([0.0, 3.0, -1.0, 0.5 + 2**0.5], dtype=torch.float64)
    s = torch.tensor([0.0, -1.0, 1.0, log(2)], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(gaussian_nll(mean, target, s.exp()).sum(), s)
    got = answer(mean, target, s.detach())
    expect(isinstance(got, Tensor) and got.shape == s.shape, f"give a tensor of shape {list(s.shape)}")
    by_variance = wanted * (-s.detach()).exp()
    hint = ""
    if torch.allclose(got, by_variance):
        hint = ": that is the slope by the variance; by s = ln σ² it is σ² times that"
    elif torch.allclose(got, 2 * wanted):
        hint = ": the ½ in front of the bracket belongs to both terms"
    elif torch.allclose(got, -wanted):
        hint = ": the sign is turned round"
    expect(torch.allclose(got, wanted), f"the slopes are {_list(wanted)}, but you gave {_list(got)}{hint}")
    return "right; it is zero exactly where the variance equals the squared error."


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())


@exercise
def two_hot(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(values, centres) → rows of two neighbouring weights whose mean is the value; [n], [K] → [n, K].

    Values beyond the ends count as the end; centres increase, and need not be equally spaced.
    """
    for spots in ((-1.0, 0.0, 1.0, 2.0), (0.0, 1.0, 4.0, 5.0, 9.0)):
        c = torch.tensor(spots, dtype=torch.float64)
        values = torch.tensor([-3.0, -1.0, 0.25, 1.0, 1.75, 3.0, 4.0, 50.0], dtype=torch.float64)
        rows = answer(values, c)
        shape = [len(values), len(c)]
        expect(isinstance(rows, Tensor) and list(rows.shape) == shape, f"the rows should be a tensor {shape}")
        for value, row in zip(values, rows.to(torch.float64), strict=True):
            case = f"value {value:g}, centres {list(spots)}:"
            inside = float(value.clamp(c[0], c[-1]))
            expect((row >= -1e-12).all() and abs(row.sum() - 1) < 1e-9, f"{case} weights ≥ 0 should sum to 1")
            used = (row > 1e-9).nonzero().flatten()
            near = len(used) <= 2 and used[-1] - used[0] <= 1
            expect(near, f"{case} only the two neighbouring centres should have weight")
            expect(abs(row @ c - inside) < 1e-9, f"{case} the mean of your row is {row @ c:.4f}, not {inside:g}")
    return "right: nothing is lost, Σ p_k c_k gives the value back."
