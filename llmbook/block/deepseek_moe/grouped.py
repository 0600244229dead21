"""The grouped product as a PyTorch function: checked, launched, and differentiable."""

from typing import Any

import torch

from llmbook.kit.kernels import DEVICE, capability, need_dtype, need_same_device, triton

from .kernel import grouped_kernel, tiles_for, weight_kernel

Tensor = torch.Tensor
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TALL = 8


def _check(x: Tensor, w: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1] or ends.shape != w.shape[:1] or not len(w):
        raise ValueError(
            "a grouped product needs x [R, K], w [E, K, N] and ends [E] with one expert or more, not "
            f"{list(x.shape)}, {list(w.shape)} and {list(ends.shape)}"
        )
    need_dtype(*DTYPES, x=x, w=w)
    need_dtype(torch.int32, ends=ends)
    if w[0].numel() >= 2**31:
        raise ValueError(f"the kernel counts 32 bits inside an expert: {list(w.shape[1:])} is too large")
    need_same_device(x=x, w=w, ends=ends)
    if DEVICE.type == "cpu":  # on a GPU a look at the values would wait for it
        at = [0, *ends.tolist()]
        if sorted(at) != at or at[-1] != len(x):
            raise ValueError(f"ends must ascend from 0 to the {len(x)} rows of x, not {at[1:]}")


def _launch(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Y [R, N] = X_e W_e for every expert's rows."""
    (rows, k), (experts, _, n) = x.shape, w.shape
    y = x.new_empty(rows, n)
    if not rows or not n:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    if 1 not in w.stride()[1:]:
        w = w.contiguous()
    transposed = w.stride(2) != 1
    whole = k % 64 == 0 and n % 256 == 0
    tile, options = tiles_for("grouped", x.element_size(), capability(), rows // experts, whole)
    # At most this many tiles of rows: each expert that has any adds one that is not full.
    row_tiles = triton.cdiv(rows, tile["BM"]) + min(experts, rows)
    grouped_kernel[row_tiles * triton.cdiv(n, tile["BN"]),](
        x, w, y, ends, (x.stride(0),), (w.stride(0), w.stride(2 if transposed else 1)),
        (y.stride(0),), experts, row_tiles, n, k, TRANSPOSED=transposed,
        FULL=n % tile["BN"] == 0 and k % tile["BK"] == 0, TALL=TALL, WIDE=triton.next_power_of_2(experts),
        **tile, **options,
    )
    return y


def _launch_weight(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """dW [E, K, N] = X_eᵀ dY_e; zeros for an expert without rows."""
    (k, n), experts = (x.shape[1], dy.shape[1]), len(ends)
    dw = x.new_empty(experts, k, n)
    if not dw.numel():
        return dw
    x, dy = (t if t.stride(1) == 1 else t.contiguous() for t in (x, dy))
    tile, options = tiles_for("weight", x.element_size(), capability())
    weight_kernel[experts * triton.cdiv(k, tile["BK"]) * triton.cdiv(n, tile["BN"]),](
        x, dy, dw, ends, (x.stride(0),), (dy.stride(0),), n, k,
        FULL=n % tile["BN"] == 0 and k % tile["BK"] == 0, **tile, **options
    )
    return dw


class GroupedProduct(torch.autograd.Function):
    """dX is a grouped product with W transposed; dW sums over an expert's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        """Y = X_e W_e."""
        ctx.save_for_backward(x, w, ends)
        return _launch(x, w, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Only the gradients that are asked for."""
        x, w, ends = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        dx = _launch(dy, w.transpose(1, 2), ends) if need_x else None
        return dx, _launch_weight(x, dy, ends) if need_w else None, None


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows times its matrix, in one launch, [R, N].

    Args:
        x: [R, K], sorted by expert. w: [E, K, N], any strides. fp16, bf16, fp32.
        ends: [E], int32, ascending to R. Sums are kept in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit, another device, or, where
            that costs nothing (on a CPU), ends that do not ascend to R.
    """
    _check(x, w, ends)
    out: Tensor = GroupedProduct.apply(x, w, ends)
    return out
