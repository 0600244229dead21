"""RMSNorm's kernels in Triton's interpreter against float64, beside PyTorch's own error, and the benchmark's cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from triton.runtime import interpreter

from llmbook.block.norms import benchmark, cost, kernel, rms
from llmbook.kit import measure


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(function, x, weight, upstream, residual=None):
    """Outputs and gradients, for a norm with or without a residual."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    out = function(leaves[0], *leaves[2:], leaves[1])
    out = out if isinstance(out, tuple) else (out,)
    return (*out, *torch.autograd.grad(out, leaves, upstream[: len(out)]))


def torchs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def torchs_add(x, residual, weight):
    return torchs(residual + x, weight), residual + x


@given(
    st.tuples(st.integers(0, 3), st.integers(1, 5)), st.sampled_from([1, 3, 16, 100, 1023, 2500]),
    st.sampled_from(kernel.DTYPES), st.booleans(), st.sampled_from(["plain", "sliced", "transposed"]),
)
@settings(max_examples=40, deadline=None)
def test_forward_and_backward_no_worse_than_twice_torchs_error(shape, width, dtype, add, strides):
    def make(seed):
        if strides == "sliced":
            return randn(*shape, width + 5, seed=seed, dtype=dtype)[..., 2 : 2 + width]
        if strides == "transposed":
            return randn(width, *shape, seed=seed, dtype=dtype).permute(1, 2, 0)
        return randn(*shape, width, seed=seed, dtype=dtype)

    x, residual, weight = make(0), make(1) if add else None, randn(width, seed=2, dtype=dtype)
    upstream = (make(3), make(4))
    ours, theirs = (kernel.add_rms_norm, torchs_add) if add else (kernel.rms_norm, torchs)
    mine = results(ours, x, weight, upstream, residual)
    own = results(theirs, x, weight, upstream, residual)
    wide = [t.double() if t is not None else None for t in (x, weight, residual)]
    exact = results(theirs, *wide[:2], tuple(t.double() for t in upstream), wide[2])
    for a, b, c in zip(mine, own, exact, strict=True):
        assert a.dtype == dtype
        floor = torch.finfo(dtype).eps * (4 if width < 4 or dtype == torch.float64 else 1)
        assert measure.relative_error(a, c) <= 2 * measure.relative_error(b, c) + floor / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bit_for_bit_llamas_in_half_precision(dtype):
    x, weight = randn(6, 512, dtype=dtype), randn(512, seed=1, dtype=dtype)
    theirs = LlamaRMSNorm(512).to(dtype)
    theirs.load_state_dict({"weight": weight})
    # One bit of r may differ by the order of the sum, and flip a rounding now and then.
    off = kernel.rms_norm(x, weight).double() - theirs(x).double()
    assert (off != 0).double().mean() < 1e-3
    fused, unfused = kernel.add_rms_norm(x, x.flip(0), weight), rms.add_rms_norm(x, x.flip(0), weight)
    assert torch.equal(fused[1], unfused[1])
    assert (fused[0] != unfused[0]).double().mean() < 1e-3


