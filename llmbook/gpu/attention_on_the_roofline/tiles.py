"""The tile of each kernel by head dimension, group size and GPU generation."""

from typing import NamedTuple

from llmbook.kit.generations import family

LATENT, ROTARY = 512, 64  # MLA's cache row: a latent that is key and value, then the rotary part of the key
HEAD_DIMENSIONS = (64, 128, LATENT + ROTARY)
LEAST_ROWS = 16  # rows of the smallest matrix product of a tensor core; without one, fewer do


class Tiles(NamedTuple):
    """`rows` query heads by BN keys; d: width of V; tail: what K has besides; shared: V is a part of K."""

    rows: int
    BN: int
    warps: int
    stages: int
    d: int
    tail: int = 0
    shared: bool = False

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time constants that depend on the tile."""
        if self.rows == 1:
            return {"D": self.d, "BN": self.BN}
        return {"D": self.d, "TAIL": self.tail, "SHARED": self.shared, "ROWS": self.rows, "BN": self.BN}

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def rows_for(group: int, most: int = 64) -> int:
    """Rows of the packed tile: the power of two that holds the group, from 16 to `most`."""
    return min(most, max(LEAST_ROWS, 1 << (group - 1).bit_length()))


def tiles_for(kernel: str, d: int, group: int, sm: int) -> Tiles:
    """The tile of "per head" or "packed" for keys d wide, on compute capability × 10 sm.

    Raises:
        ValueError: an unknown kernel, or a head dimension that it does not support.
    """
    if kernel not in ("per head", "packed"):
        raise ValueError(f"no kernel is called {kernel!r}; there are 'per head' and 'packed'")
    if d not in HEAD_DIMENSIONS or (kernel, d) == ("per head", 576):
        known = HEAD_DIMENSIONS[: 2 if kernel == "per head" else 3]
        raise ValueError(f"the {kernel!r} kernel takes keys {', '.join(map(str, known))} wide, not {d}")
    if kernel == "per head":
        return Tiles(1, 32 if d == 128 else 64, 4, 2, d)
    like = family(sm)
    small = like in (75, 89)  # 64 or 99 KiB of shared memory
    if d == LATENT + ROTARY:
        if like == 75:
            return Tiles(8, 16, 8, 1, LATENT, ROTARY, True)
        rows = rows_for(group, 16 if small else 64 if like == 100 else 32)  # more rows spill
        return Tiles(rows, 32, 8, 1 if small else 2, LATENT, ROTARY, True)
    if like == 75:  # no tensor cores by Triton: wide tiles spill
        return Tiles(rows_for(group, 16), 16, 4, 1, d)
    rows = rows_for(group)
    return Tiles(rows, 64, 8 if small and rows == 64 else 4, 2 if small else 3, d)
