"""Row softmax in one launch: a row that fits is read once; a longer one streams through the online normaliser.

In the streaming kernel every lane of the block keeps an (m, l) of its own, and the lanes are merged once, at the end:
the merge may happen in any order, so no lane ever waits for another inside the loop.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llmbook.kit.kernels import Build, need_dtype, need_same_device, tl, triton

from .passes import softmax_backward

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 16_384  # the longest row that is held in registers
BLOCK = 4_096  # what the streaming kernel reads at a time


@triton.jit
def softmax_tile_kernel(
    x_ptr, out_ptr, rows, n, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """ROWS whole rows per program: one read, one write."""
    # 64 bits: rows·n may pass 2³¹.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, WIDE)[None, :]
    inside = (row < rows) & (col < n)
    at = row * n + col
    x = tl.load(x_ptr + at, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    m = tl.max(x, 1)[:, None]
    p = tl.exp(x - tl.where(m == float("-inf"), 0.0, m))
    l = tl.sum(p, 1)[:, None]
    y = p / tl.where(l == 0, 1.0, l)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_stream_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """One row per program, BLOCK at a time: two reads, one write."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * n
    out_ptr += row * n
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, n, BLOCK):
        x = tl.load(x_ptr + j + lane, mask=j + lane < n, other=float("-inf"))
        x = x.to(tl.float32)
        m_new = tl.maximum(m, x)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - base) + tl.exp(x - base)
        m = m_new
    # Merge the lanes: the same rule, all at once.
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(l * tl.exp(m - top), 0)
    total = tl.where(total == 0, 1.0, total)
    for j in range(0, n, BLOCK):
        x = tl.load(x_ptr + j + lane, mask=j + lane < n, other=float("-inf"))
        y = tl.exp(x.to(tl.float32) - top) / total
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + j + lane, y, mask=j + lane < n)


class Softmax(torch.autograd.Function):
    """The kernels forward; backward needs the result alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = launch(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (out,) = ctx.saved_tensors
        return softmax_backward(out.float(), grad.float()).to(out.dtype)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, accumulated in fp32; differentiable.

    Args:
        x: [..., n], fp16, bf16 or fp32, any n and any strides.

    Returns:
        The same shape and dtype, contiguous. A row of −inf alone gives zeros, where `torch.softmax` gives NaN; a row
        with a NaN or +inf gives NaN.

    Raises:
        ValueError: another dtype, no dimension at all, or a tensor that kernels cannot reach.
    """
    need_dtype(*DTYPES, x=x)
    if not x.dim():
        raise ValueError("x must have at least one dimension, the row; this is a single number")
    need_same_device(x=x)
    result: torch.Tensor = Softmax.apply(x)
    return result


def fits(n: int) -> bool:
    """Whether a row of n is held on chip, and so read once."""
    return n <= TILE


def launch(x: torch.Tensor) -> torch.Tensor:
    """Allocate the output and start the kernel that suits the row's length."""
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.shape[-1]
    if not x.numel():
        return out
    rows = x.numel() // n
    if fits(n):
        wide, height, warps = tile(n)
        softmax_tile_kernel[(triton.cdiv(rows, height),)](x, out, rows, n, ROWS=height, WIDE=wide, num_warps=warps)
    else:
        softmax_stream_kernel[(rows,)](x, out, n, BLOCK=BLOCK, num_warps=16)
    return out


def tile(n: int) -> tuple[int, int, int]:
    """WIDE, ROWS and warps for rows of n: about 1,024 elements per program at least, 32 per thread at most."""
    wide = triton.next_power_of_2(n)
    return wide, max(1, 1024 // wide), max(4, min(16, wide // 1024))


def _build(n: int, dtype: str) -> Build:
    pointers = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "n": "i32"}
    if not fits(n):
        return Build(softmax_stream_kernel, pointers, lambda sm: {"BLOCK": BLOCK}, num_warps=16)
    wide, height, warps = tile(n)
    return Build(
        softmax_tile_kernel, {**pointers, "rows": "i32"}, lambda sm: {"ROWS": height, "WIDE": wide}, num_warps=warps
    )


BUILDS = [
    _build(n, dtype)
    for n, dtype in (
        (128, "fp16"), (4_096, "fp16"), (TILE, "fp16"), (TILE, "fp32"), (128_256, "fp16"), (128_256, "bf16"),
    )
]
