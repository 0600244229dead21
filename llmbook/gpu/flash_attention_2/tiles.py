"""The tile shapes of each kernel by GPU generation: the largest that the compiler keeps in registers."""

from typing import NamedTuple

from llmbook.kit.generations import family

SMALLEST, LARGEST = 16, 256  # head dimensions


class Tiles(NamedTuple):
    """BM queries by BN keys per tile, warps per program, tiles in flight; `split` gives loads warps of their own."""

    BM: int
    BN: int
    warps: int
    stages: int
    split: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# Family → tiles for head dimensions up to 64, 128, 256; one that is not listed takes those of the one before it.
# Triton uses no tensor cores before sm_80: wide tiles spill.
TABLE = {
    "forward": {
        75: (Tiles(32, 32, 4, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
        80: (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 2)),
        90: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
        100: (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    },
    "tma": {
        90: (Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 2), Tiles(128, 32, 8, 2)),
        100: (Tiles(128, 64, 8, 2, split=True), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    },
    "dkdv": {
        75: (Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
        80: (Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1)),
        89: (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
        90: (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 32, 8, 1)),
        100: (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 32, 8, 1)),
    },
    "dq": {
        75: (Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
        80: (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 32, 8, 1)),
        90: (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 32, 8, 1)),
        100: (Tiles(128, 32, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 32, 8, 1)),
    },
}


def padded(d: int) -> int:
    """The power of two, 16 or more, that a tile's rows are wide."""
    return max(16, 1 << (d - 1).bit_length())


def tiles_for(kind: str, d: int, sm: int) -> Tiles:
    """The tiles of a kernel ("forward", "tma", "dkdv", "dq") for head dimension d on compute capability × 10 sm.

    Raises:
        ValueError: no such kernel, a head dimension outside 16 to 256, or a GPU older than the kernel's first.
    """
    if kind not in TABLE:
        raise ValueError(f"no kernel is called {kind!r}; there are: {', '.join(TABLE)}")
    if not SMALLEST <= d <= LARGEST:
        raise ValueError(f"head dimension {d} is not supported: it must be from {SMALLEST} to {LARGEST}")
    known = [entry for entry in TABLE[kind] if entry <= family(sm)]
    if not known:
        there = " and ".join(f"sm_{entry}" for entry in TABLE[kind])
        raise ValueError(f"the {kind!r} kernel has tiles for {there}, and none that fits sm_{sm}")
    return TABLE[kind][max(known)][0 if d <= 64 else 1 if d <= 128 else 2]
