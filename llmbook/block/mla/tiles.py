"""The kernel's tile by number of heads, width of an element and GPU generation.

The accumulator, rows × 512 in fp32, fills the registers; a tile of rows, BN × 576, fills shared memory.
"""

from typing import NamedTuple

from llmbook.kit.generations import family


class Tiles(NamedTuple):
    """`rows` heads by BN cached rows, and Triton's launch options."""

    rows: int
    BN: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time constants that depend on the tile."""
        return {"ROWS": self.rows, "BN": self.BN}

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiles_for(heads: int, element: int, sm: int) -> Tiles:
    """The tile for elements of `element` bytes on compute capability × 10 sm; none of them spills.

    Without a tensor core (Turing by Triton, and fp32 everywhere) few rows fit, and 16 are not needed.
    """
    like = family(sm)
    if element == 4 or like == 75:
        return Tiles(8, 16, 16 if like == 89 else 8, 1)
    most = 32 if like == 89 else 64
    rows = min(most, max(16, 1 << (heads - 1).bit_length()))
    if like == 89:
        return Tiles(rows, 16 if rows == 32 else 32, 8, 2)
    if rows < 64:
        return Tiles(rows, 64, 8, 2)
    return Tiles(rows, 32 if like == 100 else 16, 8, 2 if like == 90 else 3)
