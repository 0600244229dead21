"""The chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

import torch
import torch.nn.functional as F

from llmbook.foundations.regression_vs_classification import exercises
from tests.checkers import checker_tests


def two_hot(values, centres):
    values = values.clamp(centres[0], centres[-1])
    right = torch.searchsorted(centres, values).clamp(1, len(centres) - 1)
    low, high = centres[right - 1], centres[right]
    share = ((values - low) / (high - low))[:, None]
    hot = torch.eye(len(centres), dtype=values.dtype)
    return (1 - share) * hot[right - 1] + share * hot[right]


def nearest(values, centres):
    return F.one_hot((values[:, None] - centres).abs().argmin(-1), len(centres)).double()


def by_index(values, centres):
    """Right only for centres that are equally spaced."""
    at = ((values.clamp(centres[0], centres[-1]) - centres[0]) / (centres[1] - centres[0])).clamp(max=len(centres) - 1)
    low = at.floor().long().clamp(max=len(centres) - 2)
    hot = torch.eye(len(centres), dtype=values.dtype)
    share = (at - low)[:, None]
    return (1 - share) * hot[low] + share * hot[low + 1]


SOLUTIONS = {
    "two_gradients_by_hand": [[0.9, -0.9], [0.162, -0.162]],
    "loss_of_one_logit": lambda z, y: F.softplus(z) - y * z,
    "slope_by_log_variance": lambda mean, target, s: 0.5 * (1 - (target - mean) ** 2 / s.exp()),
    "two_hot": two_hot,
}
WRONG = {
    "two_gradients_by_hand": [
        ([[-0.9, 0.9], [-0.162, 0.162]], "signs are turned"),
        ([[-0.1, 0.1], [0.162, -0.162]], "right class is the second"),
        ([[0.9, -0.9], [0.9, -0.9]], "Jacobian is still missing"),
        ([[0.9, -0.9], [0.324, -0.324]], "halves it"),
        ([[0.9, -0.9], [0.081, -0.081]], "is not (0.081"),
        ([0.9, 0.162], "has no len"),
    ],
    "loss_of_one_logit": [
        (lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()), "stay with the logit"),
        (lambda z, y: (1 + z.exp()).log() - y * z, "stay with the logit"),
        (lambda z, y: F.softplus(z), "the loss is"),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, y), "one loss per example"),
    ],
    "slope_by_log_variance": [
        (lambda mean, target, s: 0.5 * (1 - (target - mean) ** 2 / s.exp()) / s.exp(), "slope by the variance"),
        (lambda mean, target, s: 1 - (target - mean) ** 2 / s.exp(), "½ in front"),
        (lambda mean, target, s: -0.5 * (1 - (target - mean) ** 2 / s.exp()), "sign is turned"),
        (lambda mean, target, s: -0.5 * (target - mean) ** 2 / s.exp(), "the slopes are"),
        (lambda mean, target, s: 0.0, "of shape"),
    ],
    "two_hot": [
        (nearest, "the mean of your row"),
        (by_index, "the mean of your row"),
        (lambda v, c: torch.softmax(-((v[:, None] - c) ** 2), -1), "two neighbouring"),
        (lambda v, c: 2 * two_hot(v, c), "sum to 1"),
        (lambda v, c: v, "should be a tensor"),
    ],
}


test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
