"""What the flash_attention_2 chapter times: both passes, full and causal, against SDPA's backends and FlexAttention."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llmbook.gpu.flash_attention.rule import by_the_rule, standard
from llmbook.kit.compare import PIECE, half
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .attention import flash_attention_2

Tensor = torch.Tensor
Call = Callable[[], Any]
Shape = tuple[int, int, int, int]

# (batch, heads, N, d): 16,384 tokens and a hidden size of 2,048 in every case, as in the papers' charts.
SHAPES = tuple(
    (16_384 // n, 2048 // d, n, d) for d, lengths in ((64, (2048, 16_384)), (128, (2048, 4096, 8192, 16_384)))
    for n in lengths
)
SMALL: dict[str, Any] = {"shapes": ((2, 3, 40, 32),)}
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
FLEX = (4096, 128, True)  # the N, d and mask that FlexAttention is compiled for: a compilation takes 10 seconds


def cases(
    device: torch.device = DEVICE, shapes: Iterable[Shape] = SHAPES, causals: Iterable[bool] = (False, True),
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A forward and a backward case per shape, full and causal; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    for shape in shapes:
        for causal in causals:
            batch, heads, n, d = shape
            sizes = {"batch": batch, "heads": heads, "N": n, "d": d, "dtype": str(dtype)[6:], "causal": causal}
            one = batch * heads * n * d
            flops, square = 4 * n * one // (2 if causal else 1), 4 * max(PIECE, n**2)
            # Of Q's size: four inputs, results and what kernels keep; references in fp32; some N × N of fp32.
            yield Case(
                "forward", sizes, functools.partial(_forward, shape, causal, dtype, device), flops,
                4 * one * dtype.itemsize, one * (6 * dtype.itemsize + 4) + 4 * square,
            )
            yield Case(
                "backward", sizes, functools.partial(_backward, shape, causal, dtype, device), 5 * flops // 2,
                8 * one * dtype.itemsize, one * (16 * dtype.itemsize + 3 * 4) + 7 * square,
            )


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Ours, the output alone."""
    return flash_attention_2(q, k, v, causal=causal)[0]


def peers(n: int, d: int, causal: bool, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name → the same attention by somebody else's code."""

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = _compiled_flex()(q, k, v, block_mask=diagonal() if causal else None)
        return result

    @functools.cache
    def diagonal() -> Any:
        return create_block_mask(lambda b, h, row, key: row >= key, None, None, n, n, device=device.type)

    found: dict[str, Callable[..., Tensor]] = {
        name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()
    }
    return found | ({"FlexAttention": flex} if (n, d, causal) == FLEX else {})


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    torch.manual_seed(shape[2] + shape[3])
    return torch.randn(4, *shape, device=device, dtype=dtype).unbind()


def _forward(shape: Shape, causal: bool, dtype: torch.dtype, device: torch.device) -> Work:
    q, k, v, _ = _inputs(shape, dtype, device)
    rule = by_the_rule((q, k, v), lambda q, k, v: [standard(q, k, v, causal)], times=2)
    others = peers(shape[2], shape[3], causal, device)
    return Work(
        lambda: attend(q, k, v, causal), lambda out: rule([out]),
        {name: functools.partial(call, q, k, v) for name, call in others.items()},
    )


def _backward(shape: Shape, causal: bool, dtype: torch.dtype, device: torch.device) -> Work:
    """The backward alone: the graph is built once, on first use, and kept."""
    q, k, v, do = _inputs(shape, dtype, device)

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

    others = peers(shape[2], shape[3], causal, device)
    return Work(
        gradients(functools.partial(attend, causal=causal)), by_the_rule((q, k, v, do), plain, times=3),
        {name: gradients(call) for name, call in others.items()},
    )
