"""Comparisons: every number counts, NaN stays, shapes agree, and float64 only where a GPU is quick at it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.kit import compare


def test_relative_error_against_numpy_and_nan():
    assert compare.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    assert not compare.relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1e9


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), (2, 3, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("error", [compare.relative_error, compare.piece_error])
def test_what_would_broadcast_is_refused(error, shape):
    with pytest.raises(ValueError, match=r"the result is \[.*\], but the reference is \[2, 3\]"):
        error(torch.ones(shape), torch.ones(2, 3))


def test_one_wrong_number_among_millions_is_seen():
    right = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[-1] += 1
    assert compare.relative_error(wrong, right) < 1e-3
    assert compare.piece_error(wrong, right) > 0.1
    assert compare.piece_error(right, right) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_fails_every_bound(bad):
    right = torch.ones(3, 4)
    for place in ((0, 0), (2, 3)):
        wrong = right.clone()
        wrong[place] = bad
        assert not compare.piece_error(wrong, right) <= 1e300
        assert not compare.piece_error(right, wrong) <= 1e300


def test_zeros_are_equal_to_zeros_alone():
    assert compare.piece_error(torch.zeros(3), torch.zeros(3)) == 0
    assert compare.piece_error(torch.full((3,), 1e-30), torch.zeros(3)) > 1
    assert compare.piece_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@given(st.lists(st.floats(0, 1e9) | st.just(math.nan), max_size=6))
def test_the_worst_is_the_largest_or_nan(errors):
    found = compare.worst(iter(errors))
    if not errors or any(math.isnan(e) for e in errors):
        assert math.isnan(found)
    else:
        assert found == max(errors)


def test_pieces_are_made_one_after_the_other_and_none_after_a_nan():
    made = []

    def pairs():
        for value in (1.0, math.nan, 1.0):
            made.append(value)
            yield torch.tensor([value]), torch.ones(1)

    assert math.isnan(compare.worst_error(pairs()))
    assert len(made) == 2


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 300))
def test_blocks_cover_every_row_once(rows, each, piece):
    old, compare.PIECE = compare.PIECE, piece
    try:
        parts = list(compare.blocks(rows, each))
    finally:
        compare.PIECE = old
    assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
    assert all((part.stop - part.start) * each <= max(piece, each) for part in parts)


@pytest.mark.parametrize(("sm", "half", "reference"), [
    ((7, 5), torch.float16, torch.float32), ((8, 0), torch.bfloat16, torch.float64),
    ((8, 6), torch.bfloat16, torch.float32), ((8, 9), torch.bfloat16, torch.float32),
    ((9, 0), torch.bfloat16, torch.float64), ((10, 0), torch.bfloat16, torch.float64),
    ((10, 3), torch.bfloat16, torch.float32), ((12, 0), torch.bfloat16, torch.float32),
])
def test_dtypes_by_generation(sm, half, reference, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    gpu = torch.device("cuda")
    assert (compare.half(gpu), compare.reference_dtype(gpu)) == (half, reference)
    assert compare.reference_dtype(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if reference == torch.float32:
        with pytest.raises(ValueError, match="rounded to tf32"):
            compare.reference_dtype(gpu)


def test_a_wide_copy_has_no_graph():
    x = torch.ones(3, requires_grad=True)
    assert compare.wide(x * 2).dtype == torch.float64
    assert not compare.wide(x * 2).requires_grad
