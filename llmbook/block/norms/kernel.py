"""RMSNorm in Triton: each element read once and written once, forward, backward, and with the residual's addition."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmbook.kit.kernels import DEVICE, INTERPRETED, Build, need_dtype, need_same_device, tl, triton

from .standardise import check

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDEST = 32_768  # a row stays in a program's registers (backward above 16,384 spills some)
HELD_UP_TO = 8192  # padded width up to which dweight is summed in registers
TILE = 2048  # elements per program at least: narrow rows share one


if INTERPRETED:

    @triton.jit
    def _round(x, like):
        # The interpreter cuts fp32 off where it should round it to bf16 (Triton 3.9): round the bits first.
        if like.dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
        return x.to(like.dtype)

else:

    @triton.jit
    def _round(x, like):
        """x in the dtype of `like`, rounded to nearest."""
        return x.to(like.dtype)


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, r_ptr,
    rows, x_row, residual_row, eps,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program: ROWS rows, whole, from one read to one write."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDE)[None, :]
    inside = (row < rows)[:, None] & (col < D)
    x = tl.load(x_ptr + row[:, None] * x_row + col, mask=inside, other=0.0)
    out = row[:, None] * D + col  # outputs are contiguous
    if ADD:
        at = residual_ptr + row[:, None] * residual_row + col
        other = tl.load(at, mask=inside, other=0.0)
        wide = x.to(r_ptr.dtype.element_ty) + other.to(r_ptr.dtype.element_ty)
        x = _round(wide, x)  # the stream's rounding, as the unfused sum has it
        tl.store(sum_ptr + out, x, mask=inside)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0)
    wide = x.to(r_ptr.dtype.element_ty)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
    x_hat = _round(wide * r[:, None], x)  # Llama's order: round, then gain
    y = x_hat.to(wide.dtype) * weight.to(wide.dtype)
    tl.store(y_ptr + out, _round(y, x), mask=inside)
    tl.store(r_ptr + row, r, mask=row < rows)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, r_ptr, stream_ptr, dx_ptr, partial_ptr,
    rows, grad_row, x_row, stream_row,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, HELD: tl.constexpr,
):
    """One program: every P-th block of rows, and the sum of their dweight."""
    col = tl.arange(0, WIDE)[None, :]
    used = col < D
    here = partial_ptr + tl.program_id(0).to(tl.int64) * D + col
    share = tl.zeros((ROWS, WIDE), dtype=r_ptr.dtype.element_ty)
    blocks = tl.cdiv(rows, ROWS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & used
        x = tl.load(x_ptr + row * x_row + col, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row * grad_row + col, mask=inside, other=0.0)
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)
        x_hat = x.to(r.dtype) * r
        grad = grad.to(r.dtype)
        if HELD:
            share += grad * x_hat
        else:  # the widest rows, one at a time, need the registers
            sofar = tl.load(here, mask=used, other=0.0)
            tl.store(here, sofar + grad * x_hat, mask=used)
        weight = tl.load(weight_ptr + col, mask=used, other=0.0)
        grad *= weight.to(r.dtype)
        along = tl.sum(grad * x_hat, axis=1)[:, None] / D
        dx = r * (grad - x_hat * along)
        if ADD:  # the stream's own gradient joins here, in the same pass
            stream = stream_ptr + row * stream_row + col
            dx += tl.load(stream, mask=inside, other=0.0).to(r.dtype)
        tl.store(dx_ptr + row * D + col, _round(dx, x), mask=inside)
    if HELD:
        tl.store(here, tl.sum(share, axis=0)[None, :], mask=used)


class RMSNormFunction(torch.autograd.Function):
    """Forward keeps x, weight and one r per row; backward is one pass more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, r = launch_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, dweight = launch_backward(grads[0], None, *ctx.saved_tensors)
        return dx, dweight, None


