"""The chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

import pytest
import torch
import torch.nn.functional as F

from llmbook.foundations.backprop import exercises
from tests.checkers import checker_tests


def p_minus_y(z, labels):
    return (z.softmax(-1) - F.one_hot(labels, z.shape[-1])) / len(z)


def naive_p_minus_y(z, labels):
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    return (p - F.one_hot(labels, z.shape[-1])) / len(z)


def rows(t):
    return t.reshape(-1, t.shape[-1]).sum(0)


def average(t):
    return t.reshape(-1, t.shape[-1]).mean(0)


def inverse(x, eps):
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rms(x, w, eps, g, *, second=1.0, power=3, dv=None):
    r, v, n = inverse(x, eps), g * w, x.shape[-1]
    inner = ((v if dv is None else dv) * x).sum(-1, keepdim=True)
    return r * v - second * x * inner * r**power / n, rows(g * x * r)


def asks(how):
    """RMSNorm's gradients by autograd, in one of the ways that PyTorch offers."""
    def norm(x, w, eps):
        return w * x * inverse(x, eps)

    def answer(x, w, eps, g):
        if how == "vjp":
            return torch.func.vjp(lambda x, w: norm(x, w, eps), x, w)[1](g)
        if how == "attribute":
            x.requires_grad = w.requires_grad = True
        else:
            x, w = x.requires_grad_(), w.requires_grad_()
        if how == "backward":
            norm(x, w, eps).backward(g)
            return x.grad, w.grad
        return torch.autograd.grad(norm(x, w, eps), (x, w), g)

    return answer


def remake(x, w, eps, g):
    x = torch.tensor(x.tolist(), dtype=x.dtype, requires_grad=True)
    return x, w


SOLUTIONS = {
    "what_backward_needs": {"x", "a", "b", "s", "m", "W1", "W2", "W3"},
    "p_minus_y": p_minus_y,
    "gain_backward": lambda x, w, g: (g * w, rows(g * x)),
    "mean_backward": lambda x, g: 2 * x * g / x.shape[-1],
    "scaled_vector_backward": lambda x, r, dr, g: r * g + (g * x).sum(-1, keepdim=True) * dr,
    "inverse_rms_gradient": lambda x, eps: -inverse(x, eps) ** 3 * x / x.shape[-1],
    "rms_norm_backward": rms,
}
ALL = SOLUTIONS["what_backward_needs"]
WRONG = {
    "what_backward_needs": [
        (ALL | {"y"}, "y leaves the block"), (ALL - {"a"}, "silu's slope"), (ALL - {"b"}, "other factor"),
        (ALL - {"W2"}, "g Wᵀ"), (ALL | {"q"}, "no such tensor"), (8, "a set of names"),
    ],
    "p_minus_y": [
        (lambda z, l: p_minus_y(z, l) * len(z), "divides by their number"),
        (lambda z, l: -p_minus_y(z, l), "the sign"),
        (lambda z, l: z.softmax(-1) / len(z), "subtract the labels"),
        (naive_p_minus_y, "NaN: subtract"),
        (lambda z, l: z, "right shape, but is off"),
        (lambda z, l: z[0], "should be [4, 3]"),
        (lambda z, l: torch.autograd.grad(F.cross_entropy(z.requires_grad_(), l), z)[0], "autograd is not to be asked"),
    ],
    "gain_backward": [
        (lambda x, w, g: (g * w, g * x), "sum over the rows"),
        (lambda x, w, g: (g * w, (g * x).reshape(-1, 4).mean(0)), "do not average"),
        (lambda x, w, g: (g * x, rows(g * x)), "by x the factor is w"),
        (lambda x, w, g: (g * w, rows(g)), "right shape"),
        (lambda x, w, g: g * w, "two tensors"),
    ],
    "mean_backward": [
        (lambda x, g: 2 * x * g, "1/n"), (lambda x, g: x * g / 5, "2x"),
        (lambda x, g: (g / 5).expand_as(x), "derivative"), (lambda x, g: g, "should be [5]"),
    ],
    "scaled_vector_backward": [
        (lambda x, r, dr, g: r * g, "a second time"),
        (lambda x, r, dr, g: (g * x).sum(-1, keepdim=True) * dr, "directly, too"),
        (lambda x, r, dr, g: r * g + g * x * dr, "is a sum"),
        (lambda x, r, dr, g: r * g + (g * x).sum() * dr, "one number per row"),
    ],
    "inverse_rms_gradient": [
        (lambda x, eps: -inverse(x, eps) ** 3 * x, "1/n"),
        (lambda x, eps: inverse(x, eps) ** 3 * x / 5, "the sign"),
        (lambda x, eps: -inverse(x, eps) * x / 5, "r³"),
        (lambda x, eps: -2 * inverse(x, eps) ** 3 * x / 5, "cancel"),
        (lambda x, eps: -inverse(x, 0) ** 3 * x / 5, "eps is missing"),
        (lambda x, eps: 0 * x, "is off"),
    ],
    "rms_norm_backward": [
        (lambda x, w, eps, g: rms(x, w, eps, g, second=0), "a second time"),
        (lambda x, w, eps, g: rms(x, w, eps, g, second=x.shape[-1]), "1/n is missing"),
        (lambda x, w, eps, g: rms(x, w, eps, g, second=-1), "is subtracted"),
        (lambda x, w, eps, g: rms(x, w, eps, g, dv=g), "w is missing in the second"),
        (lambda x, w, eps, g: (rms(x, 1, eps, g)[0], rms(x, w, eps, g)[1]), "both terms"),
        (lambda x, w, eps, g: rms(x, w, eps, g, power=1), "r³, not r"),
        (lambda x, w, eps, g: rms(x, w, eps, g, power=2), "not r²"),
        (lambda x, w, eps, g: rms(x, w, 0, g), "is off"),
        (lambda x, w, eps, g: (rms(x, w, eps, g)[0], g * x * inverse(x, eps)), "sum over the rows"),
        (lambda x, w, eps, g: (rms(x, w, eps, g)[0], average(g * x * inverse(x, eps))), "do not average"),
        (lambda x, w, eps, g: (rms(x, w, eps, g)[0], rows(g * x)), "not x"),
        (lambda x, w, eps, g: (rms(x, w, eps, g)[0], rows(g * x * inverse(x, eps)) * w), "does not contain w"),
        (lambda x, w, eps, g: rms(x, w, eps, g)[0], "two tensors"),
        (lambda x, w, eps, g: rms(x, w, eps, g)[::-1], "dx"),
        (asks("grad"), "autograd is not to be asked"),
        (asks("backward"), "autograd is not to be asked"),
        (asks("attribute"), "autograd is not to be asked"),
        (asks("vjp"), "autograd is not to be asked"),
        (remake, "autograd is not to be asked"),
    ],
}

test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


@pytest.mark.parametrize("use", [
    lambda x: x.requires_grad_(), lambda x: setattr(x, "requires_grad", True), lambda x: x.sum().backward(),
    lambda x: torch.autograd.grad(x.sum(), x), lambda x: torch.ones(2, requires_grad=True),
    lambda x: torch.func.grad(torch.sum)(x), lambda x: torch.func.jacrev(torch.sum)(x),
    lambda x: torch.autograd.functional.vjp(torch.sum, x),
    lambda x: torch.autograd.backward(x.sum()),
])
def test_every_way_to_ask_autograd_is_noticed(use):
    with pytest.raises(exercises.Wrong, match="not to be asked"):
        exercises._by_hand(use, torch.ones(2))
    assert exercises._by_hand(lambda x: x.requires_grad, torch.ones(2)) is False
