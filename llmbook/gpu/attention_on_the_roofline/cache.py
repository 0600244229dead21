"""L2 as a list of tiles: replay what the kernels' programs read, tile by tile, and count what HBM and L2 deliver."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import repeat
from math import ceil
from typing import NamedTuple


class Tile(NamedTuple):
    """One tile of keys and values of one KV head of one sequence."""

    kv: int
    number: int


class Program(NamedTuple):
    """A KV head, the query heads that the program has in registers, and the tiles that it reads in this order."""

    kv: int
    heads: tuple[int, ...]
    reads: tuple[Tile, ...]


class Moment(NamedTuple):
    """One tick: per multiprocessor (None: idle) program, tile and whether L2 had it; L2 afterwards; the counts."""

    running: tuple[tuple[Program, Tile, bool] | None, ...]
    held: tuple[Tile, ...]
    hbm: int
    l2: int


def launch(
    kv_heads: int, group: int, tiles: int, rows: int = 1, splits: int = 1,
    together: bool = True,
) -> list[Program]:
    """The programs in the order in which they start: as `kernel.place` numbers them.

    Args:
        kv_heads: KV heads of all sequences together, each with `tiles` tiles.
        group, rows: query heads per KV head, and per program.
        splits: shares of the keys.
        together: a group's programs are neighbours; if not, they are
            kv_heads apart, as when heads are laid out the other way round.

    Raises:
        ValueError: a count is less than 1.
    """
    if min(kv_heads, group, rows, splits) < 1 or tiles < 0:
        raise ValueError(
            "kv_heads, group, rows, splits must be 1 or more, tiles 0 or more"
        )
    blocks, programs = ceil(group / rows), []
    per = ceil(tiles / splits)
    for number in range(kv_heads * blocks * splits):
        unit, split = number % (kv_heads * blocks), number // (kv_heads * blocks)
        kv, block = divmod(unit, blocks) if together else divmod(unit, kv_heads)[::-1]
        first = kv * group + block * rows
        heads = tuple(range(first, min(first + rows, (kv + 1) * group)))
        mine = range(split * per, min(tiles, (split + 1) * per))
        programs.append(Program(kv, heads, tuple(Tile(kv, t) for t in mine)))
    return programs


class L2:
    """A cache of `capacity` tiles that drops the one read longest ago.

    Fully associative; a real L2 has sets, and two halves.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.hbm, self.loads = capacity, 0, 0
        self.tiles: OrderedDict[Tile, None] = OrderedDict()

    def read(self, tile: Tile) -> bool:
        """Deliver a tile; whether it was there, else HBM delivers it first."""
        hit = tile in self.tiles
        self.loads, self.hbm = self.loads + 1, self.hbm + (not hit)
        self.tiles[tile] = None
        self.tiles.move_to_end(tile)
        if len(self.tiles) > self.capacity:
            self.tiles.popitem(last=False)
        return hit


def replay(
    programs: Sequence[Program], sms: int, capacity: int
) -> Iterator[Moment]:
    """Play the programs on `sms` multiprocessors, each reading one tile per tick.

    A multiprocessor that is free takes the next program.

    Raises:
        ValueError: no multiprocessor, or a negative capacity.
    """
    if sms < 1 or capacity < 0:
        raise ValueError(
            f"there must be 1 or more multiprocessors and a capacity of 0 or "
            f"more tiles, not {sms} and {capacity}"
        )
    waiting, l2 = iter(p for p in programs if p.reads), L2(capacity)
    streams: list[Iterator[tuple[Program, Tile]]] = [iter(())] * sms
    while True:
        running: list[tuple[Program, Tile, bool] | None] = []
        for sm in range(sms):
            turn = next(streams[sm], None)
            if turn is None and (fresh := next(waiting, None)):
                streams[sm] = zip(repeat(fresh), fresh.reads)
                turn = next(streams[sm])
            running.append(turn and (*turn, l2.read(turn[1])))
        if not any(running):
            return
        yield Moment(tuple(running), tuple(l2.tiles), l2.hbm, l2.loads)


def counts(programs: Sequence[Program], sms: int, capacity: int) -> tuple[int, int]:
    """Tiles out of HBM and out of L2 when all programs are done."""
    last = (0, 0)
    for moment in replay(programs, sms, capacity):
        last = moment.hbm, moment.l2
    return last
