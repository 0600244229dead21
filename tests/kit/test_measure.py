"""Measurements: wrong results are not timed, one bad case stops nothing, nothing is invented without a GPU."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from llmbook.kit import measure


def case(error=0.0, name="copy", run=lambda: torch.ones(4), memory=0, **work):
    made = measure.Work(run, lambda out: (error, 0.1), **{"peers": {"other": lambda: None}, **work})
    return measure.Case(name, {"n": 4}, lambda: made, flops=10**9, bytes=10**6, memory=memory)


def raising(why):
    def call():
        raise why

    return call


def clock(call):
    call()
    return 2.0


def test_rates_follow_from_the_median(monkeypatch):
    monkeypatch.setattr("llmbook.kit.stopwatch.ROUNDS", (5, 5))
    times = iter([9.0, 9.0, 1.0, 4.0, 2.0, 4.0, 3.0, 4.0, 2.0, 4.0, 2.0, 4.0])  # ours, the peer, ours, …
    row = measure.measure(case(), lambda call: next(times))
    assert row["ms"] == 2.0
    assert row["tflops"] == pytest.approx(0.5)  # 1e9 FLOP in 2 ms
    assert row["gbs"] == pytest.approx(0.5)  # 1e6 B in 2 ms
    assert row["peers"]["other"]["ms"] == 4.0
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["repetitions"] == 5


@pytest.mark.parametrize("error", [0.2, float("nan"), float("inf")])
def test_a_wrong_result_is_never_timed(error):
    with pytest.raises(measure.MeasurementError, match=r"allowed 0\.1; not timed"):
        measure.measure(case(error), raising(AssertionError("timed")))
    row = measure.attempt(case(error), clock)
    assert row["status"] == "wrong"
    assert "ms" not in row


@pytest.mark.parametrize("why", [
    RuntimeError("no kernel for this GPU"), NotImplementedError("not yet"), ImportError("No module named 'x'"),
    AssertionError(), ValueError("odd"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("k"), TypeError("t"),
])
def test_a_peer_that_cannot_run_says_why(why):
    row = measure.measure(case(peers={"it": raising(why), "other": lambda: 1}), clock)
    assert row["peers"]["it"] == {"unavailable": str(why) or "AssertionError"}
    assert row["peers"]["other"]["ms"] == 2.0


def test_a_wrong_peer_is_not_timed_and_a_yardstick_is_not_compared():
    def error(out):
        return (0.0 if out == "ours" else out), 0.1

    def timer(call):
        assert call() not in (0.5, float("nan"))
        return 1.0

    work = measure.Work(
        lambda: "ours", error, {"coarse": lambda: 0.3, "wrong": lambda: 0.5, "NaN": lambda: float("nan")},
        {"copy": lambda: 7.0},
    )
    row = measure.measure(replace(case(), make=lambda: work), timer)
    assert row["peers"]["wrong"] == {"wrong": "error 0.5, allowed 0.4; not timed"}
    assert "wrong" in row["peers"]["NaN"]
    assert row["peers"]["coarse"]["ms"] == row["peers"]["copy"]["ms"] == 1.0
    assert list(row["peers"]) == ["coarse", "wrong", "NaN", "copy"]
    assert "wrong: error 0.5" in measure.describe_case(row)


@pytest.mark.parametrize(("why", "status"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "skipped"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "skipped"), (ValueError("odd"), "failed"),
    (AssertionError(), "failed"),
])
@pytest.mark.parametrize("where", ["make", "run", "timing"])
def test_a_case_that_fails_says_why_in_one_line(why, status, where):
    broken = replace(case(), make=raising(why)) if where == "make" else case(run=raising(why))
    timer = clock
    if where == "timing":
        broken, timer = case(), lambda call: raising(why)()
    row = measure.attempt(broken, timer)
    assert row == {"name": "copy", "sizes": {"n": 4}, "status": status, "why": str(why) or "AssertionError"}


def test_an_interrupt_goes_through():
    with pytest.raises(KeyboardInterrupt):
        measure.attempt(case(run=raising(KeyboardInterrupt())), clock)
    with pytest.raises(KeyboardInterrupt):
        measure.attempt(case(peers={"it": raising(KeyboardInterrupt())}), clock)


def test_a_case_without_room_is_skipped_before_it_makes_anything(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda: 4e9)
    row = measure.attempt(replace(case(memory=3_000_000_000), make=raising(AssertionError("made"))), clock)
    assert row["status"] == "skipped"
    assert row["why"] == "needs 4.1 GB of GPU memory, and 4.0 GB are free"
    assert "status" not in measure.attempt(case(memory=2_900_000_000), clock)


def test_memory_is_given_back_before_it_is_looked_at(monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("compiled"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache"))
    monkeypatch.setattr(measure, "free_memory", lambda: done.append("look") or 0)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    measure.attempt(case(), clock)
    assert done == ["cache", "look"]
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    measure.attempt(case(), clock)
    assert done[2:] == ["compiled", "cache", "look"]


def test_a_gpu_that_answers_no_more_fails_each_case_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", raising(RuntimeError("CUDA error: an illegal memory access")))
    assert measure.attempt(case(), clock)["why"] == "CUDA error: an illegal memory access"


def test_a_case_leaves_nothing_to_the_next():
    """Not its tensors, and not those that an exception's frames hold."""
    alive = []

    def make(broken):
        held = torch.ones(100)
        alive.append(weakref.ref(held))

        def run():
            own = held * 2
            alive.append(weakref.ref(own))
            if broken:
                raise ValueError("odd")
            return own

        return measure.Work(run, lambda out: (0.0, float(held.sum())), {"it": lambda: raising(ValueError("odd"))()})

    for broken in (True, False, True):
        measure.attempt(replace(case(), make=lambda broken=broken: make(broken)), clock)
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)


