"""Moves and strides against PyTorch's own functions and strides, for random shapes, dims and indices."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.foundations.tensor_toolbox import figures, strides
from llmbook.foundations.tensor_toolbox.moves import (
    apply,
    bincount_moves,
    cells,
    gather_moves,
    positions,
    scatter_moves,
    topk_moves,
)


@st.composite
def indexed(draw, smallest=0):
    """x, dim, and an index no longer than x except along dim."""
    shape = draw(st.lists(st.integers(max(smallest, 1), 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    wanted = [draw(st.integers(smallest, 5 if n == dim else size)) for n, size in enumerate(shape)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    return x, dim, torch.randint(shape[dim], wanted, generator=generator)


@given(indexed())
def test_gather_is_its_moves(case):
    x, dim, index = case
    out = apply(gather_moves(index, dim, x.shape[dim]), x, x.new_zeros(index.shape))
    assert torch.equal(out, x.gather(dim, index))


@given(indexed())
def test_scatter_add_is_its_moves(case):
    x, dim, index = case
    source = torch.rand(index.shape, dtype=torch.float64)
    out = apply(scatter_moves(index, dim, x.shape[dim]), source, x, add=True)
    torch.testing.assert_close(out, x.scatter_add(dim, index, source))


@given(indexed(smallest=1))
def test_scatter_is_its_moves_where_no_two_values_want_a_cell(case):
    x, dim, _ = case
    index = x.argsort(dim)  # a permutation along dim
    source = torch.rand(index.shape, dtype=torch.float64)
    out = apply(scatter_moves(index, dim, x.shape[dim]), source, x)
    assert torch.equal(out, x.scatter(dim, index, source))
    assert torch.equal(out.gather(dim, index), source)


@given(indexed())
def test_the_gradient_of_gather_goes_the_same_ways_back(case):
    x, dim, index = case
    weight = torch.rand(index.shape, dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((x.gather(dim, index) * weight).sum(), x)
    moves = scatter_moves(index, dim, x.shape[dim])
    torch.testing.assert_close(gradient, apply(moves, weight, torch.zeros_like(x), add=True))


@given(indexed(smallest=1), st.integers(0, 4))
def test_topk_is_its_moves(case, k):
    x, dim, _ = case
    k = min(k, x.shape[dim])
    found = x.topk(k, dim)
    moves = topk_moves(x, k, dim)
    assert torch.equal(apply(moves, x, torch.zeros_like(found.values)), found.values)
    for move in moves:
        assert move.source[dim] == found.indices[move.target]


def test_topk_of_equals_takes_the_earlier_and_keeps_the_values():
    x = torch.tensor([1.0, 1, 1, 0])
    assert [move.source for move in topk_moves(x, 2, 0)] == [(0,), (1,)]
    assert x.topk(2).values.tolist() == [1, 1]  # which of the equals is PyTorch's own affair


@given(st.lists(st.integers(0, 9), max_size=20))
def test_bincount_is_its_moves(labels):
    labels = torch.tensor(labels, dtype=torch.long)
    ones = torch.ones_like(labels)
    out = apply(bincount_moves(labels), ones, torch.zeros(10, dtype=torch.long), add=True)
    assert torch.equal(out, labels.bincount(minlength=10))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: gather_moves(torch.tensor([[0, 4]]), 1, 4), IndexError, r"index\[0, 1\] is 4, but dimension 1 has 4"),
    (lambda: scatter_moves(torch.tensor([-1]), 0, 4), IndexError, "is -1"),
    (lambda: gather_moves(torch.tensor([1.0]), 0, 4), TypeError, "integers, not torch.float32"),
    (lambda: gather_moves(torch.tensor([True]), 0, 4), TypeError, "bool"),
    (lambda: positions(torch.tensor([1]), 1, 4), IndexError, "dim 1 of an index with 1"),
    (lambda: topk_moves(torch.zeros(2, 3), 4, 1), ValueError, "k = 4 of 3 values along dim 1"),
    (lambda: bincount_moves(torch.tensor([-1])), ValueError, "values ≥ 0"),
    (lambda: bincount_moves(torch.tensor([[1]])), ValueError, "one dimension"),
    (lambda: strides.address(strides.packed((2, 3)), (2, 0)), IndexError, r"no cell \[2, 0\]"),
    (lambda: strides.address(strides.packed((2, 3)), (1,)), IndexError, "no cell"),
    (lambda: strides.expand(strides.packed((2, 3)), (4, 3)), ValueError, "only size 1 expands"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_applying_moves_changes_neither_tensor():
    x, out = torch.arange(3), torch.zeros(3, dtype=torch.long)
    apply(scatter_moves(torch.tensor([2, 1, 0]), 0, 3), x, out)
    assert out.sum() == 0


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def same(layout, view):
    assert layout.shape == tuple(view.shape)
    assert layout.stride == view.stride()
    assert layout.offset == view.storage_offset()
    assert strides.is_contiguous(layout) == view.is_contiguous()
    for cell in cells(layout.shape):
        assert view[cell] == strides.address(layout, cell)


@given(shapes, st.data())
def test_views_have_pytorchs_strides(shape, data):
    """A chain of views of an arange, whose cells hold their own addresses."""
    size = 1
    for n in shape:
        size *= n
    view, layout = torch.arange(size).view(shape), strides.packed(shape)
    same(layout, view)
    for _ in range(data.draw(st.integers(1, 4))):
        dims = st.integers(0, view.ndim - 1)
        kind = data.draw(st.sampled_from(["transpose", "unsqueeze", "expand", "cut"]))
        if kind == "transpose":
            a, b = data.draw(dims), data.draw(dims)
            view, layout = view.transpose(a, b), strides.transpose(layout, a, b)
        elif kind == "unsqueeze" and view.ndim < 5:
            dim = data.draw(st.integers(0, view.ndim))
            view, layout = view.unsqueeze(dim), strides.unsqueeze(layout, dim)
        elif kind == "expand" and view.ndim < 5:
            wanted = [data.draw(st.integers(0, 3)) if n == 1 else n for n in view.shape]
            wanted = [2] * data.draw(st.integers(0, 1)) + wanted
            view, layout = view.expand(wanted), strides.expand(layout, wanted)
        else:
            dim, step = data.draw(dims), data.draw(st.integers(1, 3))
            start = data.draw(st.integers(0, view.shape[dim]))
            stop = data.draw(st.integers(start, view.shape[dim]))
            if start == stop:
                continue  # PyTorch is free to choose the offset of nothing
            picked = (slice(None),) * dim + (slice(start, stop, step),)
            view, layout = view[picked], strides.cut(layout, dim, start, stop, step)
        same(layout, view)


def test_what_the_pictures_draw_is_what_pytorch_does():
    for function in figures.FUNCTIONS:
        for dim in (0, 1):
            source, index, start, moves, add = figures.scene(function, dim)
            out = apply(moves, source, start, add)
            if function == "gather":
                wanted = source.gather(dim, index)
            elif function == "topk":
                wanted = source.topk(2, dim).values
            else:
                wanted = getattr(start.clone(), function)(dim, index, source)
            assert torch.equal(out, wanted), (function, dim)
    x = torch.arange(12).view(3, 4)
    for words, layout in figures.VIEWS.items():
        same(layout, eval(words, {"x": x}))


def test_every_stop_has_a_picture_and_a_sentence_of_its_own():
    drawn = [
        (figures.moving, figures.moving_caption, [
            (f, d, s) for f in figures.FUNCTIONS for d in (0, 1) for s in figures.frames(f, d)]),
        (figures.counting, figures.counting_caption, [(s,) for s in range(len(figures.LABELS) + 1)]),
        (figures.storage, figures.storage_caption, [(v, s) for v in figures.VIEWS for s in figures.view_cells(v)]),
        (figures.routing, figures.routing_caption, [
            (r, k, s) for r in figures.ROUTERS for k in (1, 2, 3) for s in range(figures.STEPS + 1)]),
    ]
    for draw, caption, stops in drawn:
        pictures = {draw(*stop).as_str() for stop in stops}
        sentences = {caption(*stop) for stop in stops}
        assert len(pictures) == len(sentences) == len(stops), draw.__name__
        assert all(words.endswith(".") for words in sentences)


def test_what_a_cell_shows_is_short():
    for function in (positions, gather_moves, scatter_moves, topk_moves, apply, strides.expand, strides.cut):
        assert all(len(line) <= 88 for line in inspect.getsource(function).splitlines())
