"""Decode attention as two Triton kernels: one query head per program, or a whole group's heads as rows of one tile.

One query per sequence. q is [batch, heads, 1, D], k and v [batch, kv_heads, n, D]; `*_at` are their strides (batch,
head, row). A program takes a share of the keys and writes its part of the output, [batch, heads, splits, D], with the
logsumexp by which `merge_kernel` weighs it. With one share the part is the output.
"""

from llmbook.kit.kernels import Build, dot, tl, triton

from .tiles import tiles_for

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(number, units, blocks):
    """Program → (sequence and KV head, block of its heads, share of the keys).

    The programs of a group are neighbours.
    """
    unit, split = number % units, number // units
    return (unit // blocks).to(tl.int64), unit % blocks, split


@triton.jit
def share(split, splits, n, BN: tl.constexpr):
    """The keys of one share: whole tiles, as equal as can be."""
    per = tl.cdiv(tl.cdiv(n, BN), splits) * BN
    return split * per, tl.minimum(n, (split + 1) * per)


@triton.jit
def tile_of(
    ptr, row_at, first, end, FROM: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr
):
    """BN rows from `first` on, columns FROM to FROM + WIDE; zeros from row `end` on."""
    row, col = tl.arange(0, BN)[:, None], FROM + tl.arange(0, WIDE)[None, :]
    # 64 bits for the tile's start: rows × stride passes 2³¹ in long contexts.
    address = ptr + tl.cast(first, tl.int64) * row_at + row * row_at + col
    return tl.load(address, mask=first + row < end, other=0.0)


@triton.jit
def assignment(
    lengths_ptr, kv_heads, blocks, n, splits, BN: tl.constexpr, RAGGED: tl.constexpr
):
    """Sequence and KV head, block, share, and the keys from `start` to `end`."""
    units = tl.num_programs(0) // splits
    which, block, split = place(tl.program_id(0), units, blocks)
    if RAGGED:
        n = tl.load(lengths_ptr + which // kv_heads)
    start, end = share(split, splits, n, BN)
    return which, block, split, start, end


@triton.jit
def weigh(s, seen, scale, l, m):
    """A tile's exponentials, the factor for what came before, new sums and maxima."""
    s = tl.where(seen, s * scale, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    return p, alpha, l * alpha + tl.sum(p, 1), m_new


@triton.jit
def per_head_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr, q_at, k_at, v_at,
    kv_heads, group, n, splits, scale,
    D: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr,
):
    """One query head: K and V stream past it, and again past the next of its group."""
    which, row, split, start, end = assignment(
        lengths_ptr, kv_heads, group, n, splits, BN, RAGGED
    )
    batch, kv = which // kv_heads, which % kv_heads
    q_ptr += batch * q_at[0] + (kv * group + row) * q_at[1]
    k_ptr += batch * k_at[0] + kv * k_at[1]
    v_ptr += batch * v_at[0] + kv * v_at[1]
    q = tl.load(q_ptr + tl.arange(0, D)[None, :]).to(tl.float32)
    acc = tl.zeros((D,), tl.float32)
    l = tl.zeros((1,), tl.float32)
    m = tl.full((1,), float("-inf"), tl.float32)
    for j in tl.range(start, end, BN):
        k = tile_of(k_ptr, k_at[2], j, end, 0, D, BN)
        v = tile_of(v_ptr, v_at[2], j, end, 0, D, BN)
        s = tl.sum(k.to(tl.float32) * q, 1)[None, :]  # no tensor core
        seen = (j + tl.arange(0, BN) < end)[None, :]
        p, alpha, l, m = weigh(s, seen, scale, l, m)
        acc = acc * alpha + tl.sum(tl.trans(p) * v.to(tl.float32), 0)
    l = tl.where(start < end, l, 1.0)  # no key: zeros, and −inf
    part = (which * group + row) * splits + split
    out = (acc / l).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + part * D + tl.arange(0, D), out)
    tl.store(lse_ptr + part + tl.arange(0, 1), (m + tl.log2(l)) / LOG2E)


@triton.jit
def packed_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr, q_at, k_at, v_at,
    kv_heads, group, n, splits, scale,
    D: tl.constexpr, TAIL: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr,
):
    """ROWS heads of one group: each tile of K and V is loaded once for all of them."""
    which, block, split, start, end = assignment(
        lengths_ptr, kv_heads, tl.cdiv(group, ROWS), n, splits, BN, RAGGED
    )
    batch, kv, first = which // kv_heads, which % kv_heads, block * ROWS
    q_ptr += batch * q_at[0] + kv * group * q_at[1]
    k_ptr += batch * k_at[0] + kv * k_at[1]
    v_ptr += batch * v_at[0] + kv * v_at[1]
    q = tile_of(q_ptr, q_at[1], first, group, 0, D, ROWS)
    if TAIL:  # MLA's rotary columns
        q_tail = tile_of(q_ptr, q_at[1], first, group, D, TAIL, ROWS)
    acc = tl.zeros((ROWS, D), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    for j in tl.range(start, end, BN):
        k = tile_of(k_ptr, k_at[2], j, end, 0, D, BN)
        s = dot(q, tl.trans(k))
        if TAIL:
            k_tail = tile_of(k_ptr, k_at[2], j, end, D, TAIL, BN)
            s += dot(q_tail, tl.trans(k_tail))
        seen = (j + tl.arange(0, BN) < end)[None, :]
        p, alpha, l, m = weigh(s, seen, scale, l, m)
        v = k if SHARED else tile_of(v_ptr, v_at[2], j, end, 0, D, BN)
        acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
    l = tl.where(start < end, l, 1.0)[:, None]
    row = first + tl.arange(0, ROWS)[:, None]
    part = (which * group + row) * splits + split
    at = o_ptr + part * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc / l).to(o_ptr.dtype.element_ty), mask=row < group)
    tl.store(lse_ptr + part, (m[:, None] + tl.log2(l)) / LOG2E, mask=row < group)


