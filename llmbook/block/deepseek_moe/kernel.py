"""Grouped GEMM in Triton: all experts' products in one launch, however uneven their rows.

Rows of X are sorted by expert; `ends[e]` is where expert e's rows end. Every program finds its expert by itself, from
the ends alone, so nobody waits for the GPU to learn the loads. `*_at` are strides; a tensor's other stride is 1.
"""

from llmbook.kit.generations import family
from llmbook.kit.kernels import Build, dot, tl, triton


@triton.jit
def rows_of(ends_ptr, expert):
    """The first row of an expert, and its end."""
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(ends_ptr + expert)


@triton.jit
def find_tile(ends_ptr, tile, experts, BM: tl.constexpr, WIDE: tl.constexpr):
    """Whose row tile this is, and its number among that expert's tiles."""
    e = tl.arange(0, WIDE)
    end = tl.load(ends_ptr + e, mask=e < experts, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = tl.cdiv(end - start, BM)  # 0 if nobody came
    passed = (tl.cumsum(tiles, 0) <= tile) & (e < experts)
    expert = tl.sum(passed.to(tl.int32), 0)
    return expert, tile - tl.sum(tl.where(passed, tiles, 0), 0)


@triton.jit
def place(number, row_tiles, column_tiles, TALL: tl.constexpr):
    """TALL row tiles share a column of W while it is in L2, then the next column."""
    band = number // (TALL * column_tiles)
    tall = tl.minimum(row_tiles - band * TALL, TALL)
    within = number % (TALL * column_tiles)
    return band * TALL + within % tall, within // tall


@triton.jit
def grouped_kernel(
    x_ptr, w_ptr, y_ptr, ends_ptr, x_at, w_at, y_at, experts, row_tiles, n, k,
    TRANSPOSED: tl.constexpr, FULL: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """Y = X_e W_e on one tile of one expert's rows. W: [E, k, n], or W's transpose."""
    tile, column = place(tl.program_id(0), row_tiles, tl.cdiv(n, BN), TALL)
    expert, inner = find_tile(ends_ptr, tile, experts, BM, WIDE)
    if expert < experts:  # there are fewer tiles than programs if loads are uneven
        start, end = rows_of(ends_ptr, expert)
        first_row = start + inner * BM
        row, col = tl.arange(0, BM), column * BN + tl.arange(0, BN)
        step = tl.arange(0, BK)
        # Rows past the end are another's, or nobody's: read the last, store none.
        from_row = tl.minimum(row, end - 1 - first_row)
        # 64 bits for where a tile starts, 32 inside it: fewer registers.
        x_ptr += first_row.to(tl.int64) * x_at[0]
        w_ptr += expert.to(tl.int64) * w_at[0]
        acc = tl.zeros((BM, BN), tl.float32)
        for first in tl.range(0, k, BK):
            x_tile = x_ptr + from_row[:, None] * x_at[0] + step[None, :]
            if TRANSPOSED:
                w_tile = w_ptr + step[:, None] + col[None, :] * w_at[1]
            else:
                w_tile = w_ptr + step[:, None] * w_at[1] + col[None, :]
            if FULL:
                x, w = tl.load(x_tile), tl.load(w_tile)
            else:
                left = k - first
                x = tl.load(x_tile, mask=step[None, :] < left, other=0.0)
                inside = (step[:, None] < left) & (col[None, :] < n)
                w = tl.load(w_tile, mask=inside, other=0.0)
            acc += dot(x, w)
            x_ptr += BK
            w_ptr += BK if TRANSPOSED else BK * w_at[1]
        y_ptr += first_row.to(tl.int64) * y_at[0]
        mine = (first_row + row < end)[:, None] & (col < n)[None, :]
        y_tile = y_ptr + row[:, None] * y_at[0] + col[None, :]
        tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def weight_kernel(
    x_ptr, dy_ptr, dw_ptr, ends_ptr, x_at, dy_at, n, k, FULL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """dW_e = X_eᵀ dY_e on one tile, [BK, BN]; the sum runs over the expert's rows."""
    tiles_n = tl.cdiv(n, BN)
    tiles = tl.cdiv(k, BK) * tiles_n
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, end = rows_of(ends_ptr, expert)
    feature = tile // tiles_n * BK + tl.arange(0, BK)
    col = tile % tiles_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BK, BN), tl.float32)
    x_ptr += start.to(tl.int64) * x_at[0]
    dy_ptr += start.to(tl.int64) * dy_at[0]
    for first in tl.range(0, end - start, BM):
        row = tl.arange(0, BM)[:, None]
        inside = row < end - start - first
        # Both are masked: another expert's row may hold inf, and 0 · inf is NaN.
        x_tile = x_ptr + row * x_at[0] + feature[None, :]
        dy_tile = dy_ptr + row * dy_at[0] + col[None, :]
        if FULL:
            x = tl.load(x_tile, mask=inside, other=0.0)
            dy = tl.load(dy_tile, mask=inside, other=0.0)
        else:
            x = tl.load(x_tile, mask=inside & (feature < k)[None, :], other=0.0)
            dy = tl.load(dy_tile, mask=inside & (col < n)[None, :], other=0.0)
        acc += dot(tl.trans(x), dy)
        x_ptr += tl.cast(BM, tl.int64) * x_at[0]
        dy_ptr += tl.cast(BM, tl.int64) * dy_at[0]
    dw_tile = dw_ptr + (expert.to(tl.int64) * k + feature)[:, None] * n + col[None, :]
    mine = (feature < k)[:, None] & (col < n)[None, :]
    tl.store(dw_tile, acc.to(dw_ptr.dtype.element_ty), mask=mine)


def tiles_for(
    kernel: str, bytes_per: int, sm: int, rows: int = 128, whole: bool = True
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options: what fits registers and shared memory of a generation.

    Args:
        kernel: "grouped" or "weight".
        bytes_per: of an element; fp32 has no tensor-core path here, so its tiles are small.
        sm: compute capability × 10.
        rows: the mean per expert; with few, a tall tile would be padding.
        whole: whether K and N are multiples of 64 and 256; masks cost registers.
    """
    if bytes_per == 4:
        return {"BM": 64 if kernel == "grouped" else 32, "BN": 64, "BK": 32}, {"num_warps": 8, "num_stages": 1}
    like = family(sm)
    if like == 75:  # Triton has no tensor-core path for this generation either
        return {"BM": 32, "BN": 64, "BK": 32}, {"num_warps": 4, "num_stages": 1}
    big = like in (90, 100)  # 227 KB of shared memory
    if kernel == "weight":
        bk = 128 if like == 100 else 64  # elsewhere a larger one spills
        return {"BM": 64, "BN": 128, "BK": bk}, {"num_warps": 8, "num_stages": 3}
    if rows <= 64:
        return {"BM": 64, "BN": 128, "BK": 64 if big else 32}, {"num_warps": 4, "num_stages": 3}
    if big and whole:
        return {"BM": 128, "BN": 256, "BK": 64}, {"num_warps": 8, "num_stages": 4 if like == 90 else 3}
    return {"BM": 128, "BN": 128, "BK": 32}, {"num_warps": 8, "num_stages": 4}


def _signature(dtype: str) -> dict[str, object]:
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "dy_ptr", "dw_ptr"), "*" + dtype)
    numbers = dict.fromkeys(("experts", "row_tiles", "n", "k"), "i32")
    rows = dict.fromkeys(("x_at", "y_at", "dy_at"), ("i32",))
    return {**pointers, "ends_ptr": "*i32", "w_at": ("i32", "i32"), **rows, **numbers}


def _grouped(dtype: str, transposed: bool, rows: int, full: bool = True) -> Build:
    size = 4 if dtype == "fp32" else 2

    def constants(sm: int) -> dict[str, int | bool]:
        tiles = tiles_for("grouped", size, sm, rows, full)[0]
        return {**tiles, "TRANSPOSED": transposed, "FULL": full, "TALL": 8, "WIDE": 256}

    return Build(
        grouped_kernel, _signature(dtype), constants, options=lambda sm: tiles_for("grouped", size, sm, rows, full)[1]
    )


def _weight(dtype: str) -> Build:
    size = 4 if dtype == "fp32" else 2
    return Build(
        weight_kernel, _signature(dtype), lambda sm: {**tiles_for("weight", size, sm)[0], "FULL": True},
        options=lambda sm: tiles_for("weight", size, sm)[1],
    )


BUILDS = [
    _grouped("fp16", False, 128), _grouped("fp16", True, 128), _grouped("fp16", False, 16),
    _grouped("fp16", False, 128, full=False), _weight("fp16"), _grouped("fp32", False, 128), _weight("fp32"),
]
