"""The engine against PyTorch: random graphs, gradcheck, training, and what it says about bad input."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.foundations.backprop import engine
from llmbook.foundations.backprop.checkpoint import checkpoint
from llmbook.foundations.backprop.engine import Var, cross_entropy, mean, relu, silu, total
from llmbook.foundations.backprop.memory import HookCount, Timeline, watching
from llmbook.foundations.backprop.softmax import softmax, softmax_vjp
from llmbook.foundations.matrix_calculus.closed_forms import softmax_jacobian

D = torch.float64
SHAPES = [(3, 4), (4,), (1, 4), (3, 1), (1,), (), (2, 3, 4), (2, 1, 4), (4, 4), (2, 4, 4), (1, 4, 3), (4, 3), (2, 3, 3)]
UNARY = {
    "relu": (relu, torch.relu), "silu": (silu, F.silu), "softmax": (softmax, lambda x: x.softmax(-1)),
    "sum": (total, torch.sum), "mean": (mean, torch.mean),
}


def broadcasts(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(a.shape[::-1], b.shape[::-1], strict=False))


def multiplies(a, b):
    return min(a.ndim, b.ndim) >= 2 and a.shape[-1] == b.shape[-2] and broadcasts(a[..., 0, 0], b[..., 0, 0])


@st.composite
def graphs(draw):
    """A list of operations on earlier results, for both engines; results are used any number of times."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    leaves = [torch.randn(s, dtype=D) for s in draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=4))]
    needs = [draw(st.booleans()) for _ in leaves]
    needs[draw(st.integers(0, len(leaves) - 1))] = True
    values, plan = list(leaves), []
    for _ in range(draw(st.integers(1, 9))):
        i, j = (draw(st.integers(0, len(values) - 1)) for _ in range(2))
        a, b = values[i], values[j]
        doable = ["relu", "silu", "sum", "mean"]
        doable += ["add", "mul"] * broadcasts(a, b) + ["matmul"] * multiplies(a, b)
        doable += ["softmax", "sum dim", "mean dim", "index", "slice", "pairs"] * (a.ndim > 0 and a.numel() > 0)
        op = draw(st.sampled_from(doable))
        extra = None
        if op.endswith("dim"):
            extra = draw(st.integers(-a.ndim, a.ndim - 1))
        elif op == "index":
            extra = torch.tensor(draw(st.lists(st.integers(0, len(a) - 1), min_size=1, max_size=5)))
        elif op == "slice":
            extra = (..., slice(draw(st.integers(0, 1)), None))
        elif op == "pairs":
            size = draw(st.integers(1, 4))
            extra = tuple(torch.randint(n, (size,)) for n in a.shape[:2])
        plan.append((op, i, j, extra))
        values.append(run(op, a, b, extra, 1))
        if values[-1].numel() > 500 or not values[-1].abs().sum() < 1e6:
            plan.pop()
            values.pop()
    return leaves, needs, plan


def run(op, a, b, extra, which):
    if op in UNARY:
        return UNARY[op][which](a)
    if op.endswith("dim"):
        return UNARY[op.split()[0]][which](a, extra)
    if op in ("index", "slice", "pairs"):
        return a[extra]
    return {"add": lambda: a + b, "mul": lambda: a * b, "matmul": lambda: a @ b}[op]()


def evaluate(leaves, plan, which):
    values = list(leaves)
    for op, i, j, extra in plan:
        values.append(run(op, values[i], values[j], extra, which))
    return values


def as_loss(values, mean_of):
    loss = mean_of(values[0])
    for value in values[1:]:
        loss = loss + mean_of(value)
    return loss


@settings(max_examples=300)
@given(graphs())
def test_every_gradient_of_a_random_graph_is_torchs(graph):
    leaves, needs, plan = graph
    ours = [Var(leaf, need) for leaf, need in zip(leaves, needs, strict=True)]
    theirs = [leaf.clone().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    skip = [p for p, need in zip(leaves + theirs, needs * 2, strict=True) if need]

    counted = Timeline(skip)
    with watching(counted):
        mine = evaluate(ours, plan, 0)
    counts = HookCount(skip)
    with counts:
        yours = evaluate(theirs, plan, 1)
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a.value, b, rtol=1e-12, atol=1e-12)
    if not any(op == "matmul" for op, *_ in plan):  # torch copies a batch that it broadcasts for bmm
        assert counted.steps[-1].held == counts.held
    del a, b

    as_loss(mine, mean).backward()
    as_loss(yours, torch.mean).backward()
    for leaf, other, need in zip(ours, theirs, needs, strict=True):
        if not need:
            assert leaf.grad is None
            continue
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)


