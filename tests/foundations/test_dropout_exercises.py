"""The dropout chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

import torch

from llmbook.foundations.dropout import exercises
from tests.checkers import checker_tests

WIDE, SCORES = 8 * 2048 * 4096, 8 * 32 * 2048 * 2048


def tile(at, p, columns, rows, cols):
    r, c = torch.tensor(list(rows)), torch.tensor(list(cols))
    return at(r[:, None] * columns + c) >= p


def whole_then_cut(at, p, columns, rows, cols):
    mask = at(torch.arange(rows.stop * columns)).view(-1, columns) >= p
    return mask[rows.start :, cols.start : cols.stop]


SOLUTIONS = {
    "noise_of_a_neuron": lambda w, x, p: p / (1 - p) * (w * x).square().sum(),
    "bytes_of_the_masks": 2 * WIDE + SCORES,
    "seeds_of_a_grid": lambda seed, tp, dp: (seed + 65 * dp, seed + 65 * dp + 1 + tp),
    "tile_of_a_mask": tile,
}
WRONG = {
    "noise_of_a_neuron": [
        (lambda w, x, p: p * (1 - p) * (w * x).square().sum(), "without the scale"),
        (lambda w, x, p: p / (1 - p) * (w @ x) ** 2, "variances add"),
        (lambda w, x, p: (p / (1 - p) * (w * x).square().sum()).sqrt(), "standard deviation"),
        (lambda w, x, p: p / (1 - p) * x.square().sum(), "but you gave"),
    ],
    "bytes_of_the_masks": [
        (2 * WIDE, "attention's probabilities"),
        (WIDE + SCORES, "two dropouts on"),
        (SCORES, "come on top"),
        (2 * (2 * WIDE + SCORES), "one byte an element"),
        ((2 * WIDE + SCORES) // 8, "not one bit"),
        (2 * WIDE + 8 * 2048**2, "every one of the 32 heads"),
        (12345, "is not 2·b·s·h"),
        (1.5, "not a whole number"),
    ],
    "seeds_of_a_grid": [
        (lambda seed, tp, dp: (seed, seed + 2718 + tp), "share the seed"),  # Megatron's, along dp
        (lambda seed, tp, dp: (seed + dp, seed + 2718 + tp + dp), "share the seed"),
        (lambda seed, tp, dp: (seed + tp, seed + 2718 + tp), "hold the same activations"),
        (lambda seed, tp, dp: (seed + 64 * dp, seed + 64 * dp + tp), "share the seed"),
        (lambda seed, tp, dp: (seed + dp, seed + dp), "share the seed"),
    ],
    "tile_of_a_mask": [
        (whole_then_cut, "ask for theirs only"),
        (lambda at, p, columns, rows, cols: at(torch.arange(len(rows) * len(cols))).view(len(rows), -1) >= p, "differ"),
        (lambda at, p, columns, rows, cols: ~tile(at, p, columns, rows, cols), "differ"),
        (lambda at, p, columns, rows, cols: tile(at, p, len(cols), rows, cols), "differ"),
        (lambda at, p, columns, rows, cols: tile(at, p, columns, rows, cols).flatten(), "of shape"),
        (lambda at, p, columns, rows, cols: None, "should be a tensor"),
    ],
}


test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