@pytest.fixture
def source(monkeypatch):
    found = {
        "device": "NVIDIA Test 1", "capability": "sm_99", "memory_gb": 1.0, "driver": "1", "cuda": "13", "torch": "2",
        "triton": "3", "python": "3", "date": "2026-01-02", "commit": "abc",
    }
    monkeypatch.setattr(measure, "provenance", lambda: found)
    return found


@pytest.fixture
def gpu(source, monkeypatch):
    monkeypatch.setattr(measure, "gpu_here", lambda: True)


def test_a_record_says_where_it_comes_from_and_is_shown(source, tmp_path, capsys):
    path, bad = measure.record("gpu/copy", [case()], folder=tmp_path, timer=clock)
    assert (path, bad) == (tmp_path / "nvidia-test-1/copy.json", 0)
    assert json.loads(path.read_text(encoding="utf-8"))["cases"][0]["ms"] == 2.0
    capsys.readouterr()
    measure.report("gpu/copy", lambda: [], folder=tmp_path)
    shown = capsys.readouterr().out
    assert "recorded run" in shown
    for fact in ("NVIDIA Test 1", "sm_99", "2026-01-02", "abc", "2.0000 ms"):
        assert fact in shown


def test_a_record_has_the_times_that_are_right_and_the_reasons_for_the_rest(source, tmp_path, capsys):
    cases = [case(), case(1.0, "bad"), case(run=raising(ValueError("odd")), name="odd"),
             case(run=raising(torch.OutOfMemoryError("out of memory")), name="big"), case(name="last")]
    path, bad = measure.record("gpu/copy", cases, folder=tmp_path, timer=clock)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert bad == 2
    assert [row["name"] for row in found["cases"]] == ["copy", "last"]
    ends = {row["name"]: row["status"] for row in found["without"]}
    assert ends == {"bad": "wrong", "odd": "failed", "big": "skipped"}
    assert not any("ms" in row for row in found["without"])
    shown = capsys.readouterr().out
    assert "5 cases: 2 timed, 1 skipped, 1 wrong, 1 failed." in shown
    assert "odd (n=4): failed: odd" in shown
    assert "odd (n=4): failed: odd" in measure.describe(found)


def test_without_any_time_nothing_is_written(source, tmp_path):
    with pytest.raises(measure.MeasurementError, match="nothing was written"):
        measure.record("gpu/copy", [case(1.0)], folder=tmp_path, timer=clock)
    assert not list(tmp_path.rglob("*.json"))


def test_a_report_prints_each_case_as_it_ends(gpu, capsys):
    seen = []

    def second():
        seen.append(capsys.readouterr().out)
        return torch.ones(4)

    measure.report("gpu/copy", lambda: [case(name="first"), case(name="second", run=second)], timer=clock)
    assert "first (n=4)" in seen[0]
    assert "NVIDIA Test 1" in seen[0]
    rest = capsys.readouterr().out
    assert "second (n=4)" in rest
    assert rest.endswith("2 cases: 2 timed.\n")


def test_a_report_ends_with_its_budget_and_says_how_to_have_the_rest(gpu, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 40
        return torch.ones(4)

    def never():
        raise AssertionError("called")

    monkeypatch.setattr("llmbook.kit.stopwatch.ROUNDS", (2, 2))
    cases = [case(name="a", run=slow, peers={"late": never}), case(name="b", run=never)]
    measure.report("gpu/copy", lambda: cases, timer=lambda call: 1.0, budget_s=30)
    shown = capsys.readouterr().out
    assert "late                     unavailable: not run" in shown
    assert "2 cases: 1 timed, 1 left out.\n" in shown
    assert shown.endswith("What did not fit into 30 s was left out; all of it:  python -m llmbook.bench gpu/copy\n")
    now[0] = 0
    measure.report("gpu/copy", lambda: [case(run=slow)], timer=lambda call: 1.0)
    assert "left out" not in capsys.readouterr().out


def test_notes_are_shown():
    row = measure.measure(case(notes=lambda: {"peak MiB": 7}), clock)
    assert "  peak MiB: 7\n" in measure.describe_case(row)


def test_what_was_never_recorded_is_not_measured_yet(tmp_path, capsys):
    measure.report("gpu/copy", lambda: [], folder=tmp_path)
    assert capsys.readouterr().out == (
        "No GPU here, and not measured yet: no recorded run exists for this chapter.\n"
        "On a machine with one:  python -m llmbook.bench gpu/copy\n"
    )


def test_a_bar_is_for_terminals_and_notebooks_alone(monkeypatch):
    assert measure._bar(3) is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = measure._bar(3)
    assert bar.total == 3
    bar.close()
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert measure._bar(3) is None


def test_with_a_bar_the_rows_are_printed_too(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    measure.report("gpu/copy", lambda: [case()], timer=clock)
    assert "2.0000 ms" in capsys.readouterr().out


def test_an_interpreter_beside_a_gpu_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not measure.gpu_here()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert measure.gpu_here()
