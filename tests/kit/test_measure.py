"""Measurements: wrong results are not timed, nothing is written without a GPU, nothing is invented."""

import json

import pytest
import torch

from llmbook import bench
from llmbook.kit import measure


def case(error=0.0, **changes):
    values = {
        "name": "copy", "sizes": {"n": 4}, "run": lambda: torch.ones(4), "error": lambda out: (error, 0.1),
        "flops": 10**9, "bytes": 10**6, "peers": {"other": lambda: None}, **changes,
    }
    return measure.Case(**values)


def clock(call):
    call()
    return [1.0, 2.0, 3.0, 2.0, 2.0]


def test_rates_follow_from_the_median():
    row = measure.measure(case(), clock)
    assert row["ms"] == 2.0
    assert row["tflops"] == pytest.approx(0.5)  # 1e9 FLOP in 2 ms
    assert row["gbs"] == pytest.approx(0.5)  # 1e6 B in 2 ms
    assert row["peers"]["other"]["ms"] == 2.0
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]


@pytest.mark.parametrize("error", [0.2, float("nan"), float("inf")])
def test_a_wrong_result_is_never_timed(error):
    def forbidden(call):
        raise AssertionError("timed")

    with pytest.raises(measure.MeasurementError, match="not timed"):
        measure.measure(case(error), forbidden)


def test_a_peer_that_cannot_run_says_why():
    def broken():
        raise RuntimeError("no kernel for this GPU\nmore")

    row = measure.measure(case(peers={"cuDNN": broken}), clock)
    assert row["peers"]["cuDNN"] == {"unavailable": "no kernel for this GPU"}


def test_relative_error_against_numpy_and_nan():
    assert measure.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    assert not measure.relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1e9


@pytest.fixture
def source(monkeypatch):
    found = {
        "device": "NVIDIA Test 1", "capability": "sm_99", "memory_gb": 1.0, "driver": "1", "cuda": "13", "torch": "2",
        "triton": "3", "python": "3", "date": "2026-01-02", "commit": "abc",
    }
    monkeypatch.setattr(measure, "provenance", lambda: found)
    return found


def test_a_record_says_where_it_comes_from_and_is_shown(source, tmp_path, capsys):
    path = measure.record("gpu/copy", [case()], folder=tmp_path, timer=clock)
    assert path == tmp_path / "nvidia-test-1/copy.json"
    assert json.loads(path.read_text())["cases"][0]["ms"] == 2.0
    measure.report("gpu/copy", lambda: [], folder=tmp_path)
    shown = capsys.readouterr().out
    assert "recorded run" in shown
    for fact in ("NVIDIA Test 1", "sm_99", "2026-01-02", "abc", "2.0000 ms"):
        assert fact in shown


def test_a_wrong_case_leaves_no_record(source, tmp_path):
    with pytest.raises(measure.MeasurementError):
        measure.record("gpu/copy", [case(), case(1.0)], folder=tmp_path, timer=clock)
    assert not list(tmp_path.rglob("*.json"))


def test_what_was_never_recorded_is_not_measured_yet(tmp_path, capsys):
    measure.report("gpu/copy", lambda: [], folder=tmp_path)
    assert "not measured yet" in capsys.readouterr().out


def test_bench_without_a_gpu_or_with_a_wrong_name_says_so(capsys):
    assert bench.main([]) == 2
    assert "No GPU here: nothing was measured" in capsys.readouterr().err
    assert bench.main(["gpu/no_such"]) == 2
    assert "no benchmark for gpu/no_such; there are:" in capsys.readouterr().err
    assert bench.main(["--list"]) == 0
    assert "gpu/flash_attention" in capsys.readouterr().out
