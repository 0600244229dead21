"""What RoPE is timed on: forward and backward over one layer's queries and keys, at models' own sizes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

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
    dtype = torch.bfloat16 if capability() >= 80 else torch.float16
    for size in sizes:
        yield _case(size, dtype, device)


def _case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
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
        exact = tuple(t.detach().double().requires_grad_() for t in inputs[:2])
        wide = tables(positions, theta, torch.float64)
        reference = forward_backward(eager, (*exact, *wide), tuple(t.double() for t in upstream), layout)
        worst = max(relative_error(ours, theirs) for ours, theirs in zip(result, reference, strict=True))
        return worst, torch.finfo(dtype).eps / 2  # one rounding, at the store

    def copy() -> Any:
        return [t.clone() for t in (*inputs[:2], *upstream)]

    heads = q_heads + k_heads
    return Case(
        "RoPE forward + backward",
        {"model": size.model, "B": batch, "S": tokens, "Hq": q_heads, "Hk": k_heads, "d": d, "layout": layout,
         "dtype": str(dtype).removeprefix("torch.")},
        call(rope), error, 2 * flops(batch * tokens, heads, d),
        # The tables are read once per token of the sequence, not of the batch: L2 holds them.
        2 * fused_bytes(batch * tokens, heads, d, dtype.itemsize, table=0) + 2 * fused_bytes(tokens, 0, d, 0),
        {"eager PyTorch": call(eager), "torch.compile": call(compiled), "copy of the same bytes": copy},
    )
