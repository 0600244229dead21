"""What the flash_attention_2 chapter times: both passes, full and causal, against SDPA's backends and FlexAttention."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llmbook.gpu.flash_attention.rule import error_by_the_rule, standard
from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case

from .attention import flash_attention_2

Tensor = torch.Tensor
Call = Callable[[], Any]

# (batch, heads, N, d): 16,384 tokens and a hidden size of 2,048 in every case, as in the papers' charts.
SHAPES = tuple((16_384 // n, 2048 // d, n, d) for d in (64, 128) for n in (2048, 4096, 8192, 16_384))
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int, int, int]] = SHAPES,
    causals: Iterable[bool] = (False, True), dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A forward and a backward case per shape, full and causal; bf16 where the GPU has it."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for batch, heads, n, d in shapes:
        for causal in causals:
            torch.manual_seed(n + d)
            q, k, v, do = torch.randn(4, batch, heads, n, d, device=device, dtype=dtype)
            yield _forward(q, k, v, causal)
            yield _backward(q, k, v, do, causal)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Ours, the output alone."""
    return flash_attention_2(q, k, v, causal=causal)[0]


def peers(n: int, causal: bool, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name → the same attention by somebody else's code."""

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _diagonal(n, device) if causal else None
        result: Tensor = _compiled_flex()(q, k, v, block_mask=mask)
        return result

    return {name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()} | {"FlexAttention": flex}


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _diagonal(n: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, row, key: row >= key, None, None, n, n, device=device.type)


def _sizes(q: Tensor, causal: bool) -> dict[str, Any]:
    batch, heads, n, d = q.shape
    return {"batch": batch, "heads": heads, "N": n, "d": d, "dtype": str(q.dtype)[6:], "causal": causal}


def _flops(q: Tensor, causal: bool) -> int:
    batch, heads, n, d = q.shape
    return 4 * n * n * d * batch * heads // (2 if causal else 1)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Case:
    return Case(
        "forward", _sizes(q, causal), lambda: attend(q, k, v, causal),
        lambda out: error_by_the_rule([out], (q, k, v), lambda q, k, v: [standard(q, k, v, causal)], times=2),
        _flops(q, causal), 4 * q.numel() * q.element_size(),
        {name: functools.partial(call, q, k, v) for name, call in peers(q.shape[2], causal, q.device).items()},
    )


def _backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> Case:
    """The backward alone: the graph is built once, on first use, and kept."""

    def gradients(function: Callable[..., Tensor]) -> Call:
        @functools.cache
        def graph() -> tuple[Tensor, list[Tensor]]:
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return function(*leaves), leaves

        def call() -> tuple[Tensor, ...]:
            out, leaves = graph()
            return torch.autograd.grad(out, leaves, do, retain_graph=True)

        return call

    def plain(*head: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in head[:3]]
        return torch.autograd.grad(standard(leaves[0], leaves[1], leaves[2], causal), leaves, head[3])

    return Case(
        "backward", _sizes(q, causal), gradients(functools.partial(attend, causal=causal)),
        lambda out: error_by_the_rule(out, (q, k, v, do), plain, times=3),
        5 * _flops(q, causal) // 2, 8 * q.numel() * q.element_size(),
        {name: gradients(call) for name, call in peers(q.shape[2], causal, q.device).items()},
    )
