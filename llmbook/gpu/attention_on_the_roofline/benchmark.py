"""What the attention_on_the_roofline chapter times: decode attention by group size, both kernels and their peers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.compare import half, need_same_shape, piece_error, wide, worst
from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, Work

from .decode import decode
from .tiles import tiles_for

Tensor = torch.Tensor
HEADS, BATCH, D = 32, 4, 128
GROUPS = (1, 2, 4, 8, 16)
LENGTHS = (4096, 32_768)
SMALL: dict[str, Any] = {"heads": 4, "batch": 2, "d": 64, "groups": (1, 4), "lengths": (70,)}
FLEX = 8  # the group size that FlexAttention is compiled for, once per length


def cases(
    device: torch.device = DEVICE, heads: int = HEADS, batch: int = BATCH, d: int = D,
    groups: Iterable[int] = GROUPS, lengths: Iterable[int] = LENGTHS, dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """A case per length, group size and kernel; bf16 where the GPU has it. Peers stand beside the packed kernel."""
    dtype = dtype or half(device)
    for n in lengths:
        for group in groups:
            for kernel in ("per head", "packed"):
                rows = tiles_for(kernel, d, group, capability()).rows
                sizes = {
                    "batch": batch, "heads": heads, "group": group, "N": n, "d": d, "rows": rows,
                    "dtype": str(dtype)[6:],
                }
                moved = 2 * batch * (heads // group * n + heads) * d * dtype.itemsize
                yield Case(
                    kernel, sizes, functools.partial(_make, kernel, (batch, heads, n, d), group, dtype, device),
                    4 * batch * heads * n * d, moved,
                    moved + 8 * (3 * n * d + 6 * n * group) + 24 * batch * heads * (d + 2),
                )


def _make(
    kernel: str, shape: tuple[int, int, int, int], group: int, dtype: torch.dtype, device: torch.device
) -> Work:
    batch, heads, n, d = shape
    torch.manual_seed(n + group)
    q = torch.randn(batch, heads, 1, d, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, heads // group, n, d, device=device, dtype=dtype)
    peers: dict[str, Callable[[], Any]] = {}
    if kernel == "packed":
        peers["SDPA, enable_gqa"] = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if kernel == "packed" and group == FLEX:
        peers["FlexAttention"] = lambda: _compiled_flex()(q, k, v, enable_gqa=True)
    return Work(lambda: decode(q, k, v, kernel=kernel)[0], functools.partial(_error, q, k, v), peers)


def _error(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[float, float]:
    """KV head by KV head; allowed is twice what plain attention makes in the same dtype."""
    need_same_shape(out, q)
    group, ours, same = q.shape[1] // k.shape[1], [], []
    for b in range(len(k)):
        for head in range(k.shape[1]):
            part = q[b, head * group : (head + 1) * group, 0], k[b, head], v[b, head]
            exact = _plain(*map(wide, part))
            ours.append(piece_error(out[b, head * group : (head + 1) * group, 0], exact))
            same.append(piece_error(_plain(*part), exact))
    return worst(ours), 2 * max(same) + 1e-4


def _plain(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A group's attention as three operations; [group, d], and [N, d] twice."""
    return (rows @ keys.mT * rows.shape[-1] ** -0.5).softmax(-1) @ values


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
