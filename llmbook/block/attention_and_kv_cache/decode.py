"""Split-KV decode behind one checked call, and the same in plain PyTorch."""

from math import e, log2

import torch
from torch import Tensor

from llmbook.gpu.online_softmax.state import merge_outputs
from llmbook.kit.kernels import DEVICE, capability, need_dtype, need_same_device, triton

from .kernel import merge_kernel, most_rows, part_kernel, rows_of, tiles

KEYS_PER_PART = 256  # fewer, and writing a part's result costs more than its keys
MOST_PARTS = 256


def choose_parts(programs: int, longest: int, sms: int) -> int:
    """Into how many parts each sequence's keys are cut.

    The fewest with which the busiest place reads at most 5 % more than with
    the best number; two programs at a time have a place on a multiprocessor.

    Args:
        programs: batch × n_kv, what there is without cutting.
        longest: tokens.
    """
    most = max(1, min(longest // KEYS_PER_PART, MOST_PARTS))

    def walk(parts: int) -> float:
        return -(-programs * parts // (2 * sms)) / parts

    best = min(map(walk, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if walk(n) <= 1.05 * best)


def dealt(programs: int, longest: int, parts: int, sms: int) -> list[list[int]]:
    """The keys that each multiprocessor's programs read, programs dealt in turn."""
    work: list[list[int]] = [[] for _ in range(sms)]
    for program in range(programs * parts):
        work[program % sms].append(-(-longest // parts))
    return work


def decode_in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Tensor:
    """One query per head against all keys, read in parts and merged.

    q: [B, n_h, 1, d]; k, v: [B, n_kv, T, d], T at least `parts`.
    Returns [B, n_h, 1, d].
    """
    B, n_kv, _, d = k.shape
    rows = q.view(B, n_kv, -1, d)
    o, lse = torch.zeros_like(rows), torch.full_like(rows[..., 0], -torch.inf)
    for one, other in zip(k.chunk(parts, 2), v.chunk(parts, 2), strict=True):
        s = rows @ one.mT * d**-0.5  # any order: on a GPU, all at once
        o, lse = merge_outputs(o, lse, s.softmax(-1) @ other, s.logsumexp(-1))
    return o.view(q.shape)


def flash_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *,
    table: Tensor | None = None, parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(qKᵀ/√d)V of one new token per sequence, by split-KV kernels.

    Args:
        q: [B, n_h, d], fp16 or bf16; d 16, 32, 64, 128 or 256.
        k, v: [B, n_kv, T, d]; with a table, pools [pages, n_kv, page, d].
        lengths: [B], int32, keys that each sequence has; 0 gives zeros.
        table: [B, n], int32: page of tokens i·page to (i+1)·page − 1. Pages
            and lengths are trusted: checking them would stop the GPU.
        parts: chosen by the GPU's size if not given.

    Returns:
        Output [B, n_h, d] in q's dtype; logsumexp [B, n_h], fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    check(q, k, v, lengths, table)
    (B, n_h, d), (n_kv, page) = q.shape, k.shape[1:3]
    room = page if table is None else page * table.shape[1]
    parts = parts or choose_parts(B * n_kv, room, multiprocessors())
    o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, n_h, dtype=torch.float32)
    if not q.numel():
        return o, lse
    some, some_lse = (lse.new_empty(B, n_h, parts, *rest) for rest in ((d,), ()))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lookup = lengths if table is None else table.contiguous()
    group = n_h // n_kv
    keys, options = tiles(d, rows_of(group), capability())
    part_kernel[(parts, B * n_kv)](
        q, k, v, some, some_lse, lengths.contiguous(), lookup, q.stride()[:2], k.stride()[:3], v.stride()[:3],
        0 if table is None else lookup.stride(0), n_kv, parts, d**-0.5 * log2(e), GROUP=group,
        ROWS=rows_of(group), D=d, BN=keys, PAGE=0 if table is None else page, **options,
    )
    merge_kernel[(B * n_h,)](
        some, some_lse, o, lse, parts, D=d, WIDE=triton.next_power_of_2(parts), BLOCK=16
    )
    return o, lse


def check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None) -> None:
    """Refuse what the kernels cannot do, in one sentence."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, lengths {list(lengths.shape)}"
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or q.shape[2] != k.shape[3]:
        raise ValueError(f"q must be [B, n_h, d] and k, v one [B, n_kv, T, d] (or pages), but got {shapes}")
    if lengths.shape != q.shape[:1] or (table is None and len(k) != len(q)):
        raise ValueError(f"every sequence of q needs its length and its keys, but got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] > 128 * k.shape[1]:
        raise ValueError(f"the KV heads must divide the query heads, at most 128 to one, but got {shapes}")
    if (d := q.shape[2]) not in (16, 32, 64, 128, 256):
        raise ValueError(f"head dimension {d} is not supported: it must be 16, 32, 64, 128 or 256")
    if rows_of(q.shape[1] // k.shape[1]) > (most := most_rows(d, capability())):
        raise ValueError(f"sm_{capability()} takes {most} query heads of {d} to one KV head at most, but got {shapes}")
    need_dtype(torch.float16, torch.bfloat16, q=q, k=k, v=v)
    need_dtype(torch.int32, lengths=lengths, table=table)
    if table is not None and (table.dim() != 2 or len(table) != len(q)):
        raise ValueError(f"the page table must be [B, n] for the {len(q)} sequences of q, not {list(table.shape)}")
    need_same_device(q=q, k=k, v=v, lengths=lengths, table=table)


def multiprocessors() -> int:
    """SMs of the GPU that kernels run on; a few stand for them in the interpreter."""
    return 4 if DEVICE.type != "cuda" else torch.cuda.get_device_properties(DEVICE).multi_processor_count
