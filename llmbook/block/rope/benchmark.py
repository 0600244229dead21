"""What RoPE is timed on: forward and backward over one layer's queries and keys, at models' own sizes."""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmbook.kit.compare import blocks, half, need_same_shape, reference_dtype, wide, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .cost import flops, fused_bytes
from .kernel import rope
from .rotation import frequencies, rotate_half_split, rotate_interleaved, tables


class Size(NamedTuple):
    """One layer of a model at work: batch, tokens, query heads, key heads, rotary width, layout."""

    model: str
    batch: int
    tokens: int
    q_heads: int
    k_heads: int
    d: int
    layout: str


SIZES = (
    Size("Llama-3-8B prefill", 1, 8192, 32, 8, 128, "half_split"),
    Size("Llama-3-8B prefill, Meta's layout", 1, 8192, 32, 8, 128, "interleaved"),
    Size("Llama-3-70B prefill", 4, 4096, 64, 8, 128, "half_split"),
    Size("DeepSeek-V3 prefill", 1, 8192, 128, 1, 64, "interleaved"),
    Size("Llama-3-8B decode", 256, 1, 32, 8, 128, "half_split"),
)

SMALL: dict[str, Any] = {"sizes": (
    Size("prefill", 2, 3, 4, 2, 128, "half_split"), Size("prefill, Meta's layout", 1, 5, 3, 1, 64, "interleaved"),
    Size("decode", 3, 1, 4, 2, 128, "half_split"),
)}
COMPILED = 2  # as many of the sizes, the first: to compile takes seconds

Grads = tuple[Tensor, Tensor, Tensor, Tensor]
Function = Callable[..., tuple[Tensor, Tensor]]


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of q, as Hugging Face's models do it."""
    rotate = rotate_half_split if layout == "half_split" else rotate_interleaved
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def compiled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same through `torch.compile`, compiled at the first call: to name this peer costs nothing."""
    turned: tuple[Tensor, Tensor] = _compile()(q, k, cos, sin, layout)
    return turned


@functools.cache
def _compile() -> Function:
    return torch.compile(eager, dynamic=False)


def forward_backward(
    function: Function, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...], layout: str
) -> Grads:
    """The rotated q and k, and the gradients with respect to both."""
    q, k, cos, sin = inputs
    out = function(q, k, cos, sin, layout)
    dq, dk = torch.autograd.grad(out, (q, k), upstream)
    return out[0].detach(), out[1].detach(), dq, dk


def cases(device: torch.device = DEVICE, sizes: tuple[Size, ...] = SIZES) -> Iterator[Case]:
    """One case per size: our kernel forward and backward, checked against float64, beside its peers.

    The peers: the same in eager PyTorch; compiled by `torch.compile`; and a plain copy of q, k and their
    gradients, which moves all the bytes but the tables and is the least that any implementation can take.
    """
    dtype = half(device)
    for i, size in enumerate(sizes):
        _, batch, tokens, q_heads, k_heads, d, layout = size
        heads = q_heads + k_heads
        one = batch * tokens * heads * d
        yield Case(
            "RoPE forward + backward",
            {"model": size.model, "B": batch, "S": tokens, "Hq": q_heads, "Hk": k_heads, "d": d, "layout": layout,
             "dtype": str(dtype).removeprefix("torch.")},
            partial(_make, size, dtype, device, i < COMPILED), 2 * flops(batch * tokens, heads, d),
            # The tables are read once per token of the sequence, not of the batch: L2 holds them.
            2 * fused_bytes(batch * tokens, heads, d, dtype.itemsize, table=0) + 2 * fused_bytes(tokens, 0, d, 0),
            # q, k, their gradients, both of ours, and twice that in eager peers; a few heads in float64.
            10 * one * dtype.itemsize + 8 * 14 * min(one, max(2**24, batch * tokens * d)) + 64 * tokens * d,
        )


def _make(size: Size, dtype: torch.dtype, device: torch.device, compile_too: bool) -> Work:
    _, batch, tokens, q_heads, k_heads, d, layout = size
    generator = torch.Generator(device=device).manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, d, dtype=dtype, device=device, generator=generator)

    theta = frequencies(d, 500_000.0).to(device)
    first = 0 if tokens > 1 else 4095  # decode happens late in a sequence
    positions = torch.arange(first, first + tokens, device=device)
    inputs = (
        random(q_heads).requires_grad_(), random(k_heads).requires_grad_(), *tables(positions, theta)
    )
    upstream = (random(q_heads), random(k_heads))

    def call(function: Function) -> Callable[[], Grads]:
        return lambda: forward_backward(function, inputs, upstream, layout)

    def error(result: Grads) -> tuple[float, float]:
        for out, like in zip(result, (*inputs[:2], *upstream), strict=True):
            need_same_shape(out, like)
        angles = tables(positions, theta, reference_dtype(device))
        return worst_error(
            pair for i in range(2) for heads in blocks(inputs[i].shape[2], batch * tokens * d)
            for pair in _pairs((result[i], result[i + 2]), inputs[i], upstream[i], angles, heads, layout)
        ), torch.finfo(dtype).eps  # one rounding, at the store, is half of it

    peers = {"eager PyTorch": call(eager)} | ({"torch.compile": call(compiled)} if compile_too else {})
    moved = (*inputs[:2], *upstream)
    return Work(call(rope), error, peers, {"copy of the same bytes": lambda: [t.clone() for t in moved]})


def _pairs(
    results: tuple[Tensor, Tensor], x: Tensor, upstream: Tensor, angles: tuple[Tensor, Tensor], heads: slice,
    layout: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, exact) of some heads: what they become, and their gradient."""
    leaf = wide(x[:, :, heads]).requires_grad_()
    out = (rotate_half_split if layout == "half_split" else rotate_interleaved)(leaf, *angles)
    (gradient,) = torch.autograd.grad(out, leaf, wide(upstream[:, :, heads]))
    yield results[0][:, :, heads], out
    yield results[1][:, :, heads], gradient
