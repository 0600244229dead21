"""Time in turn, and the order in which a GPU is asked to sleep, to start and to run."""

import pytest
import torch

from llmbook.kit import stopwatch


class Gpu:
    """Pretends to be one: it wakes after `sleep` cycles, of which the CPU takes `launch` to queue a call."""

    def __init__(self, launch):
        self.launch, self.asked, self.slept = launch, [], 0

    def sleep(self, cycles):
        self.asked.append("sleep")
        self.slept = cycles

    def event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                gpu.asked.append("record")

            def query(self):
                return gpu.slept < gpu.launch

            def synchronize(self):
                gpu.asked.append("wait")

            def elapsed_time(self, end):
                return gpu.slept

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    pretended = Gpu(0)
    monkeypatch.setattr(torch.cuda, "_sleep", pretended.sleep)
    monkeypatch.setattr(torch.cuda, "Event", pretended.event)

    class Flush:
        def zero_(self):
            pretended.asked.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Flush())
    return pretended


def test_the_gpu_sleeps_while_the_call_is_queued(gpu):
    stopwatch.Stopwatch()(lambda: gpu.asked.append("call"))
    assert gpu.asked == ["flush", "sleep", "record", "call", "record", "wait"]


def test_a_slow_launch_gets_a_longer_sleep_and_keeps_it(gpu):
    watch, other = stopwatch.Stopwatch(), lambda: None

    def call():
        gpu.asked.append("call")

    gpu.launch = 3 * stopwatch.SHORTEST
    assert watch(call) == 4 * stopwatch.SHORTEST
    assert gpu.asked.count("call") == 2
    watch(call)
    assert gpu.asked.count("call") == 3
    gpu.launch = 0
    assert watch(other) == stopwatch.SHORTEST  # each call has its own


def test_a_call_that_waits_for_the_gpu_ends_too(gpu):
    gpu.launch = 10**12
    assert stopwatch.Stopwatch()(lambda: None) == stopwatch.LONGEST


def test_calls_are_timed_in_turn_and_the_first_round_is_not_counted(monkeypatch):
    monkeypatch.setattr(stopwatch, "ROUNDS", (3, 3))
    order = []

    def timer(call):
        order.append(call())
        return float(len(order))

    times, broken = stopwatch.in_turn({"a": lambda: "a", "b": lambda: "b"}, timer, must="a")
    assert order == ["a", "b"] * 4
    assert times == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert broken == {}


def test_rounds_end_when_their_time_is_over(monkeypatch):
    now = iter(range(0, 10_000))
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(now) * 0.01)
    times, _ = stopwatch.in_turn({"a": int, "b": int}, lambda call: 1.0, must="a")
    assert 5 < len(times["a"]) == len(times["b"]) < 100
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(now) * 100.0)
    times, _ = stopwatch.in_turn({"a": int}, lambda call: 1.0, must="a")
    assert len(times["a"]) == 5  # slow ones are repeated a few times all the same


def test_a_call_that_breaks_later_leaves_the_others(monkeypatch):
    monkeypatch.setattr(stopwatch, "ROUNDS", (4, 4))
    left = iter([1, 1])

    def fails():
        if next(left, 0) == 0:
            raise AssertionError
        return 1.0

    times, broken = stopwatch.in_turn({"ours": lambda: 2.0, "it": fails}, lambda call: call(), must="ours")
    assert times == {"ours": [2.0] * 4}
    assert broken == {"it": "AssertionError"}
    with pytest.raises(AssertionError):
        stopwatch.in_turn({"it": fails}, lambda call: call(), must="it")


@pytest.mark.parametrize(("why", "line"), [
    (RuntimeError("no kernel for this GPU\nmore"), "no kernel for this GPU"), (KeyError(), "KeyError"),
    (RuntimeError("backend='inductor' raised:\nOutOfResources: shared memory\nmore"),
     "backend='inductor' raised: OutOfResources: shared memory"),
    (RuntimeError("x" * 1000), "x" * 200), (ValueError("\n\n  so \n"), "so"),
])
def test_a_reason_is_one_line(why, line):
    assert stopwatch.reason(why) == line
