"""The same forward for Hopper and Blackwell: a copy engine (TMA) fetches the tiles, a persistent grid shares them out.

A tensor descriptor is made once per program: base, shape, strides, and the tile's shape. What lies outside the tensor
reads as zero and is not written, so that no mask is left on any load.
"""

from llmbook.kit.kernels import Build, tl, triton

from .kernel import LOG2E, SIGNATURE, key_range, sees, softmax_step, tile_of
from .tiles import tiles_for


@triton.jit
def stream_keys(
    acc, l, m, q, k_tiles, v_tiles, batch, head, rows, start, end, n_k, offset, scale,
    WIDE: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, SPLIT: tl.constexpr,
):
    """The tiles of keys from `start` to `end`, each fetched by one instruction."""
    # SPLIT: some warps only fetch, others only multiply (Blackwell; ignored on Hopper).
    for j in tl.range(start, end, BN, warp_specialize=SPLIT):
        k = k_tiles.load([batch, head, j, 0]).reshape(BN, WIDE)
        v = v_tiles.load([batch, head, j, 0]).reshape(BN, WIDE)
        keys = j + tl.arange(0, BN)[None, :]
        seen = keys < n_k
        if CAUSAL:
            seen = seen & (keys <= rows[:, None] + offset)
        acc, l, m = softmax_step(acc, l, m, q, k, v, seen, scale, MASKED)
    return acc, l, m


@triton.jit
def attend_tma_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_at, k_at, v_at, o_at,
    heads, group, n_q, n_k, scale, batches, D: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
):
    """As many programs as multiprocessors; each takes every num_programs-th tile."""
    kv_heads = heads // group
    q_tiles = tl.make_tensor_descriptor(
        q_ptr, [batches, heads, n_q, D], [q_at[0], q_at[1], q_at[2], 1], [1, 1, BM, WIDE]
    )
    o_tiles = tl.make_tensor_descriptor(
        o_ptr, [batches, heads, n_q, D], [o_at[0], o_at[1], o_at[2], 1], [1, 1, BM, WIDE]
    )
    k_tiles = tl.make_tensor_descriptor(
        k_ptr, [batches, kv_heads, n_k, D], [k_at[0], k_at[1], k_at[2], 1], [1, 1, BN, WIDE]
    )
    v_tiles = tl.make_tensor_descriptor(
        v_ptr, [batches, kv_heads, n_k, D], [v_at[0], v_at[1], v_at[2], 1], [1, 1, BN, WIDE]
    )
    blocks = tl.cdiv(n_q, BM)
    for number in tl.range(tl.program_id(0), blocks * batches * heads, tl.num_programs(0)):
        which, block = tile_of(number, blocks, CAUSAL)
        batch, head = (which // heads).to(tl.int32), (which % heads).to(tl.int32)
        q = q_tiles.load([batch, head, block * BM, 0]).reshape(BM, WIDE)
        rows = block * BM + tl.arange(0, BM)
        acc = tl.zeros((BM, WIDE), tl.float32)
        l = tl.zeros((BM,), tl.float32)
        m = tl.full((BM,), float("-inf"), tl.float32)
        free, end = key_range(block, n_q, n_k, BM, BN, CAUSAL)
        acc, l, m = stream_keys(
            acc, l, m, q, k_tiles, v_tiles, batch, head // group, rows, 0, free, n_k,
            n_k - n_q, scale, WIDE, BN, CAUSAL, False, SPLIT,
        )
        acc, l, m = stream_keys(
            acc, l, m, q, k_tiles, v_tiles, batch, head // group, rows, free, end, n_k,
            n_k - n_q, scale, WIDE, BN, CAUSAL, True, False,
        )
        l = tl.where(sees(rows, n_q, n_k, CAUSAL), l, 1.0)
        acc = acc / l[:, None]
        acc = acc.to(o_ptr.dtype.element_ty).reshape(1, 1, BM, WIDE)
        o_tiles.store([batch, head, block * BM, 0], acc)
        lse = (m + tl.log2(l)) / LOG2E
        tl.store(lse_ptr + which * n_q + rows, lse, mask=rows < n_q)


def _build(d: int, causal: bool, split: bool | None = None, targets: tuple[int, ...] = (90, 100)) -> Build:
    def constants(sm: int) -> dict[str, int | bool]:
        tiles = tiles_for("tma", d, sm)
        return {"D": d, "WIDE": d, "BM": tiles.BM, "BN": tiles.BN, "CAUSAL": causal,
                "SPLIT": tiles.split if split is None else split}

    return Build(
        attend_tma_kernel, {**SIGNATURE, "batches": "i32"}, constants, targets=targets,
        options=lambda sm: tiles_for("tma", d, sm).options,
    )


BUILDS = [
    *(_build(d, causal) for d, causal in ((64, True), (128, False), (128, True), (256, True))),
    _build(64, True, split=True, targets=(90,)),  # to see what asking for it brings on Hopper
]
