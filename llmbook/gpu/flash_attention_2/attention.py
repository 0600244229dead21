"""The kernels behind one call: checked, launched, differentiable, and opaque to `torch.compile`, so that it works."""

from math import e, log2
from typing import Any

import torch

from llmbook.kit.generations import family
from llmbook.kit.kernels import DEVICE, INTERPRETED, capability, need_dtype, need_same_device, triton

from .kernel import attend_kernel
from .kernel_backward import delta_kernel, dkdv_kernel, dq_kernel
from .kernel_tma import attend_tma_kernel
from .tiles import TABLE, Tiles, padded, tiles_for

Tensor = torch.Tensor
LOG2E = log2(e)


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ · scale)V, exact, without S or P in memory. Differentiable.

    Args:
        q: [batch, heads, N_q, d], fp16 or bf16; d from 16 to 256.
        k, v: [batch, kv_heads, N_k, d]; kv_heads divides heads (GQA).
        causal: query i sees keys up to i + N_k − N_q: the last query sees the
            last key. A query that sees none gives zeros.
        scale: 1/√d if not given.

    Returns:
        The output [batch, heads, N_q, d] in q's dtype, and each row's
        logsumexp [batch, heads, N_q] in fp32, −inf for a row that saw no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FlashAttention2.apply(q, k, v, causal, scale)


class FlashAttention2(torch.autograd.Function):
    """Keeps Q, K, V, O and L for the backward, and nothing of size N × N."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = attend(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.scale = causal, scale
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        return (*attend_backward(q, k, v, o, lse, do, dlse, ctx.causal, ctx.scale), None, None)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what the kernels cannot do, in one sentence."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q must be [batch, heads, N_q, d] and k, v one [batch, kv_heads, N_k, d], but got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dimension, but got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the KV heads must divide the heads, but {k.shape[1]} do not divide {q.shape[1]}")
    need_dtype(torch.float16, torch.bfloat16, q=q, k=k, v=v)
    need_same_device(q=q, k=k, v=v)
    tiles_for("forward", q.shape[3], capability())


@torch.library.custom_op("llmbook::flash2_forward", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """O and L by whichever forward kernel suits this GPU."""
    return forward(q, k, v, causal, scale)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmbook::flash2_backward", mutates_args=())
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV from what the forward kept."""
    return backward(q, k, v, o, lse, do, dlse, causal, scale)


@attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *, kind: str | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Launch a forward kernel: `kind` "forward" (any GPU) or "tma" (sm_90, sm_100); chosen by the GPU if not given."""
    need_same_device(q=q, k=k, v=v)  # the operator can be called without `check`
    if scale < 0:  # the kernels take a row's largest product for its largest score
        q, scale = -q, -scale
    q, k, v = (_rows(t) for t in (q, k, v))
    batch, heads, n_q, d = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse
    if kind is None:
        copied = not INTERPRETED and family(capability()) in TABLE["tma"] and _suits_tma(q, k, v)
        kind = "tma" if copied else "forward"
    tiles = tiles or tiles_for(kind, d, capability())
    programs = triton.cdiv(n_q, tiles.BM) * batch * heads
    arguments = (
        q, k, v, o, lse, _at(q), _at(k), _at(v), _at(o), heads, heads // k.shape[1], n_q, k.shape[2], scale * LOG2E
    )
    sizes = {"D": d, "WIDE": padded(d), "BM": tiles.BM, "BN": tiles.BN, "CAUSAL": causal}
    if kind == "forward":
        attend_kernel[(programs,)](*arguments, **sizes, **tiles.options)
    else:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=DEVICE))
        # Equal tiles: one program per SM takes every n-th. Unequal ones: the hardware deals better (see `schedule`).
        grid = (programs if causal else min(programs, multiprocessors()),)
        attend_tma_kernel[grid](*arguments, batch, **sizes, SPLIT=tiles.split, **tiles.options)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three backward kernels."""
    need_same_device(q=q, k=k, v=v, o=o, lse=lse, do=do, dlse=dlse)
    q, k, v, o, do = (_rows(t) for t in (q, k, v, o, do))
    (batch, heads, n_q, d), (kv_heads, n_k) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not (q.numel() and k.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta, group, shape = torch.empty_like(lse), heads // kv_heads, {"D": d, "WIDE": padded(d)}
    delta_kernel[(triton.cdiv(n_q, 32) * batch * heads,)](
        o, do, dlse.contiguous(), delta, _at(o), _at(do), heads, n_q, **shape, BM=32
    )
    for kind, kernel, written, blocks_of, each in (
        ("dkdv", dkdv_kernel, (dk, dv), n_k, kv_heads), ("dq", dq_kernel, (dq,), n_q, heads),
    ):
        tiles = tiles_for(kind, d, capability())
        size = tiles.BN if kind == "dkdv" else tiles.BM
        kernel[(triton.cdiv(blocks_of, size) * batch * each,)](
            q, k, v, do, *written, lse, delta, _at(q), _at(k), _at(v), _at(do), *map(_at, written), each, group,
            n_q, n_k, scale * LOG2E, **shape, BM=tiles.BM, BN=tiles.BN, CAUSAL=causal, **tiles.options,
        )
    return dq, dk, dv


def multiprocessors() -> int:
    """SMs of the GPU that kernels run on; the interpreter runs programs one by one, so a few suffice there."""
    return 4 if DEVICE.type != "cuda" else torch.cuda.get_device_properties(DEVICE).multi_processor_count


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, in whatever order its other dimensions lie; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _at(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def _suits_tma(*tensors: Tensor) -> bool:
    """Descriptors want bases and strides of whole 16 bytes; and a padded head dimension is left to masks."""
    return all(
        t.data_ptr() % 16 == 0 and all(s and s * t.element_size() % 16 == 0 for s in _at(t))
        and padded(t.shape[3]) == t.shape[3]
        for t in tensors
    )
