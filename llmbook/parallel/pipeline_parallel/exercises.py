"""Checkers of the pipeline chapter's exercises."""

from typing import Any

from llmbook.kit.exercise import exercise, expect

from .closed_forms import bubble_of_total
from .schedules import Op, Schedule, ScheduleError, one_f_one_b
from .simulate import Timeline, peaks, simulate

COST = {"F": 1.0, "B": 2.0}


@exercise
def enough_micro_batches(answer: Any) -> str:
    """Fewest micro-batches with a bubble of at most 5% of the total on 8 ranks, for 1F1B and for v = 4."""
    expect(
        isinstance(answer, dict) and set(answer) == {"1F1B", "interleaved, v=4"},
        'give a dict with the keys "1F1B" and "interleaved, v=4"',
    )
    for name, chunks in (("1F1B", 1), ("interleaved, v=4", 4)):
        m = answer[name]
        expect(isinstance(m, int) and m > 0, f"{name}: {m!r} is not a number of micro-batches")
        expect(chunks == 1 or m % 8 == 0, f"{name}: {m} micro-batches cannot pass in groups of 8")
        share, step = bubble_of_total(8, m, chunks), 1 if chunks == 1 else 8
        expect(share <= 0.05, f"{name}: with {m} micro-batches the bubble is still {share:.2%} of the total")
        fewer = bubble_of_total(8, m - step, chunks) if m > step else 1.0
        hint = " (5% of the total, not of the ideal)" if name == "1F1B" and m == 140 else ""
        expect(fewer > 0.05, f"{name}: {m - step} micro-batches would do, with {fewer:.2%}{hint}")
    return "right; v = 4 needs about a quarter as many, for four times the messages."


@exercise
def bytes_on_the_wire(answer: Any) -> str:
    """All ranks' bytes per step: p = 8, v = 2, m = 32, micro-batch of 1 × 4,096 tokens × 8,192 wide, bf16."""
    expect(isinstance(answer, int), f"{answer!r} is not a whole number of bytes")
    one = 4096 * 8192 * 2
    total = 2 * (8 * 2 - 1) * 32 * one
    mistakes = {
        total // 2: "only one direction: a gradient of the same size comes back over every boundary",
        2 * (8 - 1) * 32 * one: "this is without interleaving: 2 chunks per rank make 15 boundaries, not 7",
        2 * 8 * 2 * 32 * one: "16 stages have 15 boundaries: nothing leaves the last one",
        total * 2: "bf16 has 2 bytes, not 4",
        one * 2 * 15: "this is for one micro-batch; there are 32",
    }
    expect(answer not in mistakes, mistakes.get(answer, ""))
    expect(answer == total, f"{answer:,} bytes is not 2(pv − 1)·m messages of {one:,} bytes each")
    return f"{total / 1e9:.1f} GB a step, every step."


@exercise
def one_f_one_b_of_a_rank(answer: Any) -> str:
    """`answer(ranks, micros, rank)` → that rank's list of (kind, stage, micro) under 1F1B."""
    expect(callable(answer), "give a function of (ranks, micros, rank)")
    for ranks, micros in ((1, 1), (2, 4), (4, 8), (4, 3), (5, 2)):
        wanted = one_f_one_b(ranks, micros)
        for rank in range(ranks):
            case = f"{ranks} ranks, {micros} micro-batches, rank {rank}"
            mine = [Op(*op) for op in answer(ranks, micros, rank)]
            for micro in range(micros):
                for kind in "FB":
                    count = mine.count(Op(kind, rank, micro))
                    expect(count == 1, f"{case}: {kind}{micro} is there {count} times")
            expect(len(mine) == 2 * micros, f"{case}: {len(mine)} operations, {2 * micros} expected")
            for at, (have, want) in enumerate(zip(mine, wanted.ops[rank], strict=True)):
                expect(have == want, f"{case}: operation {at} is {have}, expected {want}")
    return "the same list as the library's, for every rank."


@exercise
def schedule_under_a_cap(answer: Any) -> str:
    """`answer(ranks, micros, cap)` → each rank's list of ops: at most `cap` micro-batches held, and fast."""
    expect(callable(answer), "give a function of (ranks, micros, cap)")
    for ranks, micros, cap in ((2, 4, 1), (4, 8, 4), (4, 8, 2), (4, 8, 3), (4, 9, 1), (6, 12, 4)):
        case = f"{ranks} ranks, {micros} micro-batches, cap {cap}"
        line = _run(case, answer(ranks, micros, cap), ranks)
        expect(line.schedule.micros == micros, f"{case}: {line.schedule.micros} micro-batches were scheduled")
        for rank, peak in enumerate(peaks(line)):
            expect(peak.full <= cap, f"{case}: rank {rank} holds {peak.full:g} micro-batches at its peak")
        best = simulate(Schedule("", backward_first(ranks, micros, cap), tuple(range(ranks))), COST).total
        expect(line.total <= best + 1e-9, f"{case}: takes {line.total:g} units of time, {best:g} are enough")
    return "within the cap, and as fast as working backward first, always."


def backward_first(ranks: int, micros: int, cap: int) -> tuple[tuple[Op, ...], ...]:
    """A free rank does a backward if one is ready, else a forward unless `cap` are held, else it waits."""
    ops: list[list[Op]] = [[] for _ in range(ranks)]
    free, ends, now = [0] * ranks, dict[tuple[str, int, int], int](), 0
    while any(len(mine) < 2 * micros for mine in ops):
        for rank, mine in enumerate(ops):
            back = sum(op.kind == "B" for op in mine)
            ahead = len(mine) - back
            b_ready = back < ahead and (rank == ranks - 1 or ends.get(("B", rank + 1, back), now + 1) <= now)
            f_ready = ahead < micros and (rank == 0 or ends.get(("F", rank - 1, ahead), now + 1) <= now)
            if free[rank] <= now and (b_ready or (f_ready and ahead - back < cap)):
                op = Op("B", rank, back) if b_ready else Op("F", rank, ahead)
                mine.append(op)
                free[rank] = ends[op] = now + int(COST[op.kind])
        now += 1
    return tuple(map(tuple, ops))


def _run(case: str, ops: Any, ranks: int) -> Timeline:
    """The answer's op lists, simulated; what is wrong with them is said about `case`."""
    lists = tuple(tuple(Op(*op) for op in mine) for mine in ops)
    expect(len(lists) == ranks, f"{case}: {len(lists)} lists for {ranks} ranks")
    problem, line = "", None
    try:
        line = simulate(Schedule("your schedule", lists, tuple(range(ranks))), COST)
    except ScheduleError as error:
        problem = str(error)
    expect(line is not None, f"{case}: {problem}")
    assert line is not None
    return line
