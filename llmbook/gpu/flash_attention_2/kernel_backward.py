"""The backward in three kernels: D = rowsum(dO ∘ O), then dK and dV by blocks of keys, dQ by blocks of queries.

P is recomputed from Q, K and the logsumexp in both of the last two: seven products instead of the five of one fused
kernel, but every gradient has one writer. No atomics, and the same bits on every run.
"""

from llmbook.kit.kernels import Build, dot, tl, triton

from .kernel import LOG2E, STRIDES, key_range, tile_at, tile_of
from .tiles import tiles_for


@triton.jit
def delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, o_at, do_at, heads, n_q,
    D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr,
):
    """D_i = Σ dO_i ∘ O_i − dL_i: all that the softmax's Jacobian needs of a row."""
    which, block = tile_of(tl.program_id(0), tl.cdiv(n_q, BM), False)
    batch, head, first = which // heads, which % heads, block * BM
    o_tile, inside = tile_at(o_ptr + batch * o_at[0] + head * o_at[1], o_at, first, n_q, D, WIDE, BM)
    do_tile, _ = tile_at(do_ptr + batch * do_at[0] + head * do_at[1], do_at, first, n_q, D, WIDE, BM)
    o = tl.load(o_tile, mask=inside, other=0.0).to(tl.float32)
    do = tl.load(do_tile, mask=inside, other=0.0).to(tl.float32)
    rows = first + tl.arange(0, BM)
    dlse = tl.load(dlse_ptr + which * n_q + rows, mask=rows < n_q, other=0.0)
    tl.store(delta_ptr + which * n_q + rows, tl.sum(o * do, 1) - dlse, mask=rows < n_q)


