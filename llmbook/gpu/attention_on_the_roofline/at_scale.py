"""The per-head kernel's reads replayed at the size of real chips: how many reach HBM, what is left of the gain."""

import functools

from llmbook.kit.hardware import gpu

from .cache import counts, launch
from .model import CHIPS, Attention, cost, traffic

HEADS, BATCH, TOKENS = 32, 8, 256  # query heads, sequences, tokens per replayed tile


@functools.cache
def replayed(
    group: int, keys: int, sms: int, l2: float, together: bool
) -> float:
    """HBM tiles per tile of the cache: 8 sequences, 32 heads of 128 in fp16.

    Args:
        group: query heads per KV head; the kernel takes one per program.
        keys: cached tokens of each sequence, a multiple of 256.
        sms, l2: multiprocessors, each with one program; MiB of L2.
        together: whether a group's programs start next to each other.
    """
    kv_heads, tiles = BATCH * HEADS // group, keys // TOKENS
    capacity = int(l2 * 2**20) // (TOKENS * 2 * 128 * 2)
    programs = launch(kv_heads, group, tiles, together=together)
    return counts(programs, sms, capacity)[0] / (kv_heads * tiles)


def gain_replayed(group: int, keys: int, name: str, together: bool) -> float:
    """The per-head kernel's gain over MHA with the HBM bytes that the replay counts, on a chip of `model.CHIPS`."""
    on, a = CHIPS[name], Attention(HEADS, HEADS // group)
    sheet = gpu(name if "SXM" in name else "A100-80 SXM")
    hbm, l2 = traffic(a, keys)
    slow = max(hbm * replayed(group, keys, sheet.sms, sheet.l2, together) / on.hbm, l2 / on.l2)
    return max(cost(Attention(HEADS, HEADS), keys, on)) / slow
