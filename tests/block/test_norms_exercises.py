"""The checkers accept their solutions and say what is wrong with plausible wrong answers."""

import torch

from llmbook.block.norms import exercises
from tests.checkers import checker_tests

TENSOR = 8192 * 4096 * 2


def centred(t):
    return t - t.mean(-1, keepdim=True)


SOLUTIONS = {
    "bytes_of_a_residual": (5 * TENSOR, 4 * TENSOR),
    "layer_from_rms": lambda rms, grad, x, w: centred(rms(grad, centred(x), w)),
    "running_statistics": lambda mean, var, x, m: (mean.lerp(x.mean(0), m), var.lerp(x.var(0), m)),
    "fold_the_gain": lambda gain, weight: weight * gain,
}
WRONG = {
    "bytes_of_a_residual": [
        ((5 * TENSOR // 2, 4 * TENSOR // 2), "an element in bf16 has 2 bytes"),
        ((5 * TENSOR, 3 * TENSOR), "must still be written once"),
        ((4 * TENSOR, 4 * TENSOR), "reads back the sum"),
        ((5 * TENSOR, 5 * TENSOR), "nobody reads it back"),
        ((6 * TENSOR, 4 * TENSOR), "you count 6 and 4"),
        (5, "two numbers"),
    ],
    "layer_from_rms": [
        (lambda rms, grad, x, w: rms(grad, x, w), "nothing was centred"),
        (lambda rms, grad, x, w: rms(grad, centred(x), w), "its gradient was not"),
        (lambda rms, grad, x, w: centred(rms(grad, x, w)), "given x with its mean"),
        (lambda rms, grad, x, w: centred(rms(centred(grad), centred(x), w)), "off by up to"),
        (lambda rms, grad, x, w: rms(grad, x, w) + rms(grad, x, w), "2 times"),
        (lambda rms, grad, x, w: None, "not NoneType"),
    ],
    "running_statistics": [
        (lambda mean, var, x, m: (mean.lerp(x.mean(0), m), var.lerp(x.var(0, correction=0), m)), "unbiased"),
        (lambda mean, var, x, m: (x.mean(0).lerp(mean, m), var.lerp(x.var(0), m)), "weight of the new batch"),
        (lambda mean, var, x, m: (mean.lerp(x.mean(0), m), var.lerp(x.std(0), m)), "variance is off"),
        (lambda mean, var, x, m: (x.mean(0), x.var(0)), "mean is off"),
    ],
    "fold_the_gain": [
        (lambda gain, weight: weight, "as it was"),
        (lambda gain, weight: weight / gain, "multiply"),
        (lambda gain, weight: weight * gain[:4, None], "column i"),
        (lambda gain, weight: weight.T * gain[:, None], "the shape must stay"),
        (lambda gain, weight: torch.full_like(weight, float("nan")), "differ by up to nan"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