@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from([(), (2,), (2, 3)]), st.floats(-1e4, 1e4), st.integers(0, 99)
)
def test_cross_entropy_is_torchs_even_far_from_zero(n, classes, batch, shift, seed):
    torch.manual_seed(seed)
    x = 3 * torch.randn(*batch, n, classes, dtype=D) + shift
    labels = torch.randint(classes, (*batch, n))
    ours, theirs = Var(x, True), x.clone().requires_grad_()
    loss = cross_entropy(ours, labels)
    wanted = F.cross_entropy(theirs.flatten(0, -2), labels.flatten())
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss.value, wanted, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)
    y = F.one_hot(labels, classes)
    torch.testing.assert_close(ours.grad, (x.softmax(-1) - y) / labels.numel(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e300, 0.0, 1e300], [float("-inf"), 0.0, 1.0]])
def test_extreme_logits(logits):
    x, label = torch.tensor([logits], dtype=D), torch.tensor([1])
    ours, theirs = Var(x, True), x.clone().requires_grad_()
    loss = cross_entropy(ours, label)
    loss.backward()
    wanted = F.cross_entropy(theirs, label)
    wanted.backward()
    assert ours.grad.isfinite().all()
    torch.testing.assert_close(loss.value, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad)


class Through(torch.autograd.Function):
    """The engine as one operation of torch's, so that torch's gradcheck can differentiate it numerically."""

    @staticmethod
    def forward(ctx, function, *values):
        ctx.function, ctx.values = function, values
        return function(*map(Var, values)).value.clone()

    @staticmethod
    def backward(ctx, g):
        leaves = [Var(value, True) for value in ctx.values]
        with torch.enable_grad():
            ctx.function(*leaves).backward(g)
        return None, *(leaf.grad for leaf in leaves)


LABELS = torch.tensor([[0, 2], [1, 1]])


@pytest.mark.parametrize("function", [
    lambda a, b: a @ b, lambda a, b: silu(a) * b[0], lambda a, b: softmax(a @ b), lambda a, b: mean(a + b[:1, :1], 1),
    lambda a, b: (a @ b)[torch.tensor([0, 1, 0])], lambda a, b: cross_entropy(a @ b, LABELS),
    lambda a, b: total(a * a, 0) @ b, lambda a, b: checkpoint(lambda x: silu(x @ b) + x, a),
])
def test_gradcheck(function):
    torch.manual_seed(1)
    a, b = torch.randn(2, 2, 3, dtype=D, requires_grad=True), torch.randn(3, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: Through.apply(function, a, b), (a, b))


def test_the_engine_is_one_file_under_150_lines():
    assert len(Path(engine.__file__).read_text().splitlines()) < 150


def test_a_pull_captures_no_tensor_that_is_not_accounted_for():
    torch.manual_seed(0)
    x, w = Var(torch.randn(3, 4, dtype=D), True), Var(torch.randn(4, 4, dtype=D), True)
    ids = torch.tensor([0, 0, 2])
    outs = [x + w[0], x * x, x @ w, relu(x), silu(x), total(x, 0), mean(x), x[ids], x[1:], x[ids, ids],
            cross_entropy(x, ids), softmax(x)]
    for out in outs:
        for edge in out.node.edges:
            captured = inspect.getclosurevars(edge.pull).nonlocals.values()
            flat = [t for value in captured for t in (value if isinstance(value, tuple) else (value,))]
            assert not [t for t in flat if isinstance(t, Var)]
            assert all(any(t is kept for kept in edge.saved) for t in flat if isinstance(t, torch.Tensor))


def test_a_chain_of_thousands_of_operations_needs_no_recursion():
    x = Var(torch.ones(2, dtype=D), True)
    y = x
    for _ in range(5_000):
        y = y + x
    total(y).backward()
    assert x.grad.tolist() == [5001.0, 5001.0]


def test_gradients_add_up_over_passes_and_are_nobodys_alias():
    a, b = (Var(torch.ones(3, dtype=D), True) for _ in range(2))
    total(a + b).backward()
    a.grad.mul_(0)
    assert b.grad.tolist() == [1.0, 1.0, 1.0]
    total(a + b).backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([1.0] * 3, [2.0] * 3)


