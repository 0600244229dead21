"""Absorbed decode in Triton: one latent row per token is key and value of all heads; long caches are cut in parts.

A program takes ROWS heads of one sequence and one part of its rows, which lie in pages [pages, page, d_c + d_r]; rows
reserved in advance are pages as long as they. The kernel of the chapter on attention and the KV cache merges the parts.
"""

from llmbook.block.attention_and_kv_cache.kernel import merge_kernel, part_of
from llmbook.kit.kernels import Build, dot, tl, triton

from .tiles import tiles_for


@triton.jit
def row_starts(keys, inside, rows_at, table_ptr, page):
    """Where these tokens' rows begin, [BN]."""
    which = tl.load(table_ptr + keys // page, mask=inside, other=0).to(tl.int64)
    return which * rows_at[0] + (keys % page).to(tl.int64) * rows_at[1]


@triton.jit
def tile(ptr, starts, inside, FROM: tl.constexpr, WIDE: tl.constexpr):
    """Columns FROM to FROM + WIDE of the rows that begin at `starts`."""
    columns = ptr + starts[:, None] + FROM + tl.arange(0, WIDE)[None, :]
    return tl.load(columns, mask=inside[:, None], other=0.0)


@triton.jit
def attend(acc, l, m, q, q_rope, c, k_rope, inside, scale):
    """Online softmax over one tile of rows; c is the key, and then the value."""
    s = dot(q, tl.trans(c))
    s += dot(q_rope, tl.trans(k_rope))
    s = tl.where(inside[None, :], s * scale, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # only NaN so far
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    acc = acc * alpha[:, None] + dot(p.to(c.dtype), c)
    return acc, l * alpha + tl.sum(p, 1), m_new


@triton.jit
def latent_kernel(
    q_ptr, rows_ptr, o_ptr, lse_ptr, length_ptr, table_ptr, q_at, rows_at, table_at,
    heads, parts, page, scale, LATENT: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr,
):
    """Output in the latent and log₂ Σ 2^s, of ROWS heads over one part of the rows."""
    blocks = tl.cdiv(heads, ROWS)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = tl.program_id(1)
    table_ptr += b * table_at
    head = block * ROWS + tl.arange(0, ROWS)
    mine = head < heads
    q_starts = tl.cast(b, tl.int64) * q_at[0] + head * q_at[1]
    q = tile(q_ptr, q_starts, mine, 0, LATENT)
    q_rope = tile(q_ptr, q_starts, mine, LATENT, ROPE)
    acc = tl.zeros((ROWS, LATENT), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    start, end = part_of(tl.load(length_ptr + b), part, parts, BN)
    for j in tl.range(start, end, BN):
        keys = j + tl.arange(0, BN)
        inside = keys < end
        at = row_starts(keys, inside, rows_at, table_ptr, page)
        c = tile(rows_ptr, at, inside, 0, LATENT)
        k_rope = tile(rows_ptr, at, inside, LATENT, ROPE)
        acc, l, m = attend(acc, l, m, q, q_rope, c, k_rope, inside, scale)
    l = tl.where(start < end, l, 1.0)  # an empty part: zeros, and −inf in the merge
    place = (tl.cast(b, tl.int64) * heads + head) * parts + part
    out = o_ptr + (place * LATENT)[:, None] + tl.arange(0, LATENT)[None, :]
    tl.store(out, acc / l[:, None], mask=mine[:, None])
    tl.store(lse_ptr + place, m + tl.log2(l), mask=mine)


_SIGNATURE = {
    "q_ptr": "*fp16", "rows_ptr": "*fp16", "o_ptr": "*fp32", "lse_ptr": "*fp32", "length_ptr": "*i32",
    "table_ptr": "*i32", "q_at": ("i32", "i32"), "rows_at": ("i32", "i32"), "table_at": "i32", "heads": "i32",
    "parts": "i32", "page": "i32", "scale": "fp32",
}
_MERGE = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "o_ptr": "*fp16", "lse_ptr": "*fp32", "parts": "i32"}


def _build(heads: int, element: int = 2) -> Build:
    dtype = "*fp16" if element == 2 else "*fp32"
    return Build(
        latent_kernel, _SIGNATURE | {"q_ptr": dtype, "rows_ptr": dtype},
        lambda sm: {"LATENT": 512, "ROPE": 64, **tiles_for(heads, element, sm).constants},
        options=lambda sm: tiles_for(heads, element, sm).options,
    )


BUILDS = [
    _build(128), _build(16), _build(128, 4),
    Build(merge_kernel, _MERGE, lambda sm: {"D": 512, "WIDE": 64, "BLOCK": 16}),
]
