"""What the flash_attention chapter times: Algorithm 1's kernel against standard attention and SDPA's backends."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmbook.kit.compare import PIECE
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .forward import flash_traffic
from .kernel import block_rows, capability, flash_attention_1
from .rule import by_the_rule, standard

Shape = tuple[int, int, int, int]

# (batch, heads, N, d): constant tokens per batch, so that only the shape of the work changes.
SHAPES = ((16, 16, 1024, 64), (4, 16, 4096, 64), (1, 16, 16384, 64), (4, 16, 4096, 128), (64, 16, 1024, 64))
SMALL: dict[str, Any] = {"shapes": ((2, 3, 40, 16),)}
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(
    device: torch.device = DEVICE, shapes: Iterable[Shape] = SHAPES, dtype: torch.dtype = torch.float16
) -> Iterator[Case]:
    """One case per shape, full and causal."""
    for shape in shapes:
        for causal in (False, True):
            yield _case(shape, causal, dtype, device)


def _case(shape: Shape, causal: bool, dtype: torch.dtype, device: torch.device) -> Case:
    batch, heads, n, d = shape
    block = block_rows(d, capability())
    one = batch * heads * n * d
    return Case(
        "flash_attention_1 forward",
        {"batch": batch, "heads": heads, "N": n, "d": d, "dtype": str(dtype)[6:], "causal": causal},
        partial(_make, shape, causal, dtype, device), 4 * n * one // (2 if causal else 1),
        flash_traffic(n, d, block) * batch * heads * dtype.itemsize,
        one * (5 * dtype.itemsize + 4) + 4 * 4 * max(PIECE, n**2),  # five of Q's size, the reference, N × N of fp32
    )


def _make(shape: Shape, causal: bool, dtype: torch.dtype, device: torch.device) -> Work:
    torch.manual_seed(shape[2] + shape[3])
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype)
    rule = by_the_rule((q, k, v), lambda q, k, v: [standard(q, k, v, causal)], times=2)
    peers: dict[str, Callable[[], Any]] = {
        name: partial(_sdpa, backend, q, k, v, causal) for name, backend in BACKENDS.items()
    }
    # Where S and P do not fit into the GPU's memory, this one is unavailable.
    peers["standard, three kernels"] = partial(standard, q, k, v, causal)
    return Work(lambda: flash_attention_1(q, k, v, causal)[0], lambda out: rule([out]), peers)


def _sdpa(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