def test_empty_tensors():
    ours, theirs = Var(torch.zeros(0, 4, dtype=D), True), torch.zeros(0, 4, dtype=D, requires_grad=True)
    (total(relu(ours)) + mean(ours)).backward()
    (theirs.relu().sum() + theirs.mean()).backward()
    assert ours.grad.shape == theirs.grad.shape == (0, 4)


def test_no_grad_records_nothing():
    x = Var(torch.ones(2, 2, dtype=D), True)
    with torch.no_grad():
        y = x @ x
    assert y.node is None
    with pytest.raises(ValueError, match="nothing to differentiate"):
        total(y).backward()


def leaf(*shape):
    return Var(torch.ones(shape, dtype=D), True)


@pytest.mark.parametrize(("act", "words"), [
    (lambda: leaf(3, 4) @ leaf(3, 4), r"matmul of \[3, 4\], \[3, 4\]"),
    (lambda: leaf(3) @ leaf(3, 4), "matmul needs two axes"),
    (lambda: leaf(3, 4) + leaf(3), r"add of \[3, 4\], \[3\].*size of tensor"),
    (lambda: leaf(3, 4) * leaf(2, 4), r"mul of \[3, 4\], \[2, 4\]"),
    (lambda: cross_entropy(leaf(2, 3), torch.tensor([0])), r"labels \[1\] do not fit logits \[2, 3\]"),
    (lambda: cross_entropy(leaf(2, 3), torch.tensor([0, 3])), "label 3 is out of range: 0 to 2"),
    (lambda: cross_entropy(leaf(2, 3), torch.tensor([-1, 0])), "label -1 is out of range"),
    (lambda: leaf(2, 2).backward(), r"starts at a scalar; from a value of shape \[2, 2\]"),
    (lambda: relu(leaf(2)).backward(torch.ones(3)), r"from a value of shape \[2\]"),
    (lambda: total(Var(torch.ones(2))).backward(), "nothing to differentiate"),
])
def test_bad_input_is_told_in_a_sentence(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_backward_twice_names_the_operation():
    x = leaf(2, 2)
    loss = total(relu(x))
    loss.backward()
    with pytest.raises(ValueError, match="ran through this sum before"):
        loss.backward()
    shared = relu(x)
    total(shared).backward()
    with pytest.raises(ValueError, match="ran through this relu before"):
        mean(shared).backward()


SPOILED = {  # what is written to in place: who saved it
    "relu's output": (lambda x: (h := relu(x), h), "relu"),
    "silu's input": (lambda x: (h := x + x, silu(h)), "silu"),
    "a factor": (lambda x: (h := x + x, h * x), "mul"),
    "a matrix": (lambda x: (h := x + x, h @ x), "matmul"),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: t.__setitem__((0, 0), 5.0), lambda t: t.T.mul_(2)])
def test_an_in_place_write_to_a_saved_tensor_is_found(case, write):
    build, op = SPOILED[case]
    h, y = build(leaf(2, 2))
    write(h.value)
    with pytest.raises(ValueError, match=rf"^{op} saved a tensor \[2, 2\].*1 in-place"):
        total(y).backward()


def test_in_place_writes_to_what_nobody_saved_are_allowed():
    x = leaf(2, 2)
    h = x + x
    y = relu(h)
    h.value.zero_()  # relu kept its output, not its input
    total(y).backward()
    assert x.grad.eq(2).all()


@given(st.integers(1, 7), st.integers(0, 99))
def test_softmax_vjp_is_the_jacobians_product(n, seed):
    torch.manual_seed(seed)
    p, g = torch.randn(n, dtype=D).softmax(0), torch.randn(n, dtype=D)
    torch.testing.assert_close(softmax_vjp(g, p), softmax_jacobian(p) @ g, rtol=1e-12, atol=1e-13)


def test_training_follows_torchs_loss_curve():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 2, dtype=D), torch.randint(3, (60,))
    start = [torch.randn(shape, dtype=D) for shape in ((2, 16), (16,), (16, 3), (3,))]
    ours, theirs = [Var(p.clone(), True) for p in start], [p.clone().requires_grad_() for p in start]
    for _ in range(100):
        loss = cross_entropy(relu(Var(x) @ ours[0] + ours[1]) @ ours[2] + ours[3], labels)
        loss.backward()
        wanted = F.cross_entropy((x @ theirs[0] + theirs[1]).relu() @ theirs[2] + theirs[3], labels)
        wanted.backward()
        assert abs(loss.value - wanted) < 1e-12
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.value.sub_(p.grad, alpha=0.5)
                q.sub_(q.grad, alpha=0.5)
                p.grad = q.grad = None
