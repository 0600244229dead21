"""Recordings: what is kept is what the function had, line by line."""

import sys

import pytest
import torch

from llmbook.kit.trace import trace


def double_sum(values):
    total = 0
    for value in values:
        total += 2 * value
    return total


def test_each_line_is_kept_with_the_state_after_it():
    recording = trace(double_sum, [1, 2, 3], keep=lambda v: v.get("total"))
    assert recording.result == 12
    ran = [(recording.source[step.line].strip(), step.state) for step in recording.steps]
    assert ran[0] == ("total = 0", 0)
    assert [state for words, state in ran if words.startswith("total +=")] == [2, 6, 12]
    assert ran[-1] == ("return total", 12)


def test_clones_do_not_alias_what_the_function_goes_on_writing():
    def fill(x):
        x[0] = 1.0
        x[1] = 2.0
        return x

    recording = trace(fill, torch.zeros(2), keep=lambda v: v["x"].clone())
    assert [step.state.tolist() for step in recording.steps] == [[1, 0], [1, 2], [1, 2]]


def test_only_the_functions_own_frame_is_recorded():
    def outer():
        return double_sum([5]) + 1

    recording = trace(outer, keep=lambda v: dict(v))
    assert len(recording.steps) == 1


def test_what_the_function_raises_is_raised_and_the_tracer_is_gone():
    def broken():
        raise KeyError("inside")

    before = sys.gettrace()
    with pytest.raises(KeyError, match="inside"):
        trace(broken, keep=dict)
    assert sys.gettrace() is before


def test_a_long_loop_is_refused():
    with pytest.raises(ValueError, match="more than 50 lines"):
        trace(double_sum, range(100), keep=lambda v: None, max_steps=50)
