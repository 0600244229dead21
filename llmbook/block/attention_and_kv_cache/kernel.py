"""Split-KV decoding (flash-decoding) in Triton: parts of one sequence's keys on many multiprocessors, then a merge.

One program reads one part of one KV head for all query heads that share it; they are rows of one tile. K and V lie
in rows, [batch, n_kv, T, d], or in pages, [pages, n_kv, page, d]; `*_at` are strides (sequence or page, head, token).
"""

from llmbook.kit.generations import family
from llmbook.kit.kernels import Build, dot, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def read_tile(
    ptr, at, keys, inside, b, head, table_ptr, table_at,
    D: tl.constexpr, PAGE: tl.constexpr,
):
    """These keys' rows, [BN, D]: in their sequence's row (PAGE = 0), or in pages."""
    if PAGE == 0:
        start = tl.cast(b, tl.int64) * at[0] + keys.to(tl.int64) * at[2]
    else:
        entry = table_ptr + b * table_at + keys // PAGE
        page = tl.load(entry, mask=inside, other=0).to(tl.int64)
        start = page * at[0] + (keys % PAGE).to(tl.int64) * at[2]
    start += tl.cast(head, tl.int64) * at[1]
    rows = ptr + start[:, None] + tl.arange(0, D)[None, :]
    return tl.load(rows, mask=inside[:, None], other=0.0)


@triton.jit
def absorb(acc, l, m, q, k, v, inside, scale):
    """Online softmax: one tile of keys for all query heads of the group."""
    s = tl.where(inside[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))  # finite: a tile has at least one key
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
    return acc, l * alpha + tl.sum(p, 1), m_new


@triton.jit
def part_of(length, part, parts, BN: tl.constexpr):
    """The keys of one part: whole tiles, dealt out by the sequence's own length."""
    each = tl.cdiv(tl.cdiv(length, BN), parts) * BN
    return part * each, tl.minimum(part * each + each, length)


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, length_ptr, table_ptr,
    q_at, k_at, v_at, table_at, kv_heads, parts, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Output and log₂ Σ 2^s of one part of a KV head, for its group of query heads."""
    part, which = tl.program_id(0), tl.program_id(1)
    b, head = which // kv_heads, which % kv_heads
    row, col = tl.arange(0, ROWS), tl.arange(0, D)
    mine = (row < GROUP)[:, None]  # the matrix unit wants 16 rows; the rest are idle
    q_ptr += tl.cast(b, tl.int64) * q_at[0] + head * GROUP * q_at[1]
    q = tl.load(q_ptr + row[:, None] * q_at[1] + col[None, :], mask=mine, other=0.0)
    acc = tl.zeros((ROWS, D), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    start, end = part_of(tl.load(length_ptr + b), part, parts, BN)
    for j in tl.range(start, end, BN):
        keys = j + tl.arange(0, BN)
        inside = keys < end
        k = read_tile(k_ptr, k_at, keys, inside, b, head, table_ptr, table_at, D, PAGE)
        v = read_tile(v_ptr, v_at, keys, inside, b, head, table_ptr, table_at, D, PAGE)
        acc, l, m = absorb(acc, l, m, q, k, v, inside, scale)
    l = tl.where(start < end, l, 1.0)  # an empty part: zeros, and −inf in the merge
    rows = (tl.cast(which, tl.int64) * GROUP + row) * parts + part
    out = o_ptr + (rows * D)[:, None] + col[None, :]
    tl.store(out, acc / l[:, None], mask=mine)
    tl.store(lse_ptr + rows, m + tl.log2(l), mask=row < GROUP)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, parts,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One query head: its parts weighted by their share of the sum of exponentials."""
    which = tl.program_id(0).to(tl.int64)
    every, col = tl.arange(0, WIDE), tl.arange(0, D)
    part_lse_ptr += which * parts
    sums = tl.load(part_lse_ptr + every, mask=every < parts, other=float("-inf"))
    m = tl.max(sums, 0)
    base = tl.where(m == float("-inf"), 0.0, m)  # no key at all: −inf − (−inf) is NaN
    total = tl.sum(tl.exp2(sums - base), 0)
    acc = tl.zeros((D,), tl.float32)
    for first in tl.range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        lse = tl.load(part_lse_ptr + part, mask=part < parts, other=float("-inf"))
        weight = tl.exp2(lse - base)
        rows = part_ptr + ((which * parts + part) * D)[:, None] + col[None, :]
        tile = tl.load(rows, mask=(part < parts)[:, None], other=0.0)
        acc += tl.sum(tile * weight[:, None], 0)
    total = tl.where(total == 0, 1.0, total)
    acc = acc / total
    tl.store(o_ptr + which * D + col, acc.to(o_ptr.dtype.element_ty))
    tl.store(lse_ptr + which, (m + tl.log2(total)) / LOG2E)


def rows_of(group: int) -> int:
    """Rows of the tile of query heads: what the matrix unit wants at least, or the power of two that holds them."""
    return max(16, triton.next_power_of_2(group))


def most_rows(d: int, sm: int) -> int:
    """The most query heads of one KV head that fit in shared memory beside a tile of keys."""
    return (8192 if family(sm) == 75 else 16_384) // d


def tiles(d: int, rows: int, sm: int) -> tuple[int, dict[str, int]]:
    """Keys per tile and launch options: several tiles in flight hide the latency of HBM, where shared memory allows."""
    warps = 8 if rows >= 64 or rows * d >= 8192 else 4
    if family(sm) == 75:
        return 32 if d <= 64 else 16, {"num_warps": warps, "num_stages": 1}
    return 32 if d > 128 else 64, {"num_warps": warps, "num_stages": 2 if family(sm) == 89 else 3}


_PART = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16"), "o_ptr": "*fp32", "lse_ptr": "*fp32",
    "length_ptr": "*i32", "table_ptr": "*i32", "q_at": ("i32", "i32"),
    **dict.fromkeys(("k_at", "v_at"), ("i32", "i32", "i32")), **dict.fromkeys(("table_at", "kv_heads", "parts"), "i32"),
    "scale": "fp32",
}
_MERGE = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "o_ptr": "*fp16", "lse_ptr": "*fp32", "parts": "i32"}


def _build(d: int, page: int) -> Build:
    def constants(sm: int) -> dict[str, int]:
        return {"GROUP": 8, "ROWS": 16, "D": d, "BN": tiles(d, 16, sm)[0], "PAGE": page}

    return Build(part_kernel, _PART, constants, options=lambda sm: tiles(d, 16, sm)[1])


BUILDS = [
    _build(64, 0), _build(128, 0), _build(128, 16),
    Build(merge_kernel, _MERGE, lambda sm: {"D": 128, "WIDE": 64, "BLOCK": 16}),
]
