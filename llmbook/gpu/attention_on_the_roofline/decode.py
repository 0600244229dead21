"""Decode attention behind one checked call: which kernel, how many shares of the keys, merged."""

from math import e, log2

import torch

from llmbook.kit.kernels import DEVICE, capability, need_dtype, need_same_device, triton

from .kernel import merge_kernel, packed_kernel, per_head_kernel
from .tiles import LATENT, ROTARY, tiles_for

Tensor = torch.Tensor


def decode(
    q: Tensor, k: Tensor, v: Tensor | None, *, kernel: str = "packed",
    lengths: Tensor | None = None, splits: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(qKᵀ · scale)V for one query per sequence.

    Args:
        q: [batch, heads, 1, d], fp16 or bf16; d is 64 or 128, or 576 without v.
        k, v: [batch, kv_heads, n, d]; kv_heads divides heads. Without v (None)
            the first 512 columns of k are the values: MLA's absorbed form.
        kernel: "packed" or "per head".
        lengths: [batch], int32, keys of each sequence, at most n; n if None.
        splits: shares of the keys, each a program; by the GPU's size if None.
        scale: 1/√d if not given.

    Returns:
        The output [batch, heads, 1, d or 512] in q's dtype and the logsumexp
        [batch, heads, 1] in fp32. A sequence without keys: zeros, and −inf.

    Raises:
        ValueError: shapes, dtypes, lengths or devices that do not go together.
    """
    check(q, k, v, lengths, splits)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, k if v is None else v))
    (batch, heads, _, d), (kv_heads, n) = q.shape, k.shape[1:3]
    tiles = tiles_for(kernel, d, heads // kv_heads, capability())
    units = batch * kv_heads * triton.cdiv(heads // kv_heads, tiles.rows)
    splits = splits or splits_for(units, n, tiles.BN, multiprocessors())
    out = torch.empty(batch, heads, 1, tiles.d, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(batch, heads, splits, tiles.d, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    jitted = per_head_kernel if kernel == "per head" else packed_kernel
    jitted[(units * splits,)](
        q, k, v, parts, part_lse, q if lengths is None else lengths,
        *(t.stride()[:3] for t in (q, k, v)), kv_heads, heads // kv_heads, n, splits,
        log2(e) * (d**-0.5 if scale is None else scale),
        **tiles.constants, RAGGED=lengths is not None, **tiles.options,
    )
    if splits > 1:
        merge_kernel[(batch * heads,)](parts, part_lse, out, lse, splits, D=tiles.d)
    return out, lse


def splits_for(units: int, n: int, BN: int, sms: int) -> int:
    """Shares of the keys: two programs per multiprocessor, if there are tiles enough."""
    return max(1, min(-(-2 * sms // max(units, 1)), -(-n // BN)))


def multiprocessors() -> int:
    """SMs of the GPU that kernels run on; the interpreter runs programs one by one, so a few suffice there."""
    return 4 if DEVICE.type != "cuda" else torch.cuda.get_device_properties(DEVICE).multi_processor_count


def check(q: Tensor, k: Tensor, v: Tensor | None, lengths: Tensor | None, splits: int | None) -> None:
    """Refuse what the kernels cannot do, in one sentence."""
    given = f"q {list(q.shape)}, k {list(k.shape)}" + (f", v {list(v.shape)}" if v is not None else "")
    if q.dim() != 4 or k.dim() != 4 or q.shape[2] != 1 or (v is not None and v.shape != k.shape):
        raise ValueError(f"q must be [batch, heads, 1, d] and k, v one [batch, kv_heads, n, d], but got {given}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dimension, but got {given}")
    if (q.shape[3] == LATENT + ROTARY) != (v is None):
        raise ValueError(f"v is left out if and only if k is {LATENT + ROTARY} wide (MLA), but got {given}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the KV heads must divide the heads, but {k.shape[1]} do not divide {q.shape[1]}")
    need_dtype(torch.float16, torch.bfloat16, q=q, k=k, v=v)
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be 1 or more, not {splits}")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != q.shape[:1]):
        given = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"lengths must be torch.int32 {list(q.shape[:1])}, one per sequence, not {given}")
    need_same_device(q=q, k=k, v=v, lengths=lengths)
    # Values on the CPU only: looking at them on a GPU would wait for it.
    seen = [] if lengths is None or lengths.device.type != "cpu" else lengths.tolist()
    if any(not 0 <= n <= k.shape[2] for n in seen):
        raise ValueError(f"lengths must lie from 0 to {k.shape[2]}, the keys there are, but are {seen}")
