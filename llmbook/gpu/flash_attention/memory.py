"""A two-level memory that keeps accounts: an SRAM that refuses to overflow, and an HBM that counts what crosses.

Sizes are in elements, as in the paper's analysis; multiply by the bytes of the dtype.
"""

import torch

Tensor = torch.Tensor


class SramError(RuntimeError):
    """A tile that does not fit, or one that is not there. The message says which, and what SRAM holds."""


class Memory:
    """SRAM with `capacity` elements (None: unbounded) in front of an HBM whose reads and writes are counted.

    Attributes:
        live: what SRAM holds, name → elements, oldest first.
        peak: the most elements SRAM held at once.
        reads, writes: elements that crossed from and to HBM.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.live: dict[str, int] = {}
        self.peak = self.reads = self.writes = 0

    @property
    def used(self) -> int:
        """Elements in SRAM now."""
        return sum(self.live.values())

    def new(self, rows: int, columns: int, like: Tensor, fill: float = 0.0) -> Tensor:
        """A matrix in HBM, filled, which costs its size in writes."""
        self.writes += rows * columns
        return like.new_full((rows, columns), fill)

    def load(self, name: str, matrix: Tensor, start: int, rows: int) -> Tensor:
        """Read `rows` rows of a matrix in HBM from `start` on into SRAM under `name`."""
        tile = matrix[start : start + rows]
        self.reads += tile.numel()
        return self.hold(name, tile)

    def hold(self, name: str, tile: Tensor, over: str | None = None) -> Tensor:
        """Keep a computed tile in SRAM; `over` names a tile of the same size whose place it takes.

        Raises:
            SramError: it does not fit; the name is taken; or what it should replace is absent or smaller.
        """
        if over is not None:
            if self._size(over) < tile.numel():
                larger = f"{name} ({tile.numel()}) is larger than {over} ({self.live[over]})"
                raise SramError(f"{larger} and cannot replace it")
            del self.live[over]
        if name in self.live:
            raise SramError(f"{name} is already in SRAM: free it before loading the next one")
        if self.capacity is not None and self.used + tile.numel() > self.capacity:
            raise SramError(
                f"{name} needs {tile.numel()} elements, but only {self.capacity - self.used} of {self.capacity} "
                f"are free; SRAM holds {self.live}"
            )
        self.live[name] = tile.numel()
        self.peak = max(self.peak, self.used)
        return tile

    def store(self, matrix: Tensor, start: int, tile: Tensor) -> None:
        """Write a tile to its rows in HBM. It stays in SRAM: a store is a copy, not a release."""
        self.writes += tile.numel()
        matrix[start : start + len(tile)] = tile

    def free(self, *names: str) -> None:
        """Give the tiles' room back."""
        for name in names:
            self._size(name)
            del self.live[name]

    def free_all_but(self, *names: str) -> None:
        """Give back every tile's room but that of these."""
        self.free(*(name for name in list(self.live) if name not in names))

    def _size(self, name: str) -> int:
        if name not in self.live:
            raise SramError(f"{name} is not in SRAM, which holds {list(self.live) or 'nothing'}")
        return self.live[name]
