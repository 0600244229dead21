"""What the mla chapter times: the absorbed decode kernel in rows and pages, and the forms from head to head."""

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from .cost import flop, traffic
from .decode import latent_decode
from .sizes import V3, Sizes

# (batch, heads, tokens): DeepSeek-V3's 128 heads, and the 16 that each of 8 GPUs has under tensor parallelism. With 16
# the kernel is memory-bound, with 128 near the ridge.
SHAPES = tuple(
    (batch, heads, tokens) for heads in (16, 128) for batch, tokens in ((1, 65_536), (32, 4096), (128, 8192))
)
FROM_HEADS = ((32, 128, 4096),)
PAGE = 64


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int, int]] = SHAPES,
    from_heads: Iterable[tuple[int, int, int]] = FROM_HEADS, widths: Sizes = V3, dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """The kernel over rows and over pages per shape, then whole forms; bf16 where the GPU has it."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for batch, heads, tokens in shapes:
        torch.manual_seed(tokens + batch)
        q = torch.randn(batch, heads, widths.row, device=device, dtype=dtype)
        rows = torch.randn(batch, tokens, widths.row, device=device, dtype=dtype)
        lengths = torch.full((batch,), tokens, device=device, dtype=torch.int32)
        run = partial(latent_decode, q, rows, lengths, widths.qk**-0.5, latent=widths.latent)
        yield _kernel("absorbed decode", widths, q, rows, run)
        pool, table = _paged(rows)
        paged = partial(latent_decode, q, pool, lengths, widths.qk**-0.5, latent=widths.latent, table=table)
        yield _kernel("absorbed decode, paged", widths, q, rows, paged)
    for batch, heads, tokens in from_heads:
        yield _whole(batch, heads, tokens, widths, dtype, device)


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
    """One sequence in float64: [n_h, d_c]."""
    p = (q.double() @ rows.double().T * s.qk**-0.5).softmax(-1)
    return p @ rows[:, : s.latent].double()


def _worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    errors = [relative_error(ours, right) for ours, right in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _kernel(name: str, s: Sizes, q: Tensor, rows: Tensor, run: Callable[[], Any]) -> Case:
    (batch, heads, _), tokens = q.shape, rows.shape[1]
    one, k, v = q[:, :, None], rows[:, None], rows[:, None, :, : s.latent]

    def error(result: tuple[Tensor, Tensor]) -> tuple[float, float]:
        ends = {0, batch - 1}  # float64 of all would not fit
        return _worst((result[0][b], _reference(q[b], rows[b], s)) for b in ends), 2 * torch.finfo(q.dtype).eps

    return Case(
        name, {"batch": batch, "n_h": heads, "tokens": tokens, "dtype": str(q.dtype)[6:]}, run, error,
        2 * batch * heads * tokens * (s.row + s.latent),
        rows.nbytes + q.nbytes + batch * heads * s.latent * q.element_size(),
        {
            "SDPA, one MQA head": partial(
                F.scaled_dot_product_attention, one, k, v, scale=s.qk**-0.5, enable_gqa=True
            ),
            "FlexAttention": lambda: _compiled_flex()(one, k, v, scale=s.qk**-0.5, enable_gqa=True),
            "copy of as many bytes": rows.flatten()[: rows.numel() // 2].clone,  # reads half, writes half
        },
    )


def _whole(batch: int, heads: int, tokens: int, s: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """From the heads' queries to the heads' outputs, up-projections included: what the forms differ in."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, 1, s.qk, device=device, dtype=dtype)
    rows = torch.randn(batch, tokens, s.row, device=device, dtype=dtype)
    up = torch.randn(heads, s.nope + s.v, s.latent, device=device, dtype=dtype) * s.latent**-0.5
    lengths = torch.full((batch,), tokens, device=device, dtype=torch.int32)
    scale, sizes = s.qk**-0.5, {"batch": batch, "n_h": heads, "tokens": tokens, "dtype": str(dtype)[6:]}

    def absorbed() -> Tensor:
        down = torch.einsum("bhd,hdc->bhc", q[:, :, 0, : s.nope], up[:, : s.nope])
        o, _ = latent_decode(torch.cat((down, q[:, :, 0, s.nope :]), -1), rows, lengths, scale, latent=s.latent)
        return torch.einsum("bhc,hvc->bhv", o, up[:, s.nope :])

    def keys_and_values() -> tuple[Tensor, Tensor]:
        kv = (rows[..., : s.latent] @ up.flatten(0, 1).T).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_r = rows[:, None, :, s.latent :].expand(-1, heads, -1, -1)
        return torch.cat((kv[..., : s.nope], k_r), -1), kv[..., s.nope :]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def error(result: Tensor) -> tuple[float, float]:
        down = torch.einsum("hd,hdc->hc", q[0, :, 0, : s.nope].double(), up[:, : s.nope].double())
        right = _reference(torch.cat((down, q[0, :, 0, s.nope :].double()), -1), rows[0], s)
        return relative_error(result[0], torch.einsum("hc,hvc->hv", right, up[:, s.nope :].double())), \
            4 * torch.finfo(dtype).eps

    here = Sizes(s.dim, heads, s.latent, s.nope, s.rope, s.v)
    return Case(
        "from head to head", sizes, absorbed, error, sum(flop(here, "absorbed", 1, tokens, batch).values()),
        sum(traffic(here, "absorbed", 1, tokens, batch, dtype.itemsize).values()),
        {
            "rebuilt in every pass, SDPA": lambda: attend(*keys_and_values()),
            "kept per head, SDPA": _kept(keys_and_values, attend),
        },
    )


def _kept(
    make: Callable[[], tuple[Tensor, Tensor]], attend: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Attention over keys and values that are made once, at the first call (a warm-up)."""
    made = functools.cache(make)
    return lambda: attend(*made())
