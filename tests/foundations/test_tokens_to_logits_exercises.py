"""The first chapter's checkers, and what its pictures are drawn from."""

import pytest
import torch
import torch.nn.functional as F

from llmbook.foundations.tokens_to_logits import exercises, figures
from llmbook.foundations.tokens_to_logits.flop import block_flop
from llmbook.foundations.tokens_to_logits.llama import PUBLISHED, Config, Llama
from llmbook.foundations.tokens_to_logits.walks import (
    IGNORED,
    batch,
    flop_per_token,
    matmul_parameters,
    real_block,
    sentence,
    step_memory,
)
from tests.checkers import checker_tests

LOGITS = 4 * 8192 * 128_256


def block(B, S, D, heads, kv, ffn):
    return sum(block_flop(Config(2, D, 1, heads, kv, ffn), B, S).values())


def loss(logits, ids, pad, shift=1, ignore=True, rows=False):
    x, y = (logits[:, :-1], ids[:, 1:]) if shift == 1 else (logits[:, 1:], ids[:, :-1]) if shift else (logits, ids)
    ignored = pad if ignore else -100
    if rows:
        return torch.stack([F.cross_entropy(a, b, ignore_index=ignored) for a, b in zip(x, y, strict=True)]).mean()
    return F.cross_entropy(x.flatten(0, 1), y.flatten(), ignore_index=ignored)


def pieces(h, W, targets, piece):
    total = 0.0
    for a, b in zip(h.split(piece), targets.split(piece), strict=True):
        total += F.cross_entropy(a @ W.T, b, reduction="sum")
    return total / len(h)


def hoarder(h, W, targets, piece):
    logits = [a @ W.T for a in h.split(piece)]
    return sum(F.cross_entropy(a, b, reduction="sum")
               for a, b in zip(logits, targets.split(piece), strict=True)) / len(h)


SOLUTIONS = {
    "bytes_of_the_logits": LOGITS * 6, "flop_of_a_block": block, "loss_with_shift": loss, "loss_in_pieces": pieces,
}
WRONG = {
    "bytes_of_the_logits": [
        (LOGITS * 2, "comes on top"), (LOGITS * 4, "original is alive too"), (LOGITS * 3, "by 2 and by 4"),
        (LOGITS * 6 // 4, "that is one sequence"), (25.2, "whole number"), (7, "is not B·S·V"),
    ],
    "flop_of_a_block": [
        (lambda *a: block(*a) // 2, "a multiply-add is 2"),
        (lambda B, S, D, h, kv, ffn: block(B, S, D, h, kv, ffn) - 4 * B * S * S * D, "P·V are missing"),
        (lambda B, S, D, h, kv, ffn: block(B, S, D, h, h, ffn), "K and V have only 2 heads"),
        (lambda *a: block(*a) + 1, "the tracer counts"),
    ],
    "loss_with_shift": [
        (lambda *a: loss(*a, shift=0), "its target is token t + 1"),
        (lambda *a: loss(*a, ignore=False), "padding counts"),
        (lambda *a: loss(*a, rows=True), "each token should"),
        (lambda *a: loss(*a, shift=-1), "the wrong way"),
        (lambda *a: loss(*a) * 2, "the loss is"),
        (lambda *a: 3.0, "a tensor of shape []"),
    ],
    "loss_in_pieces": [
        (lambda h, W, y, piece: F.cross_entropy(h @ W.T, y), "saw 40 rows of logits at once; at most 6"),
        (hoarder, "let go of each piece"),
        (lambda h, W, y, piece: torch.stack([F.cross_entropy(a @ W.T, b) for a, b in
                                             zip(h.split(piece), y.split(piece), strict=True)]).mean(), "sum first"),
        (lambda *a: pieces(*a) * 2, "but you gave"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


# ---- what the pictures are drawn from


@pytest.mark.parametrize("heads", [2, 4])
def test_the_walk_shows_the_tensors_of_a_run(heads):
    walk = sentence(heads)
    by_title = {stop.title: stop for stop in walk}
    ids, labels = batch()
    torch.manual_seed(4)
    logits = Llama(Config(12, 16, 1, heads, heads, 24))(ids)
    torch.testing.assert_close(by_title["logits"].value, logits.detach())
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(walk[-1].value, wanted.detach())
    assert by_title["Q, before the split"].spec.shape == (2, 6, 16)
    assert by_title["Q, split into heads"].spec.shape == (2, heads, 6, 16 // heads)
    assert by_title["Q, split into heads"].op.view
    p = by_title["P, attention weights"]
    assert p.spec.shape == (2, heads, 6, 6)
    torch.testing.assert_close(p.value.sum(-1), torch.ones(2, heads, 6))
    assert not p.value.triu(1).any()
    torch.testing.assert_close(by_title["log-probabilities"].value, logits.detach().log_softmax(-1).flatten(0, 1))
    assert sum(stop.flop for stop in walk) == sum(block_flop(Config(12, 16, 1, heads, heads, 24), 2, 6).values()) \
        + 2 * 12 * 16 * 12
    for stop in walk:
        assert stop.spec.shape == stop.value.shape


def test_a_block_at_real_sizes():
    shapes = {size.title: size.spec for size in real_block(8, 1024, 2048, 16, 32_000)}
    assert shapes["S, scores"].shape == (8, 16, 1024, 1024)
    assert shapes["logits"].bytes == 8 * 1024 * 32_000 * 2
    assert shapes["log-probabilities"].bytes == 8 * 1024 * 32_000 * 4


def test_parameters_that_multiply_and_their_flop():
    c = PUBLISHED["Llama-3-8B"]
    assert matmul_parameters("Llama-3-8B") == 8_030_261_248 - c.vocab * c.dim
    norms = (2 * c.layers + 1) * c.dim
    assert sum(flop_per_token("Llama-3-8B", 100).values()) == (
        2 * (matmul_parameters("Llama-3-8B") - norms) + 4 * c.layers * 100 * c.dim
    )


def test_fused_attention_holds_less_and_backward_leaves_the_gradients():
    held = {}
    for attend in ("every tensor", "fused"):
        forward, backward, weights = step_memory(attend, True, 64)
        held[attend] = max(forward)
        assert weights <= backward[-1] < 1.05 * weights
        assert not step_memory(attend, False, 64)[1]
    assert held["fused"] < held["every tensor"]


@pytest.mark.parametrize(("amount", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e15, "2 PB")])
def test_amounts_in_words(amount, words):
    assert figures.human(amount) == words
