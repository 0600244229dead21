"""The toolbox chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

import torch

from llmbook.foundations.tensor_toolbox import exercises
from tests.checkers import checker_tests


def places(chosen, experts):
    """How many tokens up to and with each chose its expert."""
    hot = torch.zeros(len(chosen), experts, dtype=torch.long).scatter_(1, chosen.unsqueeze(1), 1)
    return hot.cumsum(0).gather(1, chosen.unsqueeze(1)).squeeze(1)


def written_in_place(p):
    p.copy_(p.argsort())
    return p


SOLUTIONS = {
    "inverse_permutation": lambda p: torch.empty_like(p).scatter_(0, p, torch.arange(len(p))),
    "strides_of_a_view": (60, 2, 5, 20),
    "within_capacity": lambda chosen, experts, capacity: places(chosen, experts) <= capacity,
}
WRONG = {
    "inverse_permutation": [
        (lambda p: p.clone(), "p itself"),
        (lambda p: p.flip(0), "the inverse is"),
        (lambda p: p.gather(0, p), "the inverse is"),
        (lambda p: torch.empty(len(p)).scatter_(0, p, torch.arange(len(p)).float()), "int64"),
        (lambda p: p.argsort().unsqueeze(0), "of shape"),
        (written_in_place, "was changed"),
    ],
    "strides_of_a_view": [
        ((60, 20, 5, 1), "x's own"), ((60, 1, 5, 20), "two steps"), ((60, 20, 5, 2), "dimension 3 of x"),
        ((60, 40, 5, 1), "after the transpose"), ((2, 3, 4, 3), "shape"), ((36, 12, 3, 1), "a copy"),
        ((1, 2, 3, 4), "begin with"), (60, "four dimensions"), ((60, 2, 5), "four dimensions"),
    ],
    "within_capacity": [
        (lambda c, e, n: places(c, e) < n, "takes"), (lambda c, e, n: places(c, e) <= n + 1, "own place"),
        (lambda c, e, n: c.bincount(minlength=e)[c] <= n, "even if more come later"),
        (lambda c, e, n: torch.arange(len(c)) < n * e, "but you gave"),
        (lambda c, e, n: (places(c, e) <= n).long(), "bool tensor"),
        (lambda c, e, n: (places(c, e) <= n).unsqueeze(0), "one answer per token"),
    ],
}


test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
