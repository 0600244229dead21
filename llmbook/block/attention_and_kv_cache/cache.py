"""Two KV caches behind one interface: rows reserved in advance, and pages handed out as sequences grow.

Paging: Kwon et al. 2023 (arXiv 2309.06180). Both hold all layers, so that a page table serves every layer.
"""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What attention asks of a cache.

    lengths: [L, B], int64, tokens held per layer and sequence.
    """

    lengths: Tensor

    def append(
        self, k: Tensor, v: Tensor, counts: Tensor, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Add each sequence's first counts[b] tokens, then `read`.

        k, v: [B, n_kv, S, d_h]; counts: [B], 0 to S. Kept without gradient.

        Raises:
            ValueError: no room, or shapes or dtypes that differ from the
                cache's; nothing was written.
        """

    def read(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, n_kv, longest, d_h]; zeros, which must be
        masked, beyond a sequence's length."""

    def free(self, sequence: int) -> None:
        """Forget a sequence: its place can be taken by another."""


class StaticCache:
    """A row of max_len slots per sequence, reserved when the cache is made.

    k, v: [L, B, n_kv, max_len, d_h].
    """

    def __init__(
        self, batch: int, kv_heads: int, max_len: int, head_dim: int, *,
        layers: int = 1, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, batch, kv_heads, max_len, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(layers, batch, dtype=torch.int64, device=device)
        self.max_len = max_len

    def append(
        self, k: Tensor, v: Tensor, counts: Tensor, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        fits(k, v, self.k, self.lengths.shape[1])
        starts = self.lengths[layer]
        ends = starts + counts
        if (ends > self.max_len).any():
            b = int(ends.argmax())
            raise ValueError(
                f"sequence {b} would hold {int(ends[b])} tokens, but the cache "
                f"has {self.max_len} positions: make max_len larger"
            )
        row, column = new_places(counts, k.shape[2])
        self.k[layer][row, :, starts[row] + column] = k.detach()[row, :, column]
        self.v[layer][row, :, starts[row] + column] = v.detach()[row, :, column]
        self.lengths[layer] = ends
        return self.read(layer)

    def read(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        longest = longest_of(self.lengths[layer])
        return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]

    def free(self, sequence: int) -> None:
        known(sequence, self.lengths.shape[1])
        self.lengths[:, sequence] = 0
        self.k[:, sequence] = self.v[:, sequence] = 0  # it may have held a NaN


class Pages:
    """Who holds which page of a pool.

    Token t of sequence b lies in page `tables[b][t // page]`, slot t % page.
    """

    def __init__(self, batch: int, pages: int, page: int) -> None:
        if page < 1:
            raise ValueError(f"a page must hold at least 1 token, not {page}")
        self.page = page
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.unused = list(range(pages))[::-1]  # a stack: the last is next

    def allocate(self, ends: Tensor) -> None:
        """Give every sequence the pages for ends[b] tokens, or none any.

        Raises:
            ValueError: the pool has too few; nothing was handed out.
        """
        needed = [
            max(0, -(-end // self.page) - len(table))
            for end, table in zip(ends.tolist(), self.tables, strict=True)
        ]
        if sum(needed) > len(self.unused):
            raise ValueError(
                f"out of pages: {sum(needed)} more are needed and "
                f"{len(self.unused)} are free: free a sequence, or wait"
            )
        for table, n in zip(self.tables, needed, strict=True):
            table.extend(self.unused.pop() for _ in range(n))

    def give_back(self, sequence: int) -> None:
        self.unused += self.tables[sequence][::-1]
        self.tables[sequence] = []

    def as_tensor(self, device: torch.device) -> Tensor:
        """[B, most pages], int64; short tables are filled with page 0."""
        most = max(map(len, self.tables), default=0)
        padded = [table + [0] * (most - len(table)) for table in self.tables]
        table = torch.tensor(padded, dtype=torch.int64, device=device)
        return table.view(len(padded), most)


class PagedCache:
    """Keys and values in pages, one table per sequence for all layers.

    k, v: [L, pages, n_kv, page, d_h].
    """

    def __init__(
        self, batch: int, kv_heads: int, pages: int, page: int, head_dim: int, *,
        layers: int = 1, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pages = Pages(batch, pages, page)
        shape = (layers, pages, kv_heads, page, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(layers, batch, dtype=torch.int64, device=device)

    def append(
        self, k: Tensor, v: Tensor, counts: Tensor, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        fits(k, v, self.k, self.lengths.shape[1])
        starts, size = self.lengths[layer], self.pages.page
        self.pages.allocate(starts + counts)
        row, column = new_places(counts, k.shape[2])
        at = starts[row] + column
        page, slot = self.page_table()[row, at // size], at % size
        self.k[layer][page, :, slot] = k.detach()[row, :, column]
        self.v[layer][page, :, slot] = v.detach()[row, :, column]
        self.lengths[layer] = starts + counts
        return self.read(layer)

    def read(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        table, empty = self.page_table(), beyond(self.lengths[layer])

        def gather(pool: Tensor) -> Tensor:
            rows = pool[table].transpose(1, 2)  # [B, n_kv, pages, page, d_h]
            rows = rows.flatten(2, 3)[:, :, : empty.shape[1]]
            # A short table's page 0 and a page's last slots are others'.
            return rows.masked_fill(empty[:, None, :, None], 0)

        return gather(self.k[layer]), gather(self.v[layer])

    def page_table(self) -> Tensor:
        return self.pages.as_tensor(self.k.device)

    def free(self, sequence: int) -> None:
        known(sequence, self.lengths.shape[1])
        self.pages.give_back(sequence)
        self.lengths[:, sequence] = 0


def new_places(counts: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """(sequence, index among the new) of every token that is no padding."""
    real = torch.arange(new, device=counts.device) < counts[:, None]
    row, column = real.nonzero(as_tuple=True)
    return row, column


def beyond(lengths: Tensor) -> Tensor:
    """[B, longest], bool: the places behind each sequence's last token."""
    return torch.arange(longest_of(lengths), device=lengths.device) >= lengths[:, None]


def longest_of(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0


def fits(k: Tensor, v: Tensor, store: Tensor, batch: int) -> None:
    """Refuse keys and values that are not the cache's kind."""
    wanted = [batch, store.shape[2], store.shape[4]]
    if k.dim() != 4 or k.shape != v.shape or [k.shape[0], k.shape[1], k.shape[3]] != wanted:
        raise ValueError(
            f"k and v must both be [{batch}, {wanted[1]}, S, {wanted[2]}] for this cache, "
            f"but are {list(k.shape)} and {list(v.shape)}"
        )
    if not k.dtype == v.dtype == store.dtype:
        raise ValueError(f"the cache holds {store.dtype}, but k and v are {k.dtype} and {v.dtype}")


def known(sequence: int, batch: int) -> None:
    if not 0 <= sequence < batch:
        raise ValueError(f"there are sequences 0 to {batch - 1}, but no {sequence}")
