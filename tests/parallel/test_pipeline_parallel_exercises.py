"""Each checker accepts its solution and says what is wrong with plausible wrong answers."""

import pytest

from llmbook.parallel.pipeline_parallel import exercises
from llmbook.parallel.pipeline_parallel.schedules import (
    Op,
    gpipe,
    naive,
    one_f_one_b,
)

TOTAL = 2 * 15 * 32 * 4096 * 8192 * 2


def wrong_order(p, m, rank):
    return [(k, rank, i) for k in "FB" for i in range(m)]


def capped_warmup(p, m, cap):
    """1F1B with its warm-up cut to the cap: valid, but it waits for forwards that cannot come."""
    ops = []
    for rank in range(p):
        warm = min(p - 1 - rank, m, cap - 1)
        mine = [Op("F", rank, i) for i in range(warm)]
        for i in range(m):
            mine += [Op("F", rank, warm + i)] if warm + i < m else []
            mine.append(Op("B", rank, i))
        ops.append(mine)
    return ops


@pytest.mark.parametrize(
    ("checker", "right", "wrong"),
    [
        (
            exercises.enough_micro_batches,
            {"1F1B": 133, "interleaved, v=4": 40},
            [{"1F1B": 140, "interleaved, v=4": 40}, {"1F1B": 133, "interleaved, v=4": 34}, {"1F1B": 133},
             {"1F1B": 132, "interleaved, v=4": 40}, {"1F1B": 133, "interleaved, v=4": 48}, 133],
        ),
        (exercises.bytes_on_the_wire, TOTAL,
         [TOTAL // 2, TOTAL * 2, TOTAL / 15 * 7, TOTAL // 15 * 7, TOTAL // 15 * 16, TOTAL // 32, 7]),
        (
            exercises.one_f_one_b_of_a_rank,
            lambda p, m, rank: one_f_one_b(p, m).ops[rank],
            [wrong_order, lambda p, m, rank: one_f_one_b(p, m).ops[0], lambda p, m, rank: [],
             lambda p, m, rank: list(one_f_one_b(p, m).ops[rank])[:-1], lambda p, m: [], 3,
             lambda p, m, rank: [*one_f_one_b(p, m).ops[rank], ("F", rank, m)]],
        ),
        (
            exercises.schedule_under_a_cap,
            exercises.backward_first,
            [lambda p, m, cap: gpipe(p, m).ops, lambda p, m, cap: one_f_one_b(p, m).ops, capped_warmup,
             lambda p, m, cap: [[(k, r, i) for i in range(m) for k in "FB"] for r in range(p)],
             lambda p, m, cap: [[]], lambda p, m, cap: naive(p).ops,
             lambda p, m, cap: [[Op("B", r, 0), Op("F", r, 0)] for r in range(p)]],
        ),
    ],
)
def test_checkers_accept_the_solution_and_reject_wrong_answers(checker, right, wrong):
    assert checker.verdict(right)[0]
    assert checker.verdict(...)[1].startswith("○")
    for answer in wrong:
        verdict, words = checker.verdict(answer)
        assert not verdict
        assert words.startswith("✗")
