"""Each checker takes its solution and tells a wrong answer why it is wrong."""

import math

import pytest
import torch

from llmbook.gpu.online_softmax import exercises

E1, E2 = math.exp(-1), math.exp(-2)
STATES = [(1, 1), (3, E2 + 1), (3, E2 + 2), (3, E2 + 2 + E1)]


def sigmoid_merge(o1, lse1, o2, lse2):
    w = torch.sigmoid(lse2 - lse1)
    return o1 + w[..., None] * (o2 - o1), torch.logaddexp(lse1, lse2)


def top_k(blocks, k):
    m, l, start = torch.tensor(-math.inf), torch.tensor(0.0), 0
    best, where = torch.empty(0), torch.empty(0, dtype=torch.long)
    for tile in blocks:
        new = torch.maximum(m, tile.amax())
        l = l * (m - new).exp() + (tile - new).exp().sum()
        m = new
        both = torch.cat([best.to(tile), tile])
        where = torch.cat([where, start + torch.arange(len(tile))])
        best, at = both.topk(min(k, len(both)))
        where, start = where[at], start + len(tile)
    return (best - m).exp() / l, where


def block_top_k(blocks, k):
    tiles = list(blocks)
    p, at = torch.cat([tile.softmax(0) for tile in tiles]).topk(k)
    return p, at


def local_index(blocks, k):
    p, at = top_k(blocks, k)
    return p, at % 3


def naive_top_k(blocks, k):
    row = torch.cat(list(blocks))
    s, at = row.topk(k)
    return s.exp() / row.exp().sum(), at


def among_k(blocks, k):
    s, at = torch.cat(list(blocks)).topk(k)
    return s.softmax(0), at


def reads_half(blocks, k):
    tile = next(iter(blocks))
    return tile.softmax(0).topk(min(k, len(tile)))


def test_solutions_are_accepted():
    assert exercises.states_by_hand.verdict(STATES)[0]
    assert exercises.merge_by_sigmoid.verdict(sigmoid_merge)[0]
    right, words = exercises.top_k_in_one_pass.verdict(top_k)
    assert right, words
    assert "not attempted" in exercises.states_by_hand.verdict(...)[1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([(1, 1), (3, 2), (3, 3), (3, 3 + E1)], "rescale the old l"),
        ([(3, E2), (3, E2 + 1), (3, E2 + 2), (3, E2 + 2 + E1)], "m is 1, the largest so far, not 3"),
        (STATES[:3], "there are 4 states, not 3"),
        ([*STATES[:3], (2, 1)], "the largest so far, not 2"),
        ([(1, math.e), *STATES[1:]], "l is 1.0000, not 2.7183"),
    ],
)
def test_wrong_states_are_told_why(answer, words):
    right, sentence = exercises.states_by_hand.verdict(answer)
    assert not right
    assert words in sentence


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda o1, a, o2, b: ((o1 + o2) / 2, torch.logaddexp(a, b)), "o is off"),
        (lambda o1, a, o2, b: sigmoid_merge(o1, b, o2, a), "o is off"),
        (lambda o1, a, o2, b: (sigmoid_merge(o1, a, o2, b)[0], torch.maximum(a, b)), "lse is off"),
        (lambda o1, a, o2, b: (sigmoid_merge(o1, a, o2, b)[0], (a.exp() + b.exp()).log()), "inf or nan"),
        (lambda o1, a, o2, b: (sigmoid_merge(o1, a, o2, b)[0], torch.logaddexp(a, b)[:, None]), "shape [5]"),
    ],
)
def test_wrong_merges_are_told_why(answer, words):
    right, sentence = exercises.merge_by_sigmoid.verdict(answer)
    assert not right
    assert words in sentence


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (block_top_k, "indices count"), (local_index, "indices count"), (naive_top_k, "inf or nan"),
        (among_k, "l of the whole row"), (reads_half, "read every block once"),
    ],
)
def test_wrong_top_k_is_told_why(answer, words):
    right, sentence = exercises.top_k_in_one_pass.verdict(answer)
    assert not right
    assert words in sentence, sentence