class AddRMSNormFunction(torch.autograd.Function):
    """The sum is an output, so nothing extra is kept; both inputs get the
    same gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, stream, r = launch_forward(x, residual, weight, eps)
        ctx.save_for_backward(stream, weight, r)
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, dweight = launch_backward(*grads, *ctx.saved_tensors)
        return dx, dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms.rms_norm` in one launch, differentiable in x and weight.

    Args:
        x: [..., D]; fp16, bf16, fp32 or fp64, D up to 32,768. Rows may lie
            any distance apart; features that do not lie next to each other,
            or rows at no single distance, are copied first.
        weight: [D], the dtype of x.

    Raises:
        ValueError: as `rms.rms_norm`; also other dtypes, or other devices.
    """
    _check(x, weight, eps)
    y: Tensor = RMSNormFunction.apply(x, weight, eps)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms.add_rms_norm` in one launch: the normed sum, and the sum.

    Args:
        x, residual: [..., D] of one shape and dtype; else as `rms_norm`.
    """
    _check(x, weight, eps)
    if residual.shape != x.shape:
        raise ValueError(f"x and residual must agree in shape, but are {list(x.shape)} and {list(residual.shape)}")
    need_dtype(*DTYPES, x=x, residual=residual)
    need_same_device(x=x, residual=residual)
    pair: tuple[Tensor, Tensor] = AddRMSNormFunction.apply(x, residual, weight, eps)
    return pair


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows, the sums (x itself without a residual), and r, [rows] in fp32 (fp64 for fp64)."""
    flat, width = _rows_of(x), x.shape[-1]
    other = flat if residual is None else _rows_of(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = x if residual is None else torch.empty_like(y)
    rows = flat.shape[0]
    r = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    wide, block, warps = _tile(width)
    if rows:
        forward_kernel[(triton.cdiv(rows, block),)](
            flat, other, weight.contiguous(), y, stream, r, rows, flat.stride(0), other.stride(0), eps,
            D=width, WIDE=wide, ROWS=block, ADD=residual is not None, num_warps=warps,
        )
    return y, stream, r


def launch_backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, and dweight as the sum of one partial per program: no atomics, so the same bits at every run."""
    flat, upstream, width = _rows_of(x), _rows_of(grad), x.shape[-1]
    other = upstream if grad_stream is None else _rows_of(grad_stream)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = flat.shape[0]
    wide, block, warps = _tile(width)
    count = programs(rows, width)
    held = wide <= HELD_UP_TO
    partial = (torch.empty if held else torch.zeros)(count, width, dtype=r.dtype, device=x.device)
    if rows:
        backward_kernel[(count,)](
            upstream, flat, weight.contiguous(), r, other, dx, partial,
            rows, upstream.stride(0), flat.stride(0), other.stride(0),
            D=width, WIDE=wide, ROWS=block, ADD=grad_stream is not None, HELD=held,
            num_warps=warps,
        )
    return dx, partial.sum(0).to(weight.dtype)


def _rows_of(x: Tensor) -> Tensor:
    """x as [rows, D] with neighbouring features; a view where its strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """Padded width, rows per program, warps: 16 elements per thread, 32 from 16,384 on."""
    wide = triton.next_power_of_2(width)
    return wide, max(1, TILE // wide), min(16, max(4, wide // 512))


def programs(rows: int, width: int) -> int:
    """Programs that share the backward pass: two per multiprocessor, so that one loads while the other sums."""
    most = 4
    if DEVICE.type == "cuda":
        most = 2 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    return min(triton.cdiv(rows, _tile(width)[1]), most)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check(x, eps, weight=weight)
    need_dtype(*DTYPES, x=x, weight=weight)
    if x.shape[-1] > WIDEST:
        raise ValueError(f"rows may be up to {WIDEST:,} wide, a program's registers, but x is {list(x.shape)}")
    need_same_device(x=x, weight=weight)


def _build(kernel: Any, width: int, dtype: str, add: bool) -> Build:
    backward = kernel is backward_kernel
    narrow = ("grad_ptr", "x_ptr", "weight_ptr", "stream_ptr", "dx_ptr") if backward else (
        "x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr")
    numbers = ("rows", "grad_row", "x_row", "stream_row") if backward else ("rows", "x_row", "residual_row")
    signature = {
        **dict.fromkeys(narrow, f"*{dtype}"), **dict.fromkeys(numbers, "i32"), "r_ptr": "*fp32",
        **({"partial_ptr": "*fp32"} if backward else {"eps": "fp32"}),
    }
    wide, rows, warps = _tile(width)
    constants = {"D": width, "WIDE": wide, "ROWS": rows, "ADD": add}
    if backward:
        constants["HELD"] = wide <= HELD_UP_TO
    return Build(kernel, signature, lambda sm: constants, num_warps=warps)


BUILDS = [
    _build(kernel, width, dtype, add)
    for kernel in (forward_kernel, backward_kernel)
    for width, dtype, add in (
        (128, "bf16", False), (4096, "bf16", False), (5120, "fp16", True), (8192, "bf16", True),
        (16_384, "bf16", False),
    )
]
