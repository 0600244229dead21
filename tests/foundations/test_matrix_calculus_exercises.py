"""The matrix calculus chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

from functools import reduce

import torch

from llmbook.foundations.matrix_calculus import exercises
from tests.checkers import checker_tests

T, N, M = 2048, 4096, 11008
SIZE = 2 * T * M * N * M

SOLUTIONS = {
    "denominator_chain": lambda steps: reduce(torch.matmul, steps),
    "backward_of_a_matrix_product": lambda x, w, g: (g @ w.T, x.T @ g),
    "bytes_of_a_weight_jacobian": SIZE,
    "softmax_vjp": lambda p, g: p * (g - p @ g),
}
WRONG = {
    "denominator_chain": [
        (lambda steps: reduce(torch.matmul, steps[::-1]), "do not fit"),
        (lambda steps: reduce(torch.matmul, steps).T, "the other layout"),
        (lambda steps: reduce(torch.matmul, [s.T for s in steps[::-1]]), "the other layout"),
        (lambda steps: reduce(torch.matmul, [s if len(s) != s.shape[1] else s.T for s in steps]), "but is off"),
        (lambda steps: steps[0], "should be [2, 4]"),
        (lambda steps: None, "should be a tensor"),
    ],
    "backward_of_a_matrix_product": [
        (lambda x, w, g: (g @ w, g.T @ x), "do not fit"),
        (lambda x, w, g: (g @ w.T, g.T @ x), "the other layout"),
        (lambda x, w, g: (g @ w.T, x.T @ g / len(x)), "dW has the right shape"),
        (lambda x, w, g: (g @ (w if w.shape == (3, 3) else w.T), x.T @ g), "dX has the right shape"),
        (lambda x, w, g: x.T @ g, "two tensors"),
        (lambda x, w, g: (x.T @ g, g @ w.T), "dX should be [2, 3]"),
    ],
    "bytes_of_a_weight_jacobian": [
        (SIZE // 2, "takes two bytes"),
        (2 * SIZE, "not four"),
        (SIZE // T, "one token's"),
        (2 * N * M, "the VJP's result"),
        (2 * T * M * T * N, "derivative by X"),
        (SIZE // M, "the zeros too"),
        (12345, "is not 2 ·"),
        (1.5, "not a whole number"),
    ],
    "softmax_vjp": [
        (lambda p, g: (torch.diag(p) - torch.outer(p, p)) @ g, "you built a tensor of 40,000"),
        (lambda p, g: p * g, "the diagonal part alone"),
        (lambda p, g: p * (1 - p) * g, "but is off"),
        (lambda p, g: p - g, "but is off"),
        (lambda p, g: p @ g, "should be [200]"),
    ],
}


test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


def test_no_two_mistakes_about_bytes_are_one_number():
    numbers = [answer for answer, _ in WRONG["bytes_of_a_weight_jacobian"]]
    assert len(set(numbers)) == len(numbers)
    assert SIZE not in numbers
