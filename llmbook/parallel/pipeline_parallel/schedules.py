"""Pipeline schedules as data: each rank's list of operations, and which rank holds which stage.

A *stage* is a run of consecutive layers; a *rank* (a process, a GPU) holds one stage, or several (then they
are called chunks). The batch is cut into micro-batches. A schedule says in which order each rank works, and
nothing about time: the simulator adds costs to it, the runtime adds tensors.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that is incomplete, or that would wait forever. The message names the operations."""


class Op(NamedTuple):
    """One piece of work: what, on which stage, for which micro-batch.

    Kinds: F forward, B whole backward, R the forward once more
    (recomputation). B may be split into I (gradient of the stage's input)
    and W (gradient of its weights), which together replace it.
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
        ScheduleError: an operation is missing, doubled, or on a rank that
            does not hold its stage.
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
        """Stages per rank: a stage has 1/chunks of its rank's layers."""
        return max(1, self.stages // self.ranks)

    @cached_property
    def micros(self) -> int:
        every = (op.micro for mine in self.ops for op in mine)
        return 1 + max(every, default=-1)

    @cached_property
    def recompute(self) -> bool:
        """Whether F drops its activations and an R brings them back."""
        return any(op.kind == "R" for mine in self.ops for op in mine)


def naive(ranks: int) -> Schedule:
    """Model parallelism: the undivided batch, through stage after stage."""
    return replace(gpipe(ranks, 1), name="naive")


def gpipe(ranks: int, micros: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, figure 2c).

    Backwards come in ascending order here, as in torch; the paper's figure
    has them descending, with the same bubble.
    """
    positive(ranks=ranks, micros=micros)
    ops = []
    for rank in range(ranks):
        forwards = [Op("F", rank, micro) for micro in range(micros)]
        backwards = [Op("B", rank, micro) for micro in range(micros)]
        ops.append((*forwards, *backwards))
    return Schedule("GPipe", tuple(ops), tuple(range(ranks)))


def one_f_one_b(ranks: int, micros: int) -> Schedule:
    """Fill the pipeline, then one forward, one backward in turn, then drain.

    This is PipeDream-Flush (Narayanan et al. 2021, figure 4, top):
    PipeDream's order within one batch, and a flush at its end.
    """
    positive(ranks=ranks, micros=micros)
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


def nth(kind: str, n: int, ranks: int, chunks: int, rank: int) -> Op:
    """A rank's n-th forward (or backward, from the last chunk down)."""
    group, within = divmod(n, ranks * chunks)
    chunk, member = divmod(within, ranks)
    if kind == "B":
        chunk = chunks - 1 - chunk
    return Op(kind, chunk * ranks + rank, group * ranks + member)


def interleaved(ranks: int, micros: int, chunks: int = 2) -> Schedule:
    """1F1B with several small stages per rank: stage s is on rank s mod ranks.

    The order is Megatron's (Narayanan et al. 2021, 2.2): micro-batches pass
    in groups of `ranks` through one chunk after the other.

    Raises:
        ValueError: `ranks` does not divide `micros`, or `chunks` is below 2.
    """
    positive(ranks=ranks, micros=micros)
    if micros % ranks:
        raise ValueError(
            f"micro-batches pass in groups of {ranks}, one per rank; "
            f"{micros} do not divide into such groups"
        )
    if chunks < 2:
        raise ValueError(f"interleaving needs 2 chunks or more, not {chunks}")
    ops, each = [], micros * chunks
    for rank in range(ranks):
        warmup = min((ranks - 1 - rank) * 2 + (chunks - 1) * ranks, each)
        mine = [nth("F", n, ranks, chunks, rank) for n in range(warmup)]
        for n in range(each):
            if warmup + n < each:
                mine.append(nth("F", warmup + n, ranks, chunks, rank))
            mine.append(nth("B", n, ranks, chunks, rank))
        ops.append(tuple(mine))
    name = f"interleaved 1F1B, {chunks} chunks"
    return Schedule(name, tuple(ops), tuple(range(ranks)) * chunks)


def with_recompute(schedule: Schedule) -> Schedule:
    """The same order, keeping only stage inputs: R before each backward.

    R needs no gradient, so it can run while the gradient is still on its
    way (Huang et al. 2019, 2.3).
    """
    ops = []
    for mine in schedule.ops:
        new: list[Op] = []
        for op in mine:
            if op.kind in "BI":
                new.append(Op("R", op.stage, op.micro))
            new.append(op)
        ops.append(tuple(new))
    name = f"{schedule.name}, recomputing"
    return replace(schedule, name=name, ops=tuple(ops))


def needs(op: Op, last: int, recompute: bool = False) -> list[tuple[str, int, int]]:
    """What must be done before `op` may start; `last` is the last stage, "I" stands for B too."""
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
    """Every stage sees every micro-batch once forward and once backward, on the rank that holds the stage.

    Raises:
        ScheduleError: names the first operation that is doubled, misplaced or missing.
    """
    seen: dict[str, set[tuple[str, int, int]]] = {kind: set() for kind in "FRBIW"}
    for rank, mine in enumerate(schedule.ops):
        for op in mine:
            if op.kind not in seen:
                raise ScheduleError(f"rank {rank} has {op}; kinds are F, R, B, I and W")
            if not 0 <= op.stage < schedule.stages or schedule.placement[op.stage] != rank:
                raise ScheduleError(f"rank {rank} has {op}, a stage that it does not hold")
            if op in seen[op.kind]:
                raise ScheduleError(f"rank {rank} has {op} twice")
            seen[op.kind].add(op)
    for _, *where in sorted(seen["I"] | seen["W"]):
        if ("B", *where) in seen["B"]:
            raise ScheduleError(f"{Op('B', *where)} is there whole and split")
    count = {kind: len(ops) for kind, ops in seen.items()}
    every = schedule.stages * schedule.micros
    split = count["I"] == count["W"] == every - count["B"]
    if count["F"] == every and split and count["R"] in (0, every):
        return
    for stage, micro in product(range(schedule.stages), range(schedule.micros)):
        whole = ("B", stage, micro) in seen["B"] or not seen["I"]
        for kind in ("F", *"R" * bool(seen["R"]), *("B" if whole else "IW")):
            if (kind, stage, micro) not in seen[kind]:
                rank, lost = schedule.placement[stage], Op(kind, stage, micro)
                raise ScheduleError(f"rank {rank} never does {lost}")


def positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
