"""The norms against PyTorch and Hugging Face, their gradients against autograd, and what they refuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmbook.block.norms import by_axes, cost, examples, figures, rms, stack, training
from llmbook.block.norms.standardise import standardise, standardise_backward
from llmbook.kit.style import to_svg


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 17))
scales = st.sampled_from([1e-3, 1.0, 1e3])


def case(shape, scale, offset):
    x = (scale * (offset + randn(*shape))).requires_grad_()
    weight, bias = (randn(shape[-1], seed=s).requires_grad_() for s in (1, 2))
    return x, weight, bias, randn(*shape, seed=3)


def agree(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.detach().abs().max())))


def torch_batch_norm(x, weight, bias, eps=1e-5):
    return F.batch_norm(x.flatten(0, -2), None, None, weight, bias, True, 0.1, eps).view_as(x)


@given(shapes, scales, st.sampled_from([0.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_all_three_forward_and_backward_equal_torch(shape, scale, offset):
    x, weight, bias, upstream = case(shape, scale, offset)
    width = shape[-1:]
    theirs = F.rms_norm(x, width, weight, 1e-6)
    agree([rms.rms_norm(x, weight, 1e-6)], [theirs])
    agree(rms.rms_norm_backward(upstream, x, weight), torch.autograd.grad(theirs, (x, weight), upstream))
    for name, theirs in (
        ("layer_norm", F.layer_norm(x, width, weight, bias)), ("batch_norm", torch_batch_norm(x, weight, bias)),
    ):
        if name == "layer_norm" and width == (1,):
            continue  # x − mean is 0 here, and rounding in PyTorch: see the test of constant rows
        agree([getattr(by_axes, name)(x, weight, bias)], [theirs])
        mine = getattr(by_axes, f"{name}_backward")(upstream, x, weight)
        agree(mine, torch.autograd.grad(theirs, (x, weight, bias), upstream))


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 1), (1, 2)])
@pytest.mark.parametrize("centre", [True, False])
def test_the_one_backward_passes_gradcheck_over_any_axes(axes, centre):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = standardise(x, axes, 1e-3, centre)
            ctx.save_for_backward(*out)
            return out[0]

        @staticmethod
        def backward(ctx, grad):
            return standardise_backward(grad, *ctx.saved_tensors, axes, centre)

    assert torch.autograd.gradcheck(Function.apply, (1 + randn(2, 3, 4)).requires_grad_())


@given(shapes, scales)
@settings(max_examples=20, deadline=None)
def test_what_the_norms_do_not_see_gets_no_gradient(shape, scale):
    """Scaling a row changes no RMSNorm, scaling or shifting it no LayerNorm: dx has no part along either."""
    if shape[-1] < 3:
        return
    x, weight, _, upstream = case(shape, scale, 0.0)
    dx, _ = rms.rms_norm_backward(upstream, x, weight, 1e-30)
    along = (dx * x).sum(-1).abs() / (dx.norm(dim=-1) * x.norm(dim=-1))
    assert along.max() < 1e-12
    dx, _, _ = by_axes.layer_norm_backward(upstream, x, weight, 1e-30)
    assert (dx.sum(-1).abs() / dx.norm(dim=-1)).max() < 1e-9
    agree([rms.rms_norm(4 * x, weight, 1e-30)], [rms.rms_norm(x, weight, 1e-30)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("shape", [(2, 7, 1000), (3, 1), (0, 8), (64,)])
def test_bit_for_bit_llamas(dtype, eps, shape):
    x, weight = (3 * randn(*shape)).to(dtype), randn(shape[-1], seed=1).to(dtype)
    theirs = LlamaRMSNorm(shape[-1], eps).to(dtype)
    ours = rms.RMSNorm(shape[-1], eps).to(dtype)
    for module in (theirs, ours):
        module.load_state_dict({"weight": weight})
    assert torch.equal(ours(x), theirs(x))
    # A float32 gain on half-precision rows gives float32, there as here.
    mixed = rms.rms_norm(x, weight.float(), eps)
    assert torch.equal(mixed, LlamaRMSNorm.forward(theirs.float(), x))
    assert mixed.dtype == torch.float32
    upstream = randn(*shape, seed=2).to(dtype)
    grads = []
    for module in (theirs.to(dtype), ours):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(module(leaf), (leaf, module.weight), upstream))
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)
    assert f"{shape[-1]}, eps={eps}" in repr(ours)


def test_float64_stays_float64_where_llamas_does_not():
    x = randn(4, 9)
    torch.testing.assert_close(rms.rms_norm(x), F.rms_norm(x, (9,), eps=1e-6), rtol=1e-14, atol=0)
    assert (LlamaRMSNorm(9).double()(x) - rms.rms_norm(x)).abs().max() > 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fused_residual_is_add_then_norm(dtype):
    x, stream, weight = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(3, 8), (3, 8), (8,)]))
    normed, total = rms.add_rms_norm(x, stream, weight)
    assert torch.equal(total, stream + x)
    assert torch.equal(normed, rms.rms_norm(stream + x, weight))


def test_batch_norm_running_statistics_equal_torchs():
    theirs = torch.nn.BatchNorm1d(5, dtype=torch.float64)
    mine = (torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    for seed in range(3):
        x = (2 + 3 * randn(4, 3, 5, seed=seed)).requires_grad_()
        ours = by_axes.batch_norm(x, theirs.weight, theirs.bias, running=mine)
        agree([ours], [theirs(x.flatten(0, 1)).view_as(x)])
        agree(mine, [theirs.running_mean, theirs.running_var])
    theirs.eval()
    x = randn(1, 1, 5)
    ours = by_axes.batch_norm(x, theirs.weight, theirs.bias, running=mine, training=False)
    agree([ours], [theirs(x[0])[None]])
    empty = by_axes.batch_norm(x[:0], theirs.weight, theirs.bias, running=mine, training=False)
    assert empty.shape == (0, 1, 5)


# Extreme rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_zeros_infinities_and_nans(dtype):
    x = torch.ones(5, 4, dtype=dtype)
    x[0], x[1, 2], x[2, 0] = 0, math.nan, math.inf
    x[3] = 1e20  # its square passes float32's largest number
    y = rms.rms_norm(x, torch.ones(4, dtype=dtype))
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert y[2, 0].isnan()
    assert (y[2, 1:] == 0).all()
    assert (y[3] == 0).all()
    torch.testing.assert_close(y[4], torch.ones(4, dtype=dtype))
    assert torch.equal(y.isnan(), F.rms_norm(x, (4,), eps=1e-6).isnan())
    dx, _ = rms.rms_norm_backward(torch.ones(4), torch.zeros(4), torch.ones(4))
    torch.testing.assert_close(dx, torch.full((4,), 1e3))  # 1/√eps: large, and finite
    layer = by_axes.layer_norm(torch.full((2, 4), 7.0), torch.ones(4), torch.full((4,), 2.0))
    assert (layer == 2).all()  # a constant row has no spread: only the bias is left


def test_no_rows_give_no_rows():
    x, w = torch.zeros(0, 3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for y in (rms.rms_norm(x, w), by_axes.layer_norm(x, w, w)):
        assert y.shape == x.shape
    dx, dw = rms.rms_norm_backward(x, x, w)
    assert dx.shape == x.shape
    assert (dw == 0).all()
    assert all((g == 0).all() for g in by_axes.layer_norm_backward(x, x, w)[1:])


w4 = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rms.rms_norm(torch.ones(2, 4), torch.ones(3)), r"weight must be \[4\].* but is \[3\]"),
        (lambda: rms.rms_norm(torch.ones(2, 4), w4, 0.0), "eps must be above 0 and finite, not 0.0"),
        (lambda: rms.rms_norm(torch.ones(2, 4), w4, -1e-6), "eps must be above 0"),
        (lambda: rms.rms_norm(torch.ones(2, 4), w4, math.nan), "not nan"),
        (lambda: rms.rms_norm(torch.ones(2, 4), w4, math.inf), "not inf"),
        (lambda: rms.rms_norm(torch.ones(2, 0)), "D of at least 1"),
        (lambda: rms.rms_norm(torch.tensor(1.0)), "D of at least 1"),
        (lambda: rms.rms_norm(torch.ones(2, 4, dtype=torch.int64), w4), "floating type, not torch.int64"),
        (lambda: rms.RMSNorm(0), "D of at least 1"),
        (lambda: rms.RMSNorm(4, eps=0), "eps must be above 0"),
        (lambda: rms.add_rms_norm(torch.ones(2, 4), torch.ones(4), w4), "their shapes must be equal"),
        (lambda: by_axes.layer_norm(torch.ones(2, 4), w4, torch.ones(3)), r"bias must be \[4\]"),
        (lambda: by_axes.batch_norm(torch.ones(1, 4), w4, w4), "two values per feature or more"),
        (lambda: by_axes.batch_norm(torch.ones(0, 4), w4, w4), "two values per feature or more"),
        (lambda: by_axes.batch_norm(torch.ones(4), w4, w4), "two values per feature or more"),
        (lambda: by_axes.batch_norm(torch.ones(2, 4), w4, w4, training=False), "running must hold"),
        (lambda: by_axes.batch_norm(torch.ones(2, 4), w4, w4, math.nan), "eps must be"),
        (lambda: stack.measure(2, "before"), "place must be one of"),
        (lambda: stack.measure(0, "pre"), "layers at least 1"),
        (lambda: training.train("group", torch.ones(1)), "norm must be one of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_torch_refuses_batch_norm_of_one_value_as_we_do():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(torch.ones(1, 4), None, None, w4, w4, True)


# Counted


@given(shapes)
@settings(max_examples=10, deadline=None)
def test_flops_counted_equal_the_formula(shape):
    x, weight, bias, _ = (t.detach() for t in case(shape, 1.0, 0.0))
    rows, width = shape[0] * shape[1], shape[-1]
    for call, centre, more in (
        (lambda: rms.rms_norm(x, weight), False, False), (lambda: by_axes.layer_norm(x, weight), True, False),
        (lambda: by_axes.layer_norm(x, weight, bias), True, True),
    ):
        with cost.Tally() as tally:
            call()
        assert tally.flops == cost.flops(rows, width, centre, more)


# Measured


def test_where_the_norm_stands_sets_how_gradients_fall_with_depth():
    last = {(p, n): stack.measure(n, p).gradient[-1] for p in stack.PLACES for n in (6, 24)}
    assert last["pre", 6] / last["pre", 24] == pytest.approx(2, rel=0.25)  # 1/√L
    assert last["post", 6] / last["post", 24] == pytest.approx(1, rel=0.25)
    assert last["none", 24] > 100 * last["none", 6]
    assert stack.measure(4, "post").stream == pytest.approx([1, 1, 1, 1], rel=1e-5)
    stream = stack.measure(24, "pre").stream
    assert stream[-1] == pytest.approx((1 + 24) ** 0.5, rel=0.25)


def test_a_norm_makes_the_scale_of_the_weights_irrelevant_and_its_gradient_inverse():
    g = torch.Generator().manual_seed(0)
    x = randn(1, 16, training.WIDTH)
    weights = torch.randn(1, 3, training.WIDTH, training.WIDTH, generator=g, dtype=torch.float64) / 6
    outs = []
    for scale in (1.0, 8.0):
        w = weights.clone()
        w[:, 0] *= scale
        w.requires_grad_()
        out, _ = training.forward(w, x, "rms")
        outs.append((out, torch.autograd.grad(out.pow(2).sum(), w)[0][:, 0]))
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outs[0][1], 8 * outs[1][1], rtol=1e-3, atol=1e-5)


def test_training_reports_divergence_and_what_norms_change():
    runs = training.train("none", torch.tensor([1e-3, 1e3], dtype=torch.float64), steps=15, scale=2.0)
    assert runs.losses.shape == (training.SEEDS, 2)
    assert not runs.losses.isnan().any()
    rate = torch.tensor([0.03], dtype=torch.float64)
    calm = training.train("batch", rate, steps=30)
    assert calm.best().max() < 0.2
    jumpy = training.train("batch + shift", rate, steps=30)
    assert (jumpy.shift_at_best() > 10 * calm.shift_at_best()).all()
    x, y = training.problems(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.mean(1).flatten(), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(y.var(1, correction=0).flatten(), torch.ones(2, dtype=torch.float64))
    assert x.shape == (2, training.POINTS, training.WIDTH)


def test_a_step_of_training_equals_torchs_sgd():
    rate = torch.tensor([0.01], dtype=torch.float64)
    ours = training.train("layer", rate, steps=12, seeds=1)
    g = torch.Generator().manual_seed(0)
    x, y = training.problems(1, g)
    draws = torch.randn(training.LAYERS, training.WIDTH, training.WIDTH, generator=g, dtype=torch.float64)
    layers = [torch.nn.Parameter(w * (2 / training.WIDTH) ** 0.5) for w in draws]
    optimizer, losses = torch.optim.SGD(layers, lr=0.01), []
    for _ in range(12):
        h = x[0]
        for w in layers[:-1]:
            h = F.relu(F.layer_norm(h @ w, (training.WIDTH,), eps=1e-5))
        loss = F.mse_loss(h @ layers[-1][:, :1], y[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert float(ours.losses[0, 0]) == pytest.approx(sum(losses[-10:]) / 10, rel=1e-9)


# Pictures


@pytest.mark.parametrize("name", ["cube", "projection"])
def test_every_frame_has_a_picture_and_a_caption_of_its_own(name):
    picture, caption, choices = figures.EXPLORERS[name]
    chosen = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    assert len({to_svg(picture(**c), "") for c in chosen}) == len(chosen)
    assert len({caption(**c) for c in chosen}) == len(chosen)


def test_what_backward_keeps_in_the_picture_is_what_the_formula_says():
    for norm in ("RMSNorm", "LayerNorm"):
        v = examples.vectors(norm, 0.7)
        torch.testing.assert_close(v["along"] + v["mean"] + v["rest"], v["ĝ"])
        torch.testing.assert_close(v["dx"], v["r"] * v["rest"])
        assert abs(float(v["rest"] @ v["x̂"])) < 1e-9
    x, _, y = examples.stages("LayerNorm")
    torch.testing.assert_close(y, F.layer_norm(x, (6,), *examples.batch()[1:], eps=1e-6))
