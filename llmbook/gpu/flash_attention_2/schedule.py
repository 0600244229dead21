"""Which program runs which tile of the output when: the launch as a list, and the multiprocessors that take from it."""

import heapq
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple


class Tile(NamedTuple):
    """A block of queries of one head; `work` counts the tiles of keys it has to visit."""

    head: int
    block: int
    work: int


class Span(NamedTuple):
    """A tile on a multiprocessor, from when to when, in key tiles."""

    sm: int
    start: int
    end: int
    tile: Tile


def key_tiles(block: int, N: int, BM: int, BN: int, causal: bool) -> int:
    """Tiles of keys that a block of BM queries visits, of N queries and keys."""
    return ceil((min(N, (block + 1) * BM) if causal else N) / BN)


def launch_flash_1(heads: int, N: int, BM: int, BN: int, causal: bool = False) -> list[Tile]:
    """One program per head: all its blocks of queries, for every block of keys."""
    blocks = range(ceil(N / BM))
    return [Tile(head, 0, sum(key_tiles(b, N, BM, BN, causal) for b in blocks)) for head in range(heads)]


def launch_flash_2(
    heads: int, N: int, BM: int, BN: int, causal: bool = False,
    longest_first: bool = True,
) -> list[Tile]:
    """One program per head and block of queries, head by head."""
    blocks = list(range(ceil(N / BM)))
    if causal and longest_first:
        blocks.reverse()
    return [
        Tile(head, b, key_tiles(b, N, BM, BN, causal))
        for head in range(heads) for b in blocks
    ]


def run(launch: Sequence[Tile], sms: int, persistent: bool = False) -> list[Span]:
    """Play the launch on `sms` multiprocessors, one program at a time on each.

    Tiles go to whoever is free first, as the hardware does; a persistent
    program takes every sms-th tile instead.
    """
    free = [(0, sm) for sm in range(sms)]
    spans = []
    for number, tile in enumerate(launch):
        if persistent:
            start, sm = free[number % sms]
            free[number % sms] = (start + tile.work, sm)
        else:
            start, sm = heapq.heappop(free)
            heapq.heappush(free, (start + tile.work, sm))
        spans.append(Span(sm, start, start + tile.work, tile))
    return spans


def makespan(spans: Sequence[Span]) -> int:
    """When the last tile is done."""
    return max((span.end for span in spans), default=0)


def busy(spans: Sequence[Span], sms: int) -> float:
    """Share of the multiprocessors' time that is work."""
    return sum(span.tile.work for span in spans) / (sms * makespan(spans)) if spans else 0.0


def heads_at_once(spans: Sequence[Span]) -> int:
    """The most heads whose K and V are in use at one time: what L2 has to hold."""
    return max((len({s.tile.head for s in spans if s.start <= at.start < s.end}) for at in spans), default=0)
