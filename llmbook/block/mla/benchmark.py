"""What the mla chapter times: the absorbed decode kernel in rows and pages, and the forms from head to head."""

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.compare import half, need_same_shape, wide, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .cost import flop, traffic
from .decode import latent_decode
from .sizes import V3, Sizes

Shape = tuple[int, int, int]

# (batch, heads, tokens): DeepSeek-V3's 128 heads, and the 16 that each of 8 GPUs has under tensor parallelism. With 16
# the kernel is memory-bound, with 128 near the ridge.
SHAPES = tuple(
    (batch, heads, tokens) for heads in (16, 128) for batch, tokens in ((1, 65_536), (32, 4096), (128, 8192))
)
FROM_HEADS = ((8, 128, 4096),)
SMALL: dict[str, Any] = {
    "shapes": ((1, 16, 96), (2, 8, 70)), "from_heads": ((2, 8, 70),), "widths": Sizes(64, 16, 32, 16, 16, 16),
}
FLEX = (32, 16, 4096)  # the shape that FlexAttention is compiled for
PAGE = 64


def cases(
    device: torch.device = DEVICE, shapes: Iterable[Shape] = SHAPES, from_heads: Iterable[Shape] = FROM_HEADS,
    widths: Sizes = V3, dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """The kernel over rows and over pages per shape, then whole forms; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    for shape in shapes:
        for name, make in (("absorbed decode", _rows), ("absorbed decode, paged", _pages)):
            batch, heads, tokens = shape
            held = batch * (tokens * widths.row + heads * (widths.row + widths.latent)) * dtype.itemsize
            work = 2 * batch * heads * tokens * (widths.row + widths.latent)
            yield Case(
                name, _sizes(shape, dtype), partial(make, shape, widths, dtype, device), work, held,
                2 * held + 2**28 + _check(shape, widths),
            )
    for shape in from_heads:
        batch, heads, tokens = shape
        here = Sizes(widths.dim, heads, widths.latent, widths.nope, widths.rope, widths.v)
        held = (batch * tokens * widths.row + heads * (widths.nope + widths.v) * widths.latent) * dtype.itemsize
        yield Case(
            "from head to head", _sizes(shape, dtype), partial(_whole, shape, widths, dtype, device),
            sum(flop(here, "absorbed", 1, tokens, batch).values()),
            sum(traffic(here, "absorbed", 1, tokens, batch, dtype.itemsize).values()),
            2 * held + 2**28 + _check(shape, widths) + 2 * 8 * heads * (widths.nope + widths.v) * widths.latent,
        )


def _sizes(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(zip(("batch", "n_h", "tokens"), shape, strict=True)) | {"dtype": str(dtype)[6:]}


def _check(shape: Shape, s: Sizes) -> int:
    """Bytes of one sequence's reference in float64: its rows, its scores, and what the softmax makes of them."""
    _, heads, tokens = shape
    return 8 * (tokens * (s.row + s.latent) + 4 * heads * tokens + 3 * heads * s.row)


def _inputs(shape: Shape, s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, rows and lengths."""
    batch, heads, tokens = shape
    torch.manual_seed(tokens + batch)
    q = torch.randn(batch, heads, s.row, device=device, dtype=dtype)
    rows = torch.randn(batch, tokens, s.row, device=device, dtype=dtype)
    return q, rows, torch.full((batch,), tokens, device=device, dtype=torch.int32)


def _paged(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows in pages that lie in random order."""
    batch, tokens, width = rows.shape
    each = -(-tokens // PAGE)
    where = torch.randperm(batch * each, device=rows.device)
    padded = F.pad(rows, (0, 0, 0, each * PAGE - tokens)).view(batch * each, PAGE, width)
    pool = torch.empty_like(padded)
    pool[where] = padded
    return pool, where.view(batch, each).int()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _reference(q: Tensor, rows: Tensor, s: Sizes) -> Tensor:
    """One sequence in the reference's dtype: [n_h, d_c]."""
    rows = wide(rows)
    return (wide(q) @ rows.T * s.qk**-0.5).softmax(-1) @ rows[:, : s.latent]


def _error(q: Tensor, rows: Tensor, s: Sizes) -> Callable[[Tensor], tuple[float, float]]:
    """Against plain attention over the rows, sequence by sequence."""

    def error(out: Tensor) -> tuple[float, float]:
        need_same_shape(out, q[..., : s.latent])
        return worst_error((out[b], _reference(q[b], rows[b], s)) for b in range(len(q))), 2 * torch.finfo(q.dtype).eps

    return error


def _rows(shape: Shape, s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    q, rows, lengths = _inputs(shape, s, dtype, device)
    one, k, v, scale = q[:, :, None], rows[:, None], rows[:, None, :, : s.latent], s.qk**-0.5
    peers: dict[str, Callable[[], Any]] = {
        "SDPA, one MQA head": lambda: F.scaled_dot_product_attention(one, k, v, scale=scale, enable_gqa=True)[:, :, 0],
    }
    if shape == FLEX:
        peers["FlexAttention"] = lambda: _compiled_flex()(one, k, v, scale=scale, enable_gqa=True)[:, :, 0]
    return Work(
        lambda: latent_decode(q, rows, lengths, scale, latent=s.latent)[0], _error(q, rows, s), peers, _copy(rows)
    )


def _pages(shape: Shape, s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    q, rows, lengths = _inputs(shape, s, dtype, device)
    pool, table = _paged(rows)
    return Work(
        lambda: latent_decode(q, pool, lengths, s.qk**-0.5, latent=s.latent, table=table)[0], _error(q, rows, s), {},
        _copy(rows),
    )


def _copy(rows: Tensor) -> dict[str, Callable[[], Any]]:
    return {"copy of as many bytes": rows.flatten()[: rows.numel() // 2].clone}  # reads half, writes half


def _whole(shape: Shape, s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    """From the heads' queries to the heads' outputs, up-projections included: what the forms differ in."""
    batch, heads, _ = shape
    _, rows, lengths = _inputs(shape, s, dtype, device)
    q = torch.randn(batch, heads, 1, s.qk, device=device, dtype=dtype)
    up = torch.randn(heads, s.nope + s.v, s.latent, device=device, dtype=dtype) * s.latent**-0.5
    scale = s.qk**-0.5

    def absorbed() -> Tensor:
        down = torch.einsum("bhd,hdc->bhc", q[:, :, 0, : s.nope], up[:, : s.nope])
        o, _ = latent_decode(torch.cat((down, q[:, :, 0, s.nope :]), -1), rows, lengths, scale, latent=s.latent)
        return torch.einsum("bhc,hvc->bhv", o, up[:, s.nope :])

    def keys_and_values() -> tuple[Tensor, Tensor]:
        kv = (rows[..., : s.latent] @ up.flatten(0, 1).T).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_r = rows[:, None, :, s.latent :].expand(-1, heads, -1, -1)
        return torch.cat((kv[..., : s.nope], k_r), -1), kv[..., s.nope :]

    kept = functools.cache(keys_and_values)  # made once, at the check

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[:, :, 0]

    def exact(b: int, w: Tensor) -> Tensor:
        down = torch.einsum("hd,hdc->hc", wide(q[b, :, 0, : s.nope]), w[:, : s.nope])
        o = _reference(torch.cat((down, wide(q[b, :, 0, s.nope :])), -1), rows[b], s)
        return torch.einsum("hc,hvc->hv", o, w[:, s.nope :])

    def error(out: Tensor) -> tuple[float, float]:
        need_same_shape(out, torch.empty(batch, heads, s.v, device="meta"))
        w = wide(up)
        return worst_error((out[b], exact(b, w)) for b in range(batch)), 4 * torch.finfo(dtype).eps

    return Work(absorbed, error, {
        "rebuilt in every pass, SDPA": lambda: attend(*keys_and_values()),
        "kept per head, SDPA": lambda: attend(*kept()),
    })
