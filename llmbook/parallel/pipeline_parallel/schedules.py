"""Pipeline schedules as data: each rank's list of operations, and which rank holds which stage.

A *stage* is a run of consecutive layers; a *rank* (a process, a GPU) holds one stage, or several (then they are called
chunks). The batch is cut into micro-batches. A schedule says in which order each rank works, and nothing about time:
the simulator adds costs to it, the runtime adds tensors.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that is incomplete, or that would wait forever. The message names the operations."""


class Op(NamedTuple):
    """One piece of work: what, on which stage, for which micro-batch.

    Kinds: F forward, B whole backward, R the forward once more (recomputation); B may be split into I (gradient of
    the stage's input) and W (gradient of its weights), which together replace it.
    """

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro} of stage {self.stage}"


@dataclass(frozen=True)
class Schedule:
    """Who does what, in which order.

    Attributes:
        name: for captions.
        ops: for each rank, its operations in order.
        placement: for each stage, the rank that holds it.

    Raises:
        ScheduleError: an operation is missing, doubled, or on a rank that does not hold its stage.
    """

    name: str
    ops: tuple[tuple[Op, ...], ...]
    placement: tuple[int, ...]

    def __post_init__(self) -> None:
        check_complete(self)

    @property
    def ranks(self) -> int:
        return len(self.ops)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def chunks(self) -> int:
        """Stages per rank: a stage's layers are 1/chunks of its rank's."""
        return max(1, self.stages // self.ranks)

    @property
    def micros(self) -> int:
        return 1 + max((op.micro for ops in self.ops for op in ops), default=-1)

    @property
    def recompute(self) -> bool:
        """Whether a forward drops its activations and an R brings them back."""
        return any(op.kind == "R" for ops in self.ops for op in ops)


def naive(ranks: int) -> Schedule:
    """Model parallelism without micro-batches: the whole batch goes through the stages, one after the other."""
    return replace(gpipe(ranks, 1), name="naive")


def gpipe(ranks: int, micros: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, figure 2c, with micro-batches in ascending order)."""
    _positive(ranks=ranks, micros=micros)
    ops = tuple(
        tuple(Op(kind, rank, micro) for kind in "FB" for micro in range(micros)) for rank in range(ranks)
    )
    return Schedule("GPipe", ops, tuple(range(ranks)))


def one_f_one_b(ranks: int, micros: int) -> Schedule:
    """Forward just often enough to fill the pipeline, then one forward, one backward in turn, then drain.

    PipeDream-Flush (Narayanan et al. 2021, figure 4, top): PipeDream's order inside one batch, with a flush after it.
    """
    _positive(ranks=ranks, micros=micros)
    ops = []
    for rank in range(ranks):
        warmup = min(ranks - 1 - rank, micros)
        mine = [Op("F", rank, micro) for micro in range(warmup)]
        for micro in range(micros):
            if warmup + micro < micros:
                mine.append(Op("F", rank, warmup + micro))
            mine.append(Op("B", rank, micro))
        ops.append(tuple(mine))
    return Schedule("1F1B", tuple(ops), tuple(range(ranks)))


def interleaved(ranks: int, micros: int, chunks: int = 2) -> Schedule:
    """1F1B with several smaller stages on each rank: stage s lives on rank s mod `ranks` (Narayanan et al. 2021, 2.2).

    The order is Megatron's: micro-batches pass in groups of `ranks` through one chunk after the other.

    Raises:
        ValueError: `micros` is not divisible by `ranks`, or `chunks` is below 2.
    """
    _positive(ranks=ranks, micros=micros)
    if micros % ranks:
        raise ValueError(f"interleaving needs micro-batches in groups of {ranks}, one per rank; {micros} do not divide")
    if chunks < 2:
        raise ValueError(f"interleaving needs at least 2 chunks per rank, not {chunks}; with one, use one_f_one_b")
    group, each = ranks * chunks, micros * chunks

    def nth(kind: str, rank: int, n: int) -> Op:
        """The n-th forward (or backward) of a rank: which chunk, and which micro-batch."""
        chunk = n % group // ranks
        micro = n // group * ranks + n % ranks
        return Op(kind, rank + ranks * (chunk if kind == "F" else chunks - 1 - chunk), micro)

    ops = []
    for rank in range(ranks):
        warmup = min((ranks - 1 - rank) * 2 + (chunks - 1) * ranks, each)
        mine = [nth("F", rank, n) for n in range(warmup)]
        for n in range(each):
            if warmup + n < each:
                mine.append(nth("F", rank, warmup + n))
            mine.append(nth("B", rank, n))
        ops.append(tuple(mine))
    return Schedule(f"interleaved 1F1B, {chunks} chunks", tuple(ops), tuple(range(ranks)) * chunks)


def with_recompute(schedule: Schedule) -> Schedule:
    """The same schedule, keeping only each stage's input: an R goes before every backward and brings the rest back.

    R needs no gradient, so it can run while the gradient is still on its way (Huang et al. 2019, section 2.3).
    """
    ops = tuple(
        tuple(new for op in mine for new in ([Op("R", op.stage, op.micro), op] if op.kind in "BI" else [op]))
        for mine in schedule.ops
    )
    return replace(schedule, name=f"{schedule.name}, recomputing", ops=ops)


def needs(op: Op, last: int, recompute: bool = False) -> list[tuple[str, int, int]]:
    """What must be done before `op` may start; `last` is the last stage, "I" stands for a B too (both give it)."""
    kind, stage, micro = op
    if kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    if kind == "R":
        return [("F", stage, micro)]
    if kind == "W":
        return [("I", stage, micro)]
    own = ("R" if recompute else "F", stage, micro)
    return [own, ("I", stage + 1, micro)] if stage < last else [own]


def crossings(schedule: Schedule) -> list[tuple[Op, int]]:
    """Every message of a step: the operation whose result crosses, and the rank it goes to."""
    found = []
    for rank, mine in enumerate(schedule.ops):
        for op in mine:
            to = op.stage + 1 if op.kind == "F" else op.stage - 1
            if op.kind in "FBI" and 0 <= to < schedule.stages and schedule.placement[to] != rank:
                found.append((op, schedule.placement[to]))
    return found


def check_complete(schedule: Schedule) -> None:
    """Every stage sees every micro-batch exactly once forward and once backward, on the rank that holds the stage.

    Raises:
        ScheduleError: names the first operation that is doubled, misplaced or missing.
    """
    seen: set[tuple[str, int, int]] = set()
    for rank, mine in enumerate(schedule.ops):
        for op in mine:
            if op.kind not in ("F", "B", "R", "I", "W"):
                raise ScheduleError(f"rank {rank} has {op}; kinds are F, B, R, I and W")
            if not 0 <= op.stage < schedule.stages or schedule.placement[op.stage] != rank:
                raise ScheduleError(f"rank {rank} has {op}, a stage that it does not hold")
            if op in seen or (op.kind == "B" and ("I", *op[1:]) in seen):
                raise ScheduleError(f"rank {rank} has {op} twice")
            seen.add(op)
            if op.kind == "B":  # a whole backward is both of its halves
                seen.update((("I", *op[1:]), ("W", *op[1:])))
    again = ("R",) if any(kind == "R" for kind, _, _ in seen) else ()
    wanted = len(schedule.placement) * schedule.micros * (3 + len(again))
    if sum(kind != "B" for kind, _, _ in seen) == wanted:
        return
    for stage, rank in enumerate(schedule.placement):
        for micro in range(schedule.micros):
            for kind in ("F", *again, "I", "W"):
                if (kind, stage, micro) not in seen:
                    lost = Op(kind if kind in "FR" or ("I", stage, micro) in seen else "B", stage, micro)
                    raise ScheduleError(f"rank {rank} never does {lost}")


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
