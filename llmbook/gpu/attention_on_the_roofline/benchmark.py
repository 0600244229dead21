"""What the attention_on_the_roofline chapter times: decode attention by group size, both kernels and their peers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from .decode import decode
from .tiles import tiles_for

Tensor = torch.Tensor
HEADS, BATCH, D = 32, 4, 128
GROUPS = (1, 2, 4, 8, 16)
LENGTHS = (4096, 32_768)


def cases(
    device: torch.device = DEVICE, heads: int = HEADS, batch: int = BATCH, d: int = D,
    groups: Iterable[int] = GROUPS, lengths: Iterable[int] = LENGTHS, dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A case per length, group size and kernel; bf16 where the GPU has it. Peers stand beside the packed kernel."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for n in lengths:
        for group in groups:
            torch.manual_seed(n + group)
            q = torch.randn(batch, heads, 1, d, device=device, dtype=dtype)
            k, v = torch.randn(2, batch, heads // group, n, d, device=device, dtype=dtype)
            for kernel in ("per head", "packed"):
                yield _case(kernel, q, k, v)


def _case(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Case:
    (batch, heads, _, d), (kv_heads, n) = q.shape, k.shape[1:3]
    rows = tiles_for(kernel, d, heads // kv_heads, capability()).rows
    sizes = {
        "batch": batch, "heads": heads, "group": heads // kv_heads, "N": n, "d": d, "rows": rows,
        "dtype": str(q.dtype)[6:],
    }
    peers: dict[str, Callable[[], Any]] = {} if kernel == "per head" else {
        "SDPA, enable_gqa": functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True),
        "FlexAttention": lambda: _compiled_flex()(q, k, v, enable_gqa=True),
    }
    return Case(
        kernel, sizes, lambda: decode(q, k, v, kernel=kernel)[0], functools.partial(_error, q, k, v),
        4 * batch * heads * n * d, (2 * k.numel() + 2 * q.numel()) * q.element_size(), peers,
    )


def _error(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[float, float]:
    """Against fp32, sequence by sequence; allowed is twice what plain attention makes in the same dtype."""
    ours = [relative_error(out[b : b + 1], _plain(q, k, v, b, torch.float32)) for b in range(q.shape[0])]
    same = [relative_error(_plain(q, k, v, b, q.dtype), _plain(q, k, v, b, torch.float32)) for b in range(q.shape[0])]
    worst = float("nan") if any(error != error for error in ours) else max(ours)
    return worst, 2 * max(same) + 1e-4


def _plain(q: Tensor, k: Tensor, v: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """One sequence's attention as three operations, a group's heads as rows."""
    kv_heads, d = k.shape[1], q.shape[3]
    rows, keys, values = q[b].view(kv_heads, -1, d).to(dtype), k[b].to(dtype), v[b].to(dtype)
    return ((rows @ keys.mT * d**-0.5).softmax(-1) @ values).view(1, q.shape[1], 1, d)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
