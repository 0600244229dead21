"""The checkers take their solutions and tell wrong answers why; the recorded story is one story in three caches."""

import pytest
import torch

from llmbook.block.attention_and_kv_cache import exercises, story
from tests.checkers import checker_tests


def append(pool, table, unused, length, k):
    for t, row in enumerate(k, start=length):
        if t % pool.shape[1] == 0:
            table.append(unused.pop())
        pool[table[t // pool.shape[1]], t % pool.shape[1]] = row


def early(pool, table, unused, length, k):
    append(pool, table, unused, length, k)
    if (length + len(k)) % pool.shape[1] == 0 and len(table) * pool.shape[1] == length + len(k) and unused:
        table.append(unused.pop())


def from_the_start(pool, table, unused, length, k):
    while len(table) * pool.shape[1] < length + len(k):
        table.append(unused.pop())
    for t, row in enumerate(k):
        pool[table[t // pool.shape[1]], t % pool.shape[1]] = row


def keeps_the_page(pool, table, unused, length, k):
    for t, row in enumerate(k, start=length):
        if t % pool.shape[1] == 0:
            table.append(unused[-1])
        pool[table[t // pool.shape[1]], t % pool.shape[1]] = row


def everywhere(pool, table, unused, length, k):
    append(pool, table, unused, length, k)
    pool[1] = 1.0


SOLUTIONS = {
    "bytes_of_a_token": 2 * 64 * 8 * 128 * 2,
    "sequences_beside_the_weights": 59,
    "mask_of_a_chunk": lambda start, new: torch.ones(new, start + new).tril(start).bool(),
    "append_to_pages": append,
}
WRONG = {
    "bytes_of_a_token": [
        (2 * 64 * 8 * 80 * 2, "read head_dim"),
        (64 * 8 * 128 * 2, "missing"),
        (64 * 8 * 128, "two tensors"),
        (2 * 64 * 64 * 128 * 2, "8 KV heads serve all 64"),
        (2 * 8 * 128 * 2, "one layer"),
        (2 * 64 * 128 * 2, "one KV head"),
        (77, "is not 2"),
    ],
    "sequences_beside_the_weights": [
        (74, "weights want their place"), (67, "2 bytes"), (14, "not 32"), (60, "one too many"), (59.5, "whole number"),
        (3, "do not just fill"),
    ],
    "mask_of_a_chunk": [
        (lambda start, new: torch.ones(new, new).tril().bool(), "of shape"),
        (lambda start, new: torch.ones(new, start + new).tril().bool(), "sees key 0 alone"),
        (lambda start, new: ~torch.ones(new, start + new).tril(start).bool(), "not hidden"),
        (lambda start, new: torch.ones(new, start + new).tril(start - 1).bool(), "misses keys"),
        (lambda start, new: torch.ones(new, start + new).bool(), "sees the future"),
        (lambda start, new: torch.ones(new, start + new).tril(start), "True where"),
        (lambda start, new: None, "return a tensor"),
    ],
    "append_to_pages": [
        (lambda pool, table, unused, length, k: None, "need 1 pages"),
        (early, "were taken"),
        (from_the_start, "differ"),
        (keeps_the_page, "lost or doubled"),
        (everywhere, "somebody else"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


def test_all_three_caches_tell_the_same_story():
    for none, static, paged in zip(*(story.play(kind) for kind in ("none", "static", "paged")), strict=True):
        assert none.lengths == static.lengths == paged.lengths
        for b in range(3):
            for mine in (static, paged):
                torch.testing.assert_close(mine.out[b], none.out[b], rtol=0, atol=1e-12)
                last = none.rows[b][len(none.rows[b]) - len(mine.rows[b]) :]
                torch.testing.assert_close(mine.rows[b], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "static", "paged"])
def test_recorded_probabilities_are_rows_of_a_causal_softmax(kind):
    for moment in story.play(kind):
        for rows in moment.rows:
            torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)).double())
            if len(rows):
                assert not rows.triu(1 + rows.shape[1] - len(rows)).any()