@pytest.mark.parametrize("width", [5, 20_000])
def test_gradcheck_and_rows_too_wide_to_hold_dweight(width, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(kernel.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    x, other, weight = randn(2, 3), randn(2, 3, seed=1), randn(3, seed=2)
    leaves = [t.requires_grad_() for t in (x, other, weight)]
    if width == 5:
        assert torch.autograd.gradcheck(lambda x, w: kernel.rms_norm(x, w), (x, weight))
        assert torch.autograd.gradcheck(kernel.add_rms_norm, tuple(leaves))
        return
    x, weight, upstream = randn(9, width), randn(width, seed=1), randn(9, width, seed=2)
    assert kernel._tile(width)[0] > kernel.HELD_UP_TO
    mine, exact = (results(f, x, weight, (upstream,)) for f in (kernel.rms_norm, torchs))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_unused_and_expanded_gradients():
    x, weight = randn(3, 4).requires_grad_(), randn(4, seed=1).requires_grad_()
    kernel.add_rms_norm(x, x.detach(), weight)[1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert not weight.grad.any()
    kernel.rms_norm(x, weight).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on behalf of the interpreter
def test_rows_of_zeros_infinities_and_nans_stay_to_themselves():
    x = randn(5, 8, dtype=torch.float32)
    x[0], x[1, 2], x[2, 0], x[3] = 0, float("nan"), float("inf"), 1e20
    weight = torch.ones(8)
    mine, theirs = kernel.rms_norm(x, weight), rms.rms_norm(x, weight)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    (grad,) = torch.autograd.grad(kernel.rms_norm(x.requires_grad_(), weight).sum(), x)
    assert grad[[0, 4]].isfinite().all()


def test_deterministic_whatever_the_share_of_rows(monkeypatch):
    x, weight, up = randn(40, 300, dtype=torch.float32), randn(300, dtype=torch.float32), (randn(40, 300).float(),)
    first, again = (results(kernel.rms_norm, x, weight, up) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(kernel, "programs", lambda rows, width: 1)
    torch.testing.assert_close(results(kernel.rms_norm, x, weight, up)[2], first[2])


def test_writes_nothing_outside_its_outputs():
    rows, width = 3, 5
    x, weight = randn(rows, width), randn(width, seed=1)
    y, stream, r = (torch.full((100,), 7.0, dtype=torch.float64) for _ in range(3))
    kernel.forward_kernel[(1,)](
        x, x, weight, y, stream, r, rows, width, width, 1e-6, D=width, WIDE=8, ROWS=4, ADD=True,
    )
    assert torch.equal(stream[:15].view(3, 5), 2 * x)
    assert all((t[n:] == 7).all() for t, n in ((y, 15), (stream, 15), (r, 3)))
    dx, partial = (torch.full((100,), 7.0, dtype=torch.float64) for _ in range(2))
    kernel.backward_kernel[(2,)](
        x, x, weight, r, x, dx, partial, rows, width, width, width,
        D=width, WIDE=8, ROWS=2, ADD=True, HELD=True,
    )
    assert (dx[15:] == 7).all()
    assert (partial[10:] == 7).all()


@pytest.mark.parametrize("add", [False, True])
def test_bytes_moved_in_the_interpreter_equal_the_formula(add, monkeypatch):
    """Every load and store of the kernels, counted element by element under their masks."""
    moved = 0
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers, mask):
        width = pointers.dtype.element_ty.primitive_bitwidth // 8
        return int(mask.data.sum()) * width

    def counted_load(self, ptrs, mask, *rest):
        nonlocal moved
        moved += size(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        nonlocal moved
        moved += size(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    rows, width = 6, 3000  # one row per program
    x, weight, up = randn(rows, width).half(), randn(width).half(), randn(rows, width).half()
    _, stream, r = kernel.launch_forward(x, up if add else None, weight, 1e-6)
    gain = width * 2  # read by every program; L2 serves all but the first
    assert moved == cost.forward_bytes(rows, width, 2, add) + (rows - 1) * gain
    moved, count = 0, kernel.programs(rows, width)
    kernel.launch_backward(up, up if add else None, stream, weight, r)
    summed = 4 * count * width  # partials are read by the sum in PyTorch, which the interpreter does not see
    assert moved == cost.backward_bytes(rows, width, 2, add, count) + (rows - 1) * gain - summed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(3)}, r"weight must be \[4\]"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "must share one of"),
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, "floating type"),
        ({"x": torch.ones(1, 40_000), "weight": torch.ones(40_000)}, "up to 32,768 wide"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": float("nan")}, "eps must be above 0"),
        ({"x": torch.ones(2, 4, device="meta")}, "x is on meta, weight is on cpu: move them"),
    ],
)
def test_refuses_in_one_sentence(change, words):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-6}
    with pytest.raises(ValueError, match=words):
        kernel.rms_norm(**{**good, **change})


@pytest.mark.parametrize("residual", [torch.ones(4), torch.ones(2, 4).half(), torch.ones(2, 4, device="meta")])
def test_a_residual_that_does_not_fit_is_refused(residual):
    with pytest.raises(ValueError, match=r"x and residual must agree|x, residual must share|residual is on meta: move"):
        kernel.add_rms_norm(torch.ones(2, 4), residual, torch.ones(4))


def test_builds_name_every_argument():
    for build in kernel.BUILDS:
        assert set(build.signature) | set(build.constants(80)) == set(build.kernel.arg_names)


def test_the_benchmarks_copy_moves_as_many_bytes_as_the_norm():
    for case in benchmark.cases(**benchmark.SMALL):
        assert abs(2 * case.make().yardsticks["copy of the same bytes"]().numel() - case.bytes) <= 1
