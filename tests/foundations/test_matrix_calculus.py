"""Shapes, arrangements, closed forms, VJPs and costs, against PyTorch in float64."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vjp
from torch.utils.flop_counter import FlopCounterMode

from llmbook.foundations.matrix_calculus import figures
from llmbook.foundations.matrix_calculus.closed_forms import (
    inner_product_jacobian,
    softmax_jacobian,
    weight_jacobian,
)
from llmbook.foundations.matrix_calculus.layouts import (
    DENOMINATOR,
    NUMERATOR,
    arrange,
    chain,
    derivative,
    derivative_shape,
    vec_shape,
)
from llmbook.foundations.matrix_calculus.vjp import (
    columns_by_jvp,
    jacobian_bytes,
    linear_vjp,
    product_flop,
    rows_by_vjp,
    vjp_bytes,
)

# Forward mode loads decompositions that PyTorch itself still compiles with its deprecated script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

LAYOUTS = (NUMERATOR, DENOMINATOR)
size = st.integers(1, 5)
shape = st.one_of(st.just(()), st.tuples(size), st.tuples(size, size))
seeds = st.integers(0, 2**16)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixing(y, x, seed):
    """A smooth function from x's shape to y's in which everything reads everything."""
    weight = randn(prod(y), prod(x), seed=seed)
    return lambda t: (weight @ t.reshape(-1)).sin().reshape(y)


@given(shape, shape, seeds)
@settings(deadline=None, max_examples=80)
def test_every_entry_is_the_partial_derivative_it_should_be(y, x, seed):
    function, at = mixing(y, x, seed), randn(*x, seed=seed + 1)
    tensor = jacfwd(function)(at)  # not the jacrev that `derivative` calls
    if len(y) + len(x) > 2:
        with pytest.raises(ValueError, match="axes, and a matrix has two"):
            derivative(function, at, NUMERATOR)
        return
    numerator, denominator = (derivative(function, at, layout) for layout in LAYOUTS)
    assert numerator.shape == derivative_shape(y, x, NUMERATOR)
    assert torch.equal(numerator, denominator.T)
    for entry in itertools.product(*map(range, (*y, *x))):
        i, j = entry[: len(y)], entry[len(y) :]
        row, column = {
            (0, 0): (0, 0), (1, 0): (*i, 0), (0, 1): (0, *j), (1, 1): (*i, *j), (2, 0): i, (0, 2): j[::-1],
        }[len(y), len(x)]
        assert abs(numerator[row, column] - tensor[entry]) < 1e-12


def test_a_gradient_in_denominator_layout_has_its_variables_shape():
    weight = randn(2, 3).requires_grad_()
    (weight**3).sum().backward()
    found = derivative(lambda w: (w**3).sum(), weight.detach(), DENOMINATOR)
    assert torch.equal(found, weight.grad)


@given(size, size, seeds)
@settings(deadline=None, max_examples=30)
def test_a_row_times_a_matrix(n, m, seed):
    a, x = randn(n, m, seed=seed), randn(n, seed=seed + 1)
    assert torch.equal(derivative(lambda x: x @ a, x, NUMERATOR), a.T)
    assert torch.equal(derivative(lambda x: x @ a, x, DENOMINATOR), a)


@given(st.lists(size, min_size=2, max_size=5), seeds)
@settings(deadline=None, max_examples=40)
def test_the_chain_rule_in_both_layouts(sizes, seed):
    weights = [randn(b, a, seed=seed + i) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    at = [randn(sizes[0], seed=seed + 99)]
    steps = []
    for weight in weights:
        steps.append(jacrev(lambda x, w=weight: (w @ x).tanh())(at[-1]))
        at.append((weight @ at[-1]).tanh())

    def whole(x):
        for weight in weights:
            x = (weight @ x).tanh()
        return x

    wanted = jacrev(whole)(at[0])
    assert (chain(steps, NUMERATOR) - wanted).abs().max() < 1e-12
    assert (chain([step.T for step in steps], DENOMINATOR) - wanted.T).abs().max() < 1e-12


@given(size, size, seeds)
@settings(deadline=None, max_examples=30)
def test_closed_forms(n, m, seed):
    x, a, b = randn(n, seed=seed), randn(m, n, seed=seed + 1), randn(m, n, seed=seed + 2)
    u, v = (lambda x: (a @ x).tanh()), (lambda x: (b @ x).cos())
    pairs = (
        (torch.diag(x.cos()), torch.sin),
        (softmax_jacobian(x.softmax(0)), lambda x: x.softmax(0)),
        (inner_product_jacobian(u(x), v(x), jacfwd(u)(x), jacfwd(v)(x)), lambda x: (u(x) @ v(x))[None]),
    )
    for ours, function in pairs:
        assert (ours - jacfwd(function)(x)).abs().max() < 1e-12


def test_softmax_at_the_edge_is_finite_and_flat():
    p = torch.tensor([1e4, 0, -1e4], dtype=torch.float64).softmax(0)
    assert torch.equal(softmax_jacobian(p), torch.zeros(3, 3, dtype=torch.float64))


@given(size, size, size, seeds)
@settings(deadline=None, max_examples=30)
def test_a_product_by_its_weights(t, n, m, seed):
    x, w = randn(t, n, seed=seed), randn(n, m, seed=seed + 1)
    found = jacrev(lambda w: x @ w)(w).reshape(vec_shape((t, m), (n, m)))
    assert torch.equal(weight_jacobian(x, m), found)


@given(size, size, seeds)
@settings(deadline=None, max_examples=40)
def test_the_linear_layers_backward(m, n, seed):
    x, w, g = randn(n, seed=seed), randn(m, n, seed=seed + 1), randn(m, seed=seed + 2)
    _, pull = vjp(lambda x, w: w @ x, x, w)
    for ours, theirs in zip(linear_vjp(x, w, g), pull(g), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-12


@given(size, size, seeds)
@settings(deadline=None, max_examples=20)
def test_jacobians_by_passes(m, n, seed):
    function, x = mixing((m,), (n,), seed), randn(n, seed=seed)
    wanted = jacrev(function)(x)
    for way, passes in ((rows_by_vjp, m), (columns_by_jvp, n)):
        found, counted = way(function, x)
        assert counted == passes
        assert (found - wanted).abs().max() < 1e-12


@given(st.lists(size, min_size=2, max_size=6))
@settings(deadline=None, max_examples=40)
def test_flop_are_those_that_pytorch_counts(sizes):
    steps = [torch.ones(b, a) for a, b in itertools.pairwise(sizes)]
    for mode, order in (("forward", steps), ("reverse", steps[::-1])):
        with FlopCounterMode(display=False) as counter:
            product = order[0]
            for step in order[1:]:
                product = step @ product if mode == "forward" else product @ step
        assert counter.get_total_flops() == product_flop(sizes, mode)


@pytest.mark.parametrize(("y", "x"), [((4096,), (4096, 4096)), ((7, 64), (7, 64)), ((), (5,)), ((3,), ())])
def test_bytes_are_those_of_a_tensor(y, x):
    whole = torch.empty((*y, *x), dtype=torch.bfloat16, device="meta")
    assert jacobian_bytes(y, x, 2) == whole.nbytes
    assert vjp_bytes(x, 2) == torch.empty(x, dtype=torch.bfloat16, device="meta").nbytes


@pytest.mark.parametrize(("call", "words"), [
    (lambda: derivative_shape((3,), (2, 3), NUMERATOR), r"a vector \[3\] by a matrix \[2, 3\] has 3 axes"),
    (lambda: derivative_shape((2, 3), (4,), DENOMINATOR), r"a matrix \[2, 3\] by a vector \[4\] has 3 axes"),
    (lambda: derivative_shape((), (2, 3, 4), NUMERATOR), r"\[2, 3, 4\] has 3 axes"),
    (lambda: derivative_shape((), (), "rows"), "not 'rows'"),
    (lambda: arrange(randn(4, 3), (3,), (4,), NUMERATOR), r"is a tensor \[3, 4\], not \[4, 3\]"),
    (lambda: chain([], NUMERATOR), "at least one step"),
    (lambda: chain([randn(3, 4), randn(3, 2)], NUMERATOR), "step 1 gives 3 numbers but step 2 takes 2"),
    (lambda: chain([randn(3, 4), randn(4, 2), randn(3, 1)], DENOMINATOR), "step 2 gives 2 numbers but step 3 takes 3"),
    (lambda: linear_vjp(randn(4), randn(4, 3), randn(4)), r"so x should be \[3\], not \[4\]"),
    (lambda: linear_vjp(randn(3), randn(4, 3), randn(3)), r"so g should be \[4\], not \[3\]"),
    (lambda: inner_product_jacobian(randn(3), randn(2), randn(3, 4), randn(2, 4)), r"v \[2\] and .* u's 3 rows"),
    (lambda: inner_product_jacobian(randn(3), randn(3), randn(2, 4), randn(3, 4)), r"u \[3\] and ∂u/∂x \[2, 4\]"),
    (lambda: inner_product_jacobian(randn(3), randn(3), randn(3, 4), randn(3, 5)), "should have one shape"),
    (lambda: product_flop([3, 4], "sideways"), "not 'sideways'"),
    (lambda: product_flop([3], "forward"), "at least two sizes"),
])
def test_bad_input_is_told_what_was_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(shape, shape)
@settings(deadline=None, max_examples=60)
def test_the_picture_puts_entries_where_the_mechanism_does(y, x):
    for layout in LAYOUTS:
        grid = torch.tensor(figures.entries(y, x, layout))
        flat = grid[..., 0] * prod(x) + grid[..., 1]
        numbers = torch.arange(prod(y) * prod(x))
        if len(y) + len(x) > 2:
            wanted = numbers.view(vec_shape(y, x))
            wanted = wanted if layout == NUMERATOR else wanted.T
        else:
            wanted = arrange(numbers.view((*y, *x)), y, x, layout)
        assert torch.equal(flat, wanted)


EXPLORERS = {
    "shapes": (figures.shapes, figures.shapes_caption, (figures.KINDS, figures.KINDS, figures.LAYOUTS)),
    "fills": (figures.fills, figures.fills_caption, (list(figures.FUNCTIONS), figures.LAYOUTS, (1, 2, 4))),
    "direction": (
        figures.direction, figures.direction_caption, (list(figures.CHAINS), ("reverse", "forward"), (1, 2, 3)),
    ),
    "bytes": (figures.bytes_bars, figures.bytes_caption, (figures.BY, (256, 1024, 4096, 8192), (1, 32, 2048))),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_stop_has_a_picture_and_a_caption_of_its_own(name):
    draw, caption, choices = EXPLORERS[name]
    stops = list(itertools.product(*choices))
    pictures, words = {draw(*stop).as_str() for stop in stops}, {caption(*stop) for stop in stops}
    assert len(pictures) == len(words) == len(stops)
    assert all(line.endswith(".") and line[0].isupper() for line in words)


def test_the_running_product_of_the_picture_costs_what_it_says():
    for sizes in figures.CHAINS.values():
        for mode in ("forward", "reverse"):
            assert figures._spent(sizes, mode, 3) == product_flop(sizes, mode)
            assert figures._spent(sizes, mode, 1) == 0
