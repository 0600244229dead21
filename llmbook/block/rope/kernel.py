"""RoPE as one Triton kernel: queries and keys in one launch, every element read once and written once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmbook.kit.kernels import Build, need_dtype, need_same_device, tl, triton

LAYOUTS = ("half_split", "interleaved")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAIRS = 1024  # pairs per program: 8 per thread, two 16-byte loads of fp16


@triton.jit
def _turn(
    x_ptr, out_ptr, x_row, out_row, heads, first, cos, sin,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn ROWS heads of one token, from head `first` on."""
    # 64 bits: in [B, H, S, d] a head's stride is S·d; H·S·d passes 2³¹.
    row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    if INTERLEAVED:
        # One contiguous load; the split happens in registers.
        col = tl.arange(0, 2 * WIDE)[None, :]
        inside = (row < heads) & (col < D)
        x = tl.load(x_ptr + row * x_row + col, mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(x.to(cos.dtype), (ROWS, WIDE, 2)))
        out = tl.join(a * cos - b * sin, b * cos + a * sin)
        out = tl.reshape(out, (ROWS, 2 * WIDE)).to(x.dtype)
        tl.store(out_ptr + row * out_row + col, out, mask=inside)
    else:
        col = tl.arange(0, WIDE)[None, :]
        inside = (row < heads) & (col < D // 2)
        low = row * x_row + col
        a = tl.load(x_ptr + low, mask=inside, other=0.0)
        b = tl.load(x_ptr + low + D // 2, mask=inside, other=0.0)
        out_ptr += row * out_row + col
        x, y = a.to(cos.dtype), b.to(cos.dtype)
        tl.store(out_ptr, (x * cos - y * sin).to(a.dtype), mask=inside)
        tl.store(
            out_ptr + D // 2, (y * cos + x * sin).to(a.dtype), mask=inside
        )


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens,
    q_heads, k_heads, q_batch, q_token, q_row, k_batch, k_token, k_row,
    table_batch, table_token,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
):
    """One program: one token, ROWS heads of the queries or of the keys."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    block = tl.program_id(1)
    col = tl.arange(0, WIDE)
    at = batch * table_batch + token * table_token + col
    cos = tl.load(cos_ptr + at, mask=col < D // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=col < D // 2, other=0.0)[None, :]
    if BACKWARD:  # the transpose of a rotation turns the other way
        sin = -sin
    place = batch * tokens + token  # outputs are contiguous
    q_blocks = tl.cdiv(q_heads, ROWS)
    if block < q_blocks:
        _turn(
            q_ptr + batch * q_batch + token * q_token,
            q_out_ptr + place * q_heads * D, q_row, D, q_heads,
            block * ROWS, cos, sin, D, WIDE, ROWS, INTERLEAVED,
        )
    else:
        _turn(
            k_ptr + batch * k_batch + token * k_token,
            k_out_ptr + place * k_heads * D, k_row, D, k_heads,
            (block - q_blocks) * ROWS, cos, sin, D, WIDE, ROWS, INTERLEAVED,
        )


class Rope(torch.autograd.Function):
    """The kernel forward, and the same kernel with −θ backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)  # and neither q nor k
        ctx.interleaved = interleaved
        return launch(q, k, cos, sin, interleaved, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = launch(
            grads[0], grads[1], cos, sin, ctx.interleaved, backward=True
        )
        return dq, dk, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    layout: str = "half_split",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in one launch; differentiable in both.

    Args:
        q: [B, S, Hq, d]; k: [B, S, Hk, d]; fp16, bf16, fp32 or fp64, any
            strides as long as a head's elements are neighbours. To turn a
            part of each head only, pass that slice.
        cos, sin: [S, d/2], or [B, S, d/2] where positions differ within
            the batch; fp32 (fp64 for fp64). The products are taken in
            this precision, and rounded once, at the store.
        layout: "half_split" or "interleaved".

    Returns:
        The rotated q and k, contiguous, in the dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or a layout that do not fit.
    """
    _check(q, k, cos, sin, layout)
    turned: tuple[Tensor, Tensor] = Rope.apply(q, k, cos, sin, layout == "interleaved")
    return turned


def launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs and start one program per token and block of heads."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens, q_heads, d = q.shape
    k_heads = k.shape[2]
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    wide = triton.next_power_of_2(d // 2)
    rows = _rows(wide, max(q_heads, k_heads))
    grid = (batch * tokens, triton.cdiv(q_heads, rows) + triton.cdiv(k_heads, rows))
    if batch * tokens and q_heads + k_heads:
        table_batch = cos.stride(0) if cos.dim() == 3 else 0
        rope_kernel[grid](
            q, k, q_out, k_out, cos, sin, tokens, q_heads, k_heads, *q.stride()[:3], *k.stride()[:3],
            table_batch, cos.stride(-2), D=d, WIDE=wide, ROWS=rows, INTERLEAVED=interleaved,
            BACKWARD=backward, num_warps=4,
        )
    return q_out, k_out


def _rows(wide: int, heads: int) -> int:
    return max(1, min(PAIRS // wide, triton.next_power_of_2(max(heads, 1))))


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, not {layout!r}")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, S, Hq, d] and [B, S, Hk, d], but are {list(q.shape)} and {list(k.shape)}"
        )
    batch, tokens, _, d = q.shape
    if d < 2 or d % 2 or d > 2 * PAIRS:
        raise ValueError(f"head dimension d must be even and from 2 to {2 * PAIRS}, not {d}")
    shapes = ([tokens, d // 2], [batch, tokens, d // 2])
    if cos.shape != sin.shape or list(cos.shape) not in shapes:
        raise ValueError(
            f"cos and sin must both be {shapes[0]} or {shapes[1]}, "
            f"but are {list(cos.shape)} and {list(sin.shape)}"
        )
    need_dtype(*DTYPES, q=q, k=k)
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if cos.dtype != wanted or sin.dtype != wanted:
        raise ValueError(f"cos and sin must be {wanted} for {q.dtype}, but are {cos.dtype} and {sin.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants here: detach them, no gradient flows to them")
    need_same_device(q=q, k=k, cos=cos, sin=sin)


def _build(d: int, dtype: str, interleaved: bool, backward: bool) -> Build:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    numbers = ("tokens", "q_heads", "k_heads", "q_batch", "q_token", "q_row", "k_batch", "k_token", "k_row")
    signature = {
        **pointers, "cos_ptr": "*fp32", "sin_ptr": "*fp32",
        **dict.fromkeys((*numbers, "table_batch", "table_token"), "i32"),
    }
    wide = triton.next_power_of_2(d // 2)
    constants = {
        "D": d, "WIDE": wide, "ROWS": _rows(wide, 32), "INTERLEAVED": interleaved, "BACKWARD": backward,
    }
    return Build(rope_kernel, signature, lambda sm: constants)  # the same on every generation


BUILDS = [
    _build(d, dtype, interleaved, backward)
    for d, dtype, interleaved, backward in (
        (128, "fp16", False, False), (128, "fp16", False, True), (128, "fp16", True, False),
        (128, "bf16", False, False), (64, "bf16", True, False), (96, "fp16", True, True),
    )
]
