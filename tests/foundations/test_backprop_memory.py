"""The memory accounts against PyTorch's saved_tensors_hooks, checkpointing, and what the benchmark runs."""

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.foundations.backprop import benchmark
from llmbook.foundations.backprop.checkpoint import checkpoint, stack
from llmbook.foundations.backprop.engine import Var, mean, relu, total
from llmbook.foundations.backprop.memory import HookCount, Timeline, watching
from llmbook.foundations.backprop.network import Problem, engine_step, timeline, torch_step

D = torch.float64
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.integers(2, 6))


def hooks(problem, every):
    found = HookCount(problem.parameters)
    with found:
        torch_step(problem, every, reentrant=every is not None)
    return found


def is_within(part, whole):
    """Whether `part` can be made from `whole` by leaving out."""
    rest = iter(whole)
    return all(value in rest for value in part)


@given(SIZES, st.sampled_from([None, 1, 2, 3, 7]), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_curve_is_that_of_saved_tensors_hooks(size, every, dtype):
    problem = Problem(*size, dtype=dtype)
    ours, theirs = timeline(problem, every), hooks(problem, every)
    curve = [step.held for step in ours.steps]
    changes = [value for before, value in zip([None, *curve], curve, strict=False) if value != before]
    assert ours.peak == max(theirs.changes)
    assert is_within(changes, theirs.changes)
    # The loss saves three tensors at once, hooks see them one by one; everything else is one change each.
    assert len(theirs.changes) - len(changes) <= 6
    assert theirs.held == 0
    assert all(holding.end >= 0 for holding in ours.holdings)


@given(SIZES, st.sampled_from([1, 2, 3, 7]))
def test_after_forward_as_much_is_held_as_with_torchs_newer_checkpoint(size, every):
    problem = Problem(*size)
    found = HookCount(problem.parameters)
    with found:
        torch_step(problem, every)
    steps = timeline(problem, every).steps
    assert [s.held for s in steps if s.kind == "forward"][-1] == max(found.changes)


@given(SIZES, st.sampled_from([None, 1, 2, 3, 7]))
def test_gradients_are_torchs_with_and_without_checkpoints(size, every):
    problem = Problem(*size)
    ours, theirs, plain = engine_step(problem, every), torch_step(problem, every), engine_step(problem)
    for a, b, c in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert torch.equal(a, c)


@given(st.integers(1, 12), st.integers(1, 12))
def test_bytes_of_a_stack_in_closed_form(layers, every):
    """Inputs of the segments, and one segment's own 2 tensors a layer, of which its input is already there."""
    n, d, classes = 3, 4, 5
    tensor, loss = n * d * 8, n * classes * 8 + n * 8 + 8
    found = timeline(Problem(layers, n, d, classes), every)
    segments = -(-layers // every)
    forward = [s.held for s in found.steps if s.kind == "forward"][-1]
    assert forward == (segments + 1) * tensor + loss
    assert timeline(Problem(layers, n, d, classes)).peak == (2 * layers + 1) * tensor + loss
    full = [min(every, layers - i) for i in range(0, layers, every)]
    inside = max((i + 1 + 2 * size - 1) * tensor for i, size in enumerate(full))
    assert found.peak == max(forward, inside)


@given(SIZES, st.sampled_from([None, 1, 2, 7]))
def test_the_bars_add_up_to_the_curve(size, every):
    found = timeline(Problem(*size), every)
    again = [h for h in found.holdings if h.again]
    for i, (step, first) in enumerate(zip(found.steps, found.held_since_forward(), strict=True)):
        assert step.held == first + sum(h.bytes for h in again if h.start <= i <= h.end)


def test_each_operation_again_once():
    steps = timeline(Problem(6, 3, 4, 5), 2).steps
    assert sum(s.kind == "again" for s in steps) == 6 * 3
    assert sum(s.kind == "backward" and s.op == "matmul" for s in steps) == 7


def test_what_a_mean_and_an_addition_hold_is_nothing():
    x = Var(torch.ones(3, 4, dtype=D), True)
    found = Timeline([x.value])
    with watching(found):
        mean(x + x).backward()
    assert found.peak == 0
    assert found.holdings == []


def test_views_of_one_storage_count_once_and_parameters_never():
    x, w = Var(torch.ones(4, 4, dtype=D)), Var(torch.ones(4, 4, dtype=D), True)
    found = Timeline([w.value])
    with watching(found):
        total((x @ w) * (x[:2] @ w)[0]).backward()
    assert found.peak == x.value.nbytes + 2 * 4 * 8 + 4 * 4 * 8


def test_a_checkpoint_of_frozen_layers_and_one_whose_input_needs_no_gradient():
    frozen = Var(torch.ones(2, 2, dtype=D))
    w = Var(torch.full((2, 2), 0.5, dtype=D), True)
    h = checkpoint(lambda x: relu(x @ frozen), Var(torch.ones(2, 2, dtype=D)))
    total(h @ w).backward()
    assert w.grad.tolist() == [[4.0, 4.0]] * 2
    inside = Var(torch.full((2, 2), 0.5, dtype=D), True)
    total(checkpoint(lambda x: x @ inside, Var(torch.ones(2, 2, dtype=D)))).backward()
    assert inside.grad.tolist() == [[2.0, 2.0]] * 2


def test_a_segment_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="1 layer or more, not 0"):
        stack(Var(torch.ones(2, 2)), [relu], 0)


def test_watching_ends_with_an_error_too():
    found = Timeline([])
    with pytest.raises(ValueError), watching(found):
        raise ValueError
    relu(Var(torch.ones(2), True))
    assert found.steps == []


def test_the_benchmarks_cases_count_what_checkpoints_cost_and_save():
    seen = list(benchmark.cases(**benchmark.SMALL))
    assert [case.sizes["checkpoint every"] for case in seen] == [None, 1, 2]
    assert seen[0].flops == 3 * 2 * 16 * 8 * (4 * 8 + 5)
    assert seen[1].flops == seen[2].flops == seen[0].flops + 4 * 2 * 16 * 8 * 8
    assert seen[1].bytes > seen[0].bytes
    for case in seen:
        work = case.make()
        assert list(work.notes()) == ["graph MiB, counted"]  # an allocator's numbers are a GPU's
        error, allowed = work.error([gradient * 1.01 for gradient in work.run()])
        assert error > allowed


def test_the_benchmarks_notes_are_the_graphs_peak():
    """Whole MiB at the size of two layers of 1024 × 1024."""
    work = next(iter(benchmark.cases(size=(2, 1024, 1024, 8), every=(1,)))).make()
    peak = timeline(Problem(2, 1024, 1024, 8, dtype=torch.float32), 1).peak
    assert work.notes() == {"graph MiB, counted": round(peak / 2**20)}
    assert peak > 2**20


def test_the_benchmark_reads_memory_once_per_operation():
    problem = Problem(3, 4, 4, 5)
    readings = benchmark.by_step(lambda: engine_step(problem, 2), count().__next__)
    assert [op for op, _ in readings] == [s.op for s in timeline(problem, 2).steps]
    assert [value for _, value in readings] == list(range(len(readings)))
