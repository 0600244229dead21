"""The chapter's checkers, which must tell wrong answers apart, and its explorers."""

import pytest
import torch

from llmbook.block.rope import exercises, figures, rotation
from tests.checkers import explorer_test


def solution_permute(w, heads):
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def solution_renumber(keys, by, base):
    return turned(keys, torch.full((len(keys),), -by), base)


def turned(keys, at, base, rotate=rotation.rotate_half_split):
    theta = rotation.frequencies(keys.shape[-1], base)
    return rotate(keys, *rotation.tables(at, theta, keys.dtype))


ANSWERS = {
    "unfinished_pair": (35, [34, 36, 68, 63, 64, 45, 0, 100, 34.0]),
    "permute_weights": (
        solution_permute,
        [
            lambda w, heads: w, lambda w, heads: w[: len(w) // 2],
            lambda w, heads: rotation.to_interleaved(w, heads), lambda w, heads: rotation.to_half_split(w, 1),
            lambda w, heads: w.flip(0), lambda w, heads: w * 2, lambda w, heads: None,
        ],
    ),
    "renumber_cache": (
        solution_renumber,
        [
            lambda k, by, base: k, lambda k, by, base: k[1:],
            lambda k, by, base: turned(k, torch.full((len(k),), by), base),
            lambda k, by, base: turned(k, -torch.arange(by, by + len(k)), base),
            lambda k, by, base: turned(k, torch.full((len(k),), -by), base, rotation.rotate_interleaved),
            lambda k, by, base: turned(k, -torch.arange(len(k)), base),
            lambda k, by, base: turned(k, torch.full((len(k),), -by), 500.0),
        ],
    ),
    "derive_ntk_base": (
        lambda d, base, s: base * s ** (d / (d - 2)),
        [
            lambda d, base, s: base * s, lambda d, base, s: base * s ** ((d - 2) / d),
            lambda d, base, s: base, lambda d, base, s: base / s ** (d / (d - 2)),
            lambda d, base, s: -base,
        ],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_checkers_accept_the_solution_and_reject_wrong_answers(name):
    check = getattr(exercises, name)
    right, wrong = ANSWERS[name]
    accepted, words = check.verdict(right)
    assert accepted, words
    verdicts = [check.verdict(answer) for answer in wrong]
    assert not any(accepted for accepted, _ in verdicts), verdicts
    assert len({words for _, words in verdicts}) >= 3  # they say what is wrong, not only that it is


test_explorers_draw_their_corners = explorer_test(figures.EXPLORERS)
