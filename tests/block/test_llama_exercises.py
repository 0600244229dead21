"""The llama chapter's checkers accept their solutions and reject plausible mistakes."""

import math

import torch

from llmbook.block.llama import exercises
from llmbook.block.llama.config import swiglu_width
from llmbook.block.llama.sample import nucleus
from llmbook.block.rope.rotation import to_half_split, to_interleaved
from tests.checkers import checker_tests


def smallest(p, top_p):
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    total = 0.0
    for token in order:
        if total >= top_p:
            break
        kept[token] = True
        total += float(p[token])
    return kept


SOLUTIONS = {
    "width_of_swiglu": lambda dim, multiple: math.ceil(int(8 * dim / 3) / multiple) * multiple,
    "smallest_set": smallest,
    "rows_for_halves": lambda w, heads: w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape),
    "bits_of_a_byte": lambda nats, width: nats / math.log(2) / width,
}
WRONG = {
    "width_of_swiglu": [
        (lambda dim, multiple: 4 * dim, "needs 11008, but you gave 16384"),
        (lambda dim, multiple: int(8 * dim / 3) // multiple * multiple, "you gave 10752"),
        (lambda dim, multiple: int(8 * dim / 3), "you gave 10922"),
    ],
    "smallest_set": [
        (lambda p, top_p: p >= top_p, "the nucleus at 0.6"),
        (lambda p, top_p: nucleus(p, min(1.0, top_p + 0.2)), "the nucleus at 0.7"),
        (lambda p, top_p: p.cumsum(0) - p < top_p, "the nucleus at 0.7"),
        (lambda p, top_p: nucleus(p, top_p) & (p.argsort().argsort() < 2), "the nucleus at"),
    ],
    "rows_for_halves": [
        (lambda w, heads: w, "differ from Meta's"),
        (lambda w, heads: to_half_split(w, 1), "differ from Meta's"),
        (to_interleaved, "differ from Meta's"),
        (lambda w, heads: w.T, "must stay [12, 4]"),
    ],
    "bits_of_a_byte": [
        (lambda nats, width: nats / width, "but you gave 0.693"),
        (lambda nats, width: nats / math.log(2), "bits per byte, but you gave"),
        (lambda nats, width: nats * math.log(2) / width, "but you gave 0.480"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


def test_the_first_solution_is_metas_rule():
    for dim in range(8, 9000, 88):
        assert SOLUTIONS["width_of_swiglu"](dim, 64) == swiglu_width(dim, 64)
