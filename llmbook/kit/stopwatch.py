"""Time on a GPU: of the GPU's work alone, from a cold L2, several calls in turn."""

import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Call], float]

FLUSH_BYTES = 256 * 2**20  # more than any L2, so that every repetition reads its inputs from HBM
SHORTEST, LONGEST = 2**21, 2**25  # clock cycles of sleep before a call: about 1 ms, and 16 ms
ROUNDS = (5, 100)  # the fewest and the most repetitions of a call
SECONDS = 0.15  # for each call's repetitions, if the fewest do not take longer


class Stopwatch:
    """Milliseconds of one call by CUDA events.

    The GPU sleeps before the first event, so that the whole call is queued when its time begins: the CPU's launches
    are not measured. Where the GPU woke too early the call is repeated after a longer sleep; a call that waits for the
    GPU itself gets the longest, and its launches stay in its time, as they do in its use.
    """

    def __init__(self) -> None:
        self._cycles: dict[Call, int] = {}

    def __call__(self, call: Call) -> float:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        while True:
            cycles = self._cycles.setdefault(call, SHORTEST)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
            queued = not start.query()  # still asleep
            end.synchronize()
            if queued or cycles >= LONGEST:
                return start.elapsed_time(end)
            self._cycles[call] = 4 * cycles


def reason(why: BaseException) -> str:
    """An exception in one line: the first of its message, with the next where that ends in a colon; or its name."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()] or [type(why).__name__]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told[:200]


def in_turn(calls: dict[str, Call], timer: Timer, must: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of each call, one repetition of each in every round: what drifts meets all of them. Round one warms up.

    A call that raises is left out from there on, and the reason returned; the exception of `must` is raised.
    """
    calls, broken = dict(calls), {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    began, few, many = time.monotonic(), *ROUNDS
    for repetition in range(many + 1):
        if repetition > few and time.monotonic() - began > SECONDS * len(calls):
            break
        for name, call in list(calls.items()):
            try:
                taken = timer(call)
            except Exception as why:
                if name == must:
                    raise
                broken[name] = reason(why)  # not the exception: its frames hold tensors
                del calls[name], times[name]
            else:
                times[name] += [taken] * (repetition > 0)
    return times, broken
