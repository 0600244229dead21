"""FlashAttention-2's forward as a Triton kernel for any GPU: one program per block of queries, K and V stream past it.

Tensors are [batch, heads, N, d]; `*_at` are their strides (batch, head, row), so that views need no copy. A head
dimension that is no power of two is padded to WIDE with zeros, on the chip only.
"""

from llmbook.kit.kernels import Build, dot, tl, triton

from .tiles import tiles_for

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_step(acc, l, m, q, k, v, seen, scale, MASKED: tl.constexpr):
    """One tile of keys: scores, running maximum and sum, product with V."""
    s = dot(q, tl.trans(k))
    # In units of log 2: scale is log₂e/√d, and exp2 is one instruction.
    if MASKED:
        s = tl.where(seen, s * scale, float("-inf"))  # −∞ · 0 would be NaN
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that saw no key has m = −∞, and −∞ − (−∞) is NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
    else:  # scale ≥ 0: the row's largest score is the largest product, scaled
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        base = m_new
        p = tl.exp2(s * scale - base[:, None])
    alpha = tl.exp2(m - base)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
    return acc, l, m_new


@triton.jit
def tile_at(ptr, at, first, n, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Addresses of ROWS rows from `first` on, and which of them exist."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)[None, :]
    # 64 bits for the tile's start: rows × stride passes 2³¹ in long contexts.
    address = ptr + tl.cast(first, tl.int64) * at[2] + row * at[2] + col
    inside = first + row < n
    return address, inside if D == WIDE else inside & (col < D)


@triton.jit
def attend_keys(
    acc, l, m, q, k_ptr, v_ptr, k_at, v_at, rows, start, end, n_k, offset, scale,
    D: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):
    """The tiles of keys from `start` to `end`; only those at an edge are MASKED."""
    for j in tl.range(start, end, BN):
        k_tile, inside = tile_at(k_ptr, k_at, j, n_k, D, WIDE, BN)
        v_tile, _ = tile_at(v_ptr, v_at, j, n_k, D, WIDE, BN)
        if MASKED or D != WIDE:
            k = tl.load(k_tile, mask=inside, other=0.0)
            v = tl.load(v_tile, mask=inside, other=0.0)
        else:
            k, v = tl.load(k_tile), tl.load(v_tile)
        keys = j + tl.arange(0, BN)[None, :]
        seen = keys < n_k
        if CAUSAL:
            seen = seen & (keys <= rows[:, None] + offset)
        acc, l, m = softmax_step(acc, l, m, q, k, v, seen, scale, MASKED)
    return acc, l, m


@triton.jit
def key_range(
    block, n_q, n_k, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    """Where a block's keys end, and up to where no tile needs a mask."""
    end, free = n_k, n_k // BN * BN
    if CAUSAL:  # bottom-right: the last query sees the last key
        offset = n_k - n_q
        end = tl.maximum(tl.minimum(n_k, block * BM + BM + offset), 0)
        free = tl.minimum(free, tl.maximum(block * BM + offset + 1, 0) // BN * BN)
    return free, end


@triton.jit
def sees(rows, n_q, n_k, CAUSAL: tl.constexpr):
    """Which rows see a key: by their place, since a score may be anything."""
    return rows + n_k >= n_q if CAUSAL else n_k > 0


@triton.jit
def tile_of(number, blocks, CAUSAL: tl.constexpr):
    """Head by head, so that K and V stay in L2; in a head the longest rows first."""
    which, block = (number // blocks).to(tl.int64), number % blocks
    if CAUSAL:
        block = blocks - 1 - block
    return which, block


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_at, k_at, v_at, o_at,
    heads, group, n_q, n_k, scale, D: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):
    """O and logsumexp of BM queries of one head."""
    which, block = tile_of(tl.program_id(0), tl.cdiv(n_q, BM), CAUSAL)
    batch, head = which // heads, which % heads
    q_ptr += batch * q_at[0] + head * q_at[1]
    k_ptr += batch * k_at[0] + head // group * k_at[1]
    v_ptr += batch * v_at[0] + head // group * v_at[1]
    q_tile, inside = tile_at(q_ptr, q_at, block * BM, n_q, D, WIDE, BM)
    q = tl.load(q_tile, mask=inside, other=0.0)
    rows = block * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, WIDE), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    free, end = key_range(block, n_q, n_k, BM, BN, CAUSAL)
    acc, l, m = attend_keys(
        acc, l, m, q, k_ptr, v_ptr, k_at, v_at, rows, 0, free, n_k, n_k - n_q,
        scale, D, WIDE, BN, CAUSAL, False,
    )
    acc, l, m = attend_keys(
        acc, l, m, q, k_ptr, v_ptr, k_at, v_at, rows, free, end, n_k, n_k - n_q,
        scale, D, WIDE, BN, CAUSAL, True,
    )
    l = tl.where(sees(rows, n_q, n_k, CAUSAL), l, 1.0)  # else zeros, and −inf
    acc = acc / l[:, None]
    o_ptr += batch * o_at[0] + head * o_at[1]
    o_tile, _ = tile_at(o_ptr, o_at, block * BM, n_q, D, WIDE, BM)
    tl.store(o_tile, acc.to(o_ptr.dtype.element_ty), mask=inside)
    lse = (m + tl.log2(l)) / LOG2E
    tl.store(lse_ptr + which * n_q + rows, lse, mask=rows < n_q)


STRIDES = ("i32", "i32", "i32")
SIGNATURE = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*fp16"), "lse_ptr": "*fp32",
    **dict.fromkeys(("q_at", "k_at", "v_at", "o_at"), STRIDES),
    **dict.fromkeys(("heads", "group", "n_q", "n_k"), "i32"), "scale": "fp32",
}


def _build(d: int, causal: bool) -> Build:
    def constants(sm: int) -> dict[str, int | bool]:
        tiles = tiles_for("forward", d, sm)
        return {"D": d, "WIDE": d, "BM": tiles.BM, "BN": tiles.BN, "CAUSAL": causal}

    return Build(attend_kernel, SIGNATURE, constants, options=lambda sm: tiles_for("forward", d, sm).options)


BUILDS = [_build(d, causal) for d, causal in ((64, False), (128, True), (256, True))]
