"""The fused kernel in Triton's interpreter, forward and backward, and the benchmark's cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.block.rope import benchmark, kernel, rotation, scaling


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def wide(positions, d, dtype=torch.float64):
    return rotation.tables(positions, rotation.frequencies(d), dtype)


def reference(q, k, cos, sin, layout, upstream):
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    rotate = rotation.rotate_half_split if layout == "half_split" else rotation.rotate_interleaved
    out = [rotate(t, cos.double(), sin.double()) for t in exact]
    return (*out, *torch.autograd.grad(out, exact, [t.double() for t in upstream]))


kernel_sizes = st.tuples(
    st.integers(0, 2), st.integers(0, 4), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from([2, 6, 16, 40]),
)


@given(
    kernel_sizes, st.sampled_from(kernel.LAYOUTS), st.sampled_from(kernel.DTYPES), st.booleans(),
    st.sampled_from(["BSHD", "BHSD", "sliced"]),
)
@settings(max_examples=40, deadline=None)
def test_kernel_forward_and_backward_against_float64(shape, layout, dtype, per_batch, strides):
    batch, tokens, q_heads, k_heads, d = shape

    def make(heads, seed):
        if strides == "BHSD":
            return randn(batch, heads, tokens, d, seed=seed).to(dtype).transpose(1, 2).requires_grad_()
        if strides == "sliced":
            return randn(batch, tokens, heads, d + 5, seed=seed).to(dtype)[..., 3 : 3 + d].requires_grad_()
        return randn(batch, tokens, heads, d, seed=seed).to(dtype).requires_grad_()

    q, k = make(q_heads, 0), make(k_heads, 1)
    at = torch.arange(1000, 1000 + tokens)
    at = at + torch.arange(batch)[:, None] * 7 if per_batch else at
    cos, sin = wide(at, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = [make(heads, 5).detach() for heads in (q_heads, k_heads)]
    out = kernel.rope(q, k, cos, sin, layout)
    grads = torch.autograd.grad(out, (q, k), upstream)
    unit = torch.finfo(dtype).eps
    for mine, exact in zip((*out, *grads), reference(q, k, cos, sin, layout, upstream), strict=True):
        assert mine.dtype == dtype
        # One rounding at the store, and the sums' own roundings in the tables' precision.
        bound = unit * exact.abs() + 4 * torch.finfo(cos.dtype).eps * 6 + torch.finfo(dtype).tiny
        assert ((mine.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", kernel.LAYOUTS)
def test_kernel_gradcheck(layout):
    q, k = randn(1, 2, 2, 4).requires_grad_(), randn(1, 2, 1, 4, seed=1).requires_grad_()
    tables = wide(torch.arange(2), 4)
    assert torch.autograd.gradcheck(lambda q, k: kernel.rope(q, k, *tables, layout), (q, k))
    # A gradient that PyTorch hands over as an expanded view, and a key that nobody uses.
    kernel.rope(q, k, *tables, layout)[0].sum().backward()
    assert k.grad is not None
    assert not k.grad.any()


def test_kernel_keeps_yarns_factor_in_both_directions():
    q = randn(1, 3, 2, 8, dtype=torch.float32).requires_grad_()
    factor = scaling.yarn_attention_factor(4.0)
    cos, sin = rotation.tables(torch.arange(3), rotation.frequencies(8), attention_factor=factor)
    out, _ = kernel.rope(q, q.detach(), cos, sin)
    (grad,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(grad, factor**2 * q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "neox"}, "layout must be one of"),
        ({"q": randn(2, 3, 4)}, r"q and k must be \[B, S, Hq, d\]"),
        ({"k": randn(1, 4, 1, 8)}, "q and k must be"),
        ({"q": randn(1, 3, 2, 7), "k": randn(1, 3, 1, 7)}, "must be even and from 2 to 2048, not 7"),
        ({"cos": randn(3, 8)}, r"cos and sin must both be \[3, 4\] or \[1, 3, 4\]"),
        ({"cos": randn(3, 4).float()}, "cos and sin must be torch.float64"),
        ({"q": randn(1, 3, 2, 8).float()}, "must share one of"),
        ({"q": randn(1, 3, 2, 8).long(), "k": randn(1, 3, 1, 8).long()}, "must share one of"),
        ({"cos": randn(3, 4).requires_grad_()}, "constants here"),
        ({"q": randn(1, 3, 2, 8).to("meta")}, "q is on meta, k is on cpu"),
    ],
)
def test_kernel_refuses_in_one_sentence(change, words):
    cos, sin = wide(torch.arange(3), 8)
    good = {"q": randn(1, 3, 2, 8), "k": randn(1, 3, 1, 8), "cos": cos, "sin": sin, "layout": "half_split"}
    with pytest.raises(ValueError, match=words):
        kernel.rope(**{**good, **change})


def test_builds_name_every_argument():
    for build in kernel.BUILDS:
        named = set(build.signature) | set(build.constants(80))
        assert named == set(build.kernel.arg_names)


def test_the_benchmarks_copy_moves_queries_keys_and_their_gradients():
    for case in benchmark.cases(**benchmark.SMALL):
        copied = case.make().yardsticks["copy of the same bytes"]()
        tables = 2 * 2 * case.sizes["S"] * (case.sizes["d"] // 2) * 4
        assert 2 * sum(t.nbytes for t in copied) == case.bytes - tables


@pytest.mark.parametrize("layout", kernel.LAYOUTS)
def test_kernel_writes_nothing_outside_its_outputs(layout):
    batch, tokens, heads, d = 1, 2, 3, 6  # 3 heads in blocks of 4, 3 pairs in blocks of 4
    x = randn(batch, tokens, heads, d)
    cos, sin = wide(torch.arange(tokens), d)
    guarded = [torch.full((x.numel() + 100,), 7.0, dtype=torch.float64) for _ in range(2)]
    kernel.rope_kernel[(tokens, 2)](
        x, x, *guarded, cos, sin, tokens, heads, heads, *x.stride()[:3], *x.stride()[:3], 0, d // 2,
        D=d, WIDE=4, ROWS=4, INTERLEAVED=layout == "interleaved", BACKWARD=False,
    )
    turned = kernel.rope(x, x, cos, sin, layout)
    for buffer, out in zip(guarded, turned, strict=True):
        assert torch.equal(buffer[: x.numel()].view_as(out), out)
        assert (buffer[x.numel() :] == 7).all()