@triton.jit
def gather_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_at, do_at, keys, start, n_q,
    offset, scale, D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """What the queries from `start` on add to dK and dV of one block of keys."""
    for i in tl.range(start, n_q, BM):
        q_tile, inside = tile_at(q_ptr, q_at, i, n_q, D, WIDE, BM)
        do_tile, _ = tile_at(do_ptr, do_at, i, n_q, D, WIDE, BM)
        q = tl.load(q_tile, mask=inside, other=0.0)
        do = tl.load(do_tile, mask=inside, other=0.0)
        rows = i + tl.arange(0, BM)
        lse = tl.load(lse_ptr + rows, mask=rows < n_q, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < n_q, other=0.0)
        # Transposed tiles: keys down, queries across.
        s = dot(k, tl.trans(q)) * scale - (lse * LOG2E)[None, :]
        if CAUSAL:
            s = tl.where(keys[:, None] <= rows[None, :] + offset, s, float("-inf"))
        p = tl.exp2(s)
        dv += dot(p.to(do.dtype), do)
        ds = p * (dot(v, tl.trans(do)) - delta[None, :])
        dk += dot(ds.to(q.dtype), q)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_at, k_at, v_at, do_at, dk_at, dv_at,
    kv_heads, group, n_q, n_k, scale, D: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):
    """dK and dV of BN keys of one KV head: all queries of all heads that share it."""
    which, block = tile_of(tl.program_id(0), tl.cdiv(n_k, BN), False)
    batch, kv_head, first = which // kv_heads, which % kv_heads, block * BN
    k_tile, inside = tile_at(k_ptr + batch * k_at[0] + kv_head * k_at[1], k_at, first, n_k, D, WIDE, BN)
    v_tile, _ = tile_at(v_ptr + batch * v_at[0] + kv_head * v_at[1], v_at, first, n_k, D, WIDE, BN)
    k = tl.load(k_tile, mask=inside, other=0.0)
    v = tl.load(v_tile, mask=inside, other=0.0)
    keys = first + tl.arange(0, BN)
    dk = tl.zeros((BN, WIDE), tl.float32)
    dv = tl.zeros((BN, WIDE), tl.float32)
    offset = n_k - n_q
    start = 0
    if CAUSAL:  # the first query that sees a key of this block
        start = tl.maximum(first - offset, 0) // BM * BM
    for head in tl.range(kv_head * group, kv_head * group + group, disable_licm=True):
        at = (batch * kv_heads * group + head) * n_q
        dk, dv = gather_queries(
            dk, dv, k, v, q_ptr + batch * q_at[0] + head * q_at[1], do_ptr + batch * do_at[0] + head * do_at[1],
            lse_ptr + at, delta_ptr + at, q_at, do_at, keys, start, n_q, offset, scale, D, WIDE, BM, CAUSAL,
        )
    dk_tile, _ = tile_at(dk_ptr + batch * dk_at[0] + kv_head * dk_at[1], dk_at, first, n_k, D, WIDE, BN)
    dv_tile, _ = tile_at(dv_ptr + batch * dv_at[0] + kv_head * dv_at[1], dv_at, first, n_k, D, WIDE, BN)
    tl.store(dk_tile, (dk * (scale / LOG2E)).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_at, v_at, rows, start, end, n_k, offset, scale,
    D: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):
    """What the keys from `start` to `end` add to dQ of one block of queries."""
    for j in tl.range(start, end, BN):
        k_tile, inside = tile_at(k_ptr, k_at, j, n_k, D, WIDE, BN)
        v_tile, _ = tile_at(v_ptr, v_at, j, n_k, D, WIDE, BN)
        k = tl.load(k_tile, mask=inside, other=0.0)
        v = tl.load(v_tile, mask=inside, other=0.0)
        s = dot(q, tl.trans(k)) * scale - (lse * LOG2E)[:, None]
        if MASKED:
            keys = j + tl.arange(0, BN)[None, :]
            seen = keys < n_k
            if CAUSAL:
                seen = seen & (keys <= rows[:, None] + offset)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s)
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        dq += dot(ds.to(k.dtype), k)
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, q_at, k_at, v_at, do_at, dq_at,
    heads, group, n_q, n_k, scale, D: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):
    """dQ of BM queries of one head."""
    which, block = tile_of(tl.program_id(0), tl.cdiv(n_q, BM), CAUSAL)
    batch, head = which // heads, which % heads
    q_tile, inside = tile_at(q_ptr + batch * q_at[0] + head * q_at[1], q_at, block * BM, n_q, D, WIDE, BM)
    do_tile, _ = tile_at(do_ptr + batch * do_at[0] + head * do_at[1], do_at, block * BM, n_q, D, WIDE, BM)
    q = tl.load(q_tile, mask=inside, other=0.0)
    do = tl.load(do_tile, mask=inside, other=0.0)
    rows = block * BM + tl.arange(0, BM)
    lse = tl.load(lse_ptr + which * n_q + rows, mask=rows < n_q, other=0.0)
    delta = tl.load(delta_ptr + which * n_q + rows, mask=rows < n_q, other=0.0)
    k_ptr += batch * k_at[0] + head // group * k_at[1]
    v_ptr += batch * v_at[0] + head // group * v_at[1]
    dq = tl.zeros((BM, WIDE), tl.float32)
    free, end = key_range(block, n_q, n_k, BM, BN, CAUSAL)
    dq = gather_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_at, v_at, rows, 0, free, n_k, n_k - n_q, scale,
        D, WIDE, BN, CAUSAL, False,
    )
    dq = gather_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_at, v_at, rows, free, end, n_k, n_k - n_q, scale,
        D, WIDE, BN, CAUSAL, True,
    )
    dq_tile, _ = tile_at(dq_ptr + batch * dq_at[0] + head * dq_at[1], dq_at, block * BM, n_q, D, WIDE, BM)
    tl.store(dq_tile, (dq * (scale / LOG2E)).to(dq_ptr.dtype.element_ty), mask=inside)


def _signature(*pointers: str) -> dict[str, object]:
    """Every gradient's kernel reads q, k, v, dO and writes its own; strides follow the pointers' names."""
    tensors = ("q", "k", "v", "do", *pointers)
    sizes = dict.fromkeys(("heads", "kv_heads", "group", "n_q", "n_k"), "i32")
    return {
        **{f"{name}_ptr": "*fp16" for name in tensors}, **{f"{name}_at": STRIDES for name in tensors},
        "lse_ptr": "*fp32", "delta_ptr": "*fp32", **sizes, "scale": "fp32",
    }


def _build(kernel: object, kind: str, written: tuple[str, ...], d: int, causal: bool) -> Build:
    def constants(sm: int) -> dict[str, int | bool]:
        tiles = tiles_for(kind, d, sm)
        return {"D": d, "WIDE": d, "BM": tiles.BM, "BN": tiles.BN, "CAUSAL": causal}

    # On sm_75 tiles of d = 256 spill whatever their size: it runs there, slowly, and is left out of the check.
    targets = (80, 89, 90, 100, 120) if d > 128 else None
    return Build(
        kernel, _signature(*written), constants, targets=targets, options=lambda sm: tiles_for(kind, d, sm).options
    )


BUILDS = [
    _build(kernel, kind, written, d, True)
    for d in (64, 128, 256)
    for kernel, kind, written in ((dkdv_kernel, "dkdv", ("dk", "dv")), (dq_kernel, "dq", ("dq",)))
]