@triton.jit
def merge_kernel(part_ptr, part_lse_ptr, o_ptr, lse_ptr, splits, D: tl.constexpr):
    """One head's parts, weighed by their share of the sum of exponentials."""
    head = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, D)
    one = tl.arange(0, 1)
    acc = tl.zeros((D,), tl.float32)
    l = tl.zeros((1,), tl.float32)
    m = tl.full((1,), float("-inf"), tl.float32)
    for i in range(0, splits):
        part = head * splits + i
        lse = tl.load(part_lse_ptr + part + one) * LOG2E
        m_new = tl.maximum(m, lse)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # only empty parts so far
        weight, alpha = tl.exp2(lse - base), tl.exp2(m - base)
        l = l * alpha + weight
        acc = acc * alpha + weight * tl.load(part_ptr + part * D + col)
        m = m_new
    l = tl.where(l == 0, 1.0, l)
    tl.store(o_ptr + head * D + col, (acc / l).to(o_ptr.dtype.element_ty))
    tl.store(lse_ptr + head + one, (m + tl.log2(l)) / LOG2E)


STRIDES = ("i32", "i32", "i32")
SIGNATURE = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16"), "o_ptr": "*fp32", "lse_ptr": "*fp32",
    "lengths_ptr": "*i32", **dict.fromkeys(("q_at", "k_at", "v_at"), STRIDES),
    **dict.fromkeys(("kv_heads", "group", "n", "splits"), "i32"), "scale": "fp32",
}


def _build(kernel: str, d: int, group: int = 1) -> Build:
    def constants(sm: int) -> dict[str, int | bool]:
        return {**tiles_for(kernel, d, group, sm).constants, "RAGGED": True}

    jitted = per_head_kernel if kernel == "per head" else packed_kernel
    return Build(jitted, SIGNATURE, constants, options=lambda sm: tiles_for(kernel, d, group, sm).options)


BUILDS = [
    _build("per head", 64), _build("per head", 128), _build("packed", 64, 4), _build("packed", 128, 8),
    _build("packed", 128, 64), _build("packed", 576, 128),
    Build(
        merge_kernel, dict.fromkeys(("part_ptr", "part_lse_ptr", "o_ptr", "lse_ptr"), "*fp32") | {"splits": "i32"},
        lambda sm: {"D": 512},
    ),
]
