"""Absorbed decode behind one checked call, and the same in plain PyTorch as one MQA head."""

from math import e, log2

import torch
from torch import Tensor

from llmbook.block.attention_and_kv_cache.decode import choose_parts, decode_in_parts, multiprocessors
from llmbook.block.attention_and_kv_cache.kernel import merge_kernel
from llmbook.kit.kernels import DEVICE, capability, need_dtype, need_same_device, triton

from .kernel import latent_kernel
from .tiles import tiles_for


def decode_as_mqa(
    q: Tensor, rows: Tensor, latent: int, scale: float, parts: int = 1
) -> Tensor:
    """One query per head against one shared key, by the KV-cache chapter's code.

    Key and value are both the whole row; of the output, the columns that
    weighed rotary keys are dropped.

    q: [B, n_h, d_c + d_r]; rows: [B, T, d_c + d_r]. Returns [B, n_h, d_c].
    """
    q = q * (scale * q.shape[-1] ** 0.5)  # it divides by √ of the row's width
    k = rows[:, None]
    return decode_in_parts(q[:, :, None], k, k, parts)[:, :, 0, :latent]


def latent_decode(
    q: Tensor, rows: Tensor, lengths: Tensor, scale: float, *, latent: int = 512,
    table: Tensor | None = None, parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q · row · scale) c for one new token per sequence, by split-KV kernels.

    Args:
        q: [B, n_h, d_c + d_r]: the query taken down to the latent by W_UK,
            beside its rotary part; fp16, bf16 or fp32.
        rows: [B, T, d_c + d_r]; with a table, pages [pages, page, d_c + d_r].
        lengths: [B], int32, rows that each sequence has; 0 gives zeros.
        scale: of the scores: 1/√(nope + d_r), and YaRN's factor.
        latent: d_c; the rest is d_r; both powers of two, at least 16.
        table: [B, n], int32: page of tokens i·page to (i+1)·page − 1. Pages
            and lengths are trusted on a GPU: checking them would stop it.
        parts: chosen by the GPU's size if not given.

    Returns:
        Output [B, n_h, d_c] in q's dtype, to be taken up by W_UV; logsumexp
        [B, n_h], fp32.

    Raises:
        ValueError: shapes, dtypes, lengths or devices that do not go together.
    """
    check(q, rows, lengths, latent, table, parts)
    B, n_h, width = q.shape
    room = rows.shape[1] * (1 if table is None else table.shape[1])
    tiles = tiles_for(n_h, q.element_size(), capability())
    blocks = triton.cdiv(n_h, tiles.rows)
    parts = parts or choose_parts(B * blocks, room, multiprocessors())
    o, lse = q.new_empty(B, n_h, latent), q.new_empty(B, n_h, dtype=torch.float32)
    if not q.numel():
        return o, lse
    some, some_lse = (lse.new_empty(B, n_h, parts, *rest) for rest in ((latent,), ()))
    q, rows = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, rows))
    if table is None:  # a page as long as a sequence's rows, and one for each
        table = torch.arange(B, dtype=torch.int32, device=q.device)[:, None]
    table = table.contiguous()
    latent_kernel[(blocks * parts, B)](
        q, rows, some, some_lse, lengths.contiguous(), table, q.stride()[:2], rows.stride()[:2], table.stride(0), n_h,
        parts, rows.shape[1], scale * log2(e), LATENT=latent, ROPE=width - latent, **tiles.constants, **tiles.options,
    )
    merge_kernel[(B * n_h,)](
        some, some_lse, o, lse, parts, D=latent, WIDE=triton.next_power_of_2(parts), BLOCK=16
    )
    return o, lse


def check(q: Tensor, rows: Tensor, lengths: Tensor, latent: int, table: Tensor | None, parts: int | None) -> None:
    """Refuse what the kernel cannot do, in one sentence."""
    shapes = f"q {list(q.shape)}, rows {list(rows.shape)}, lengths {list(lengths.shape)}"
    if q.dim() != 3 or rows.dim() != 3 or q.shape[2] != rows.shape[2]:
        raise ValueError(f"q must be [B, n_h, d_c + d_r] and rows [B, T, d_c + d_r] (or pages), but got {shapes}")
    if lengths.shape != q.shape[:1] or (table is None and len(rows) != len(q)):
        raise ValueError(f"every sequence of q needs its length and its rows, but got {shapes}")
    widths = (latent, q.shape[2] - latent)
    if any(n < 16 or n & (n - 1) for n in widths):
        raise ValueError(f"d_c and d_r must be powers of two of at least 16, not {widths[0]} and {widths[1]}")
    need_dtype(torch.float16, torch.bfloat16, torch.float32, q=q, rows=rows)
    need_dtype(torch.int32, lengths=lengths, table=table)
    if table is not None and (table.dim() != 2 or len(table) != len(q)):
        raise ValueError(f"the page table must be [B, n] for the {len(q)} sequences of q, not {list(table.shape)}")
    if parts is not None and parts < 1:
        raise ValueError(f"parts must be 1 or more, not {parts}")
    need_same_device(q=q, rows=rows, lengths=lengths, table=table)
    room = rows.shape[1] * (1 if table is None else table.shape[1])
    seen = lengths.tolist() if DEVICE.type == "cpu" else []  # looking at them on a GPU would wait for it
    if any(not 0 <= n <= room for n in seen):
        raise ValueError(f"lengths must lie from 0 to {room}, the rows there are, but are {seen}")
    if seen and table is not None and any(not 0 <= page < len(rows) for page in table.flatten().tolist()):
        raise ValueError(f"the page table must name pages 0 to {len(rows) - 1}, but is {table.tolist()}")
