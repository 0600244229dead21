"""Give a schedule costs and see when everything happens: who works, who waits, what is held meanwhile."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .schedules import Op, Schedule, ScheduleError, gpipe, interleaved, needs, one_f_one_b

Cost = Mapping[str, float]
Key = tuple[str, int, int]


class Span(NamedTuple):
    """An operation on its rank, from when to when."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What the simulation of a schedule gives: each rank's spans in order, in the costs' unit of time."""

    schedule: Schedule
    spans: list[list[Span]]

    @property
    def total(self) -> float:
        """From the first operation to the end of the last, over all ranks."""
        return max((mine[-1].end for mine in self.spans if mine), default=0.0)

    @property
    def ideal(self) -> float:
        """The work of a rank, averaged over ranks: how long the step would take if nobody ever waited."""
        return sum(span.end - span.start for mine in self.spans for span in mine) / len(self.spans)

    @property
    def bubble(self) -> float:
        """Idle time per rank, in the costs' unit."""
        return self.total - self.ideal

    @property
    def bubble_of_total(self) -> float:
        """Idle time as a share of the step's time (GPipe's way to state it)."""
        return self.bubble / self.total if self.total else 0.0

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time as a share of the work (Megatron's way to state it)."""
        return self.bubble / self.ideal if self.ideal else 0.0


def simulate(schedule: Schedule, cost: Cost, latency: float = 0) -> Timeline:
    """Run the schedule: ranks in their order, ops when their inputs are in.

    Args:
        cost: kind → time of one micro-batch through all layers of a rank; an
            op on one of several chunks takes its share. R defaults to F.
        latency: of a message between ranks; sending does not stop the sender.

    Raises:
        ScheduleError: ranks wait for each other forever; names their ops.
    """
    took = {kind: cost.get(kind, 0.0) / schedule.chunks for kind in "FBRIW"}
    took["R"] = cost.get("R", cost["F"]) / schedule.chunks
    placement, last = schedule.placement, schedule.stages - 1
    recompute, done = schedule.recompute, dict[Key, float]()
    waiting: dict[Key, int] = {}  # what is missing → the rank it holds up
    spans: list[list[Span]] = [[] for _ in schedule.ops]
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        mine, past = schedule.ops[rank], spans[rank]
        clock = past[-1].end if past else 0.0
        while len(past) < len(mine):
            op, absent = mine[len(past)], None
            for key in needs(op, last, recompute):
                if key in done:
                    away = latency if placement[key[1]] != rank else 0
                    clock = max(clock, done[key] + away)
                else:
                    absent = key
            if absent is not None:
                waiting[absent] = rank
                break
            start, clock = clock, clock + took[op.kind]
            past.append(Span(op, start, clock))
            gives = ("I", op.stage, op.micro) if op.kind == "B" else op
            done[gives] = clock
            if gives in waiting:
                ready.append(waiting.pop(gives))
    refuse_deadlock(schedule, spans, waiting)
    return Timeline(schedule, spans)


def refuse_deadlock(schedule: Schedule, spans: list[list[Span]], waiting: Mapping[tuple, int]) -> None:
    stuck = [
        f"rank {rank} stands before {schedule.ops[rank][len(spans[rank])]} and waits for {_spoken(key)}"
        for key, rank in sorted(waiting.items(), key=lambda item: item[1])
    ]
    if stuck:
        raise ScheduleError(f"{schedule.name} never ends: " + "; ".join(stuck))


def _spoken(key: tuple[str, int, int]) -> str:
    kind, stage, micro = key
    return str(Op("B" if kind == "I" else kind, stage, micro))


class Held(NamedTuple):
    """What a rank holds from `time` on: micro-batches with all their activations, and bare stage inputs."""

    time: float
    full: float
    inputs: int


def memory(timeline: Timeline) -> list[list[Held]]:
    """What each rank holds after each change, in order of time.

    `full` counts micro-batches whose activations are all there, in units of one micro-batch through all
    layers of a rank (so a chunk counts 1/chunks). `inputs` counts stage inputs kept for a recomputation. A
    forward takes memory when it starts, a backward (of the weights, if it is split) gives it back when it
    ends.
    """
    recompute, chunks = timeline.schedule.recompute, timeline.schedule.chunks
    curves = []
    for mine in timeline.spans:
        curve, full, inputs = [Held(0.0, 0.0, 0)], 0, 0
        for span in mine:
            kind = span.op.kind
            when = span.end if kind in "BW" else span.start
            if kind in "BW":
                full, inputs = full - 1, inputs - recompute
            elif kind == "F" and recompute:
                inputs += 1
            elif kind in "FR":
                full += 1
            curve.append(Held(when, full / chunks, inputs))
        curves.append(curve)
    return curves


def peaks(timeline: Timeline) -> list[Held]:
    """Each rank's largest `full` and largest `inputs` (`time` is when `full` was first largest)."""
    found = []
    for curve in memory(timeline):
        most = max(curve, key=lambda held: held.full)
        found.append(Held(most.time, most.full, max(held.inputs for held in curve)))
    return found


if __name__ == "__main__":
    for make in (gpipe, one_f_one_b, interleaved):
        began = time.perf_counter()
        line = simulate(make(64, 1024), {"F": 1, "B": 2})
        seconds = time.perf_counter() - began
        print(f"{line.schedule.name}: {sum(map(len, line.spans)):,} operations in {seconds:.2f} s")
