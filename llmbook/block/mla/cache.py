"""The latent cache: per token one row, c beside the rotary key, in pages; nothing per head."""

import torch
from torch import Tensor

from llmbook.block.attention_and_kv_cache.cache import Pages, beyond, known, new_places


class LatentCache:
    """Rows of all layers in pages, one table per sequence.

    A page as long as the longest sequence, and one for each, is a cache
    whose rows are reserved in advance.

    rows: [L, pages, page, width]. lengths: [L, B], int64.
    """

    def __init__(
        self, batch: int, pages: int, page: int, width: int, *, layers: int = 1,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        self.pages = Pages(batch, pages, page)
        self.rows = torch.zeros(layers, pages, page, width, dtype=dtype, device=device)
        self.lengths = torch.zeros(layers, batch, dtype=torch.int64, device=device)

    def append(self, new: Tensor, counts: Tensor, layer: int = 0) -> Tensor:
        """Add each sequence's first counts[b] rows, then `read`.

        new: [B, S, width]; counts: [B], 0 to S. Kept without gradient.

        Raises:
            ValueError: another width, batch or dtype, or too few free pages;
                nothing was written.
        """
        batch, width = self.lengths.shape[1], self.rows.shape[-1]
        if new.dim() != 3 or [new.shape[0], new.shape[2]] != [batch, width]:
            raise ValueError(
                f"this cache keeps rows [{batch}, S, {width}], latent and rotary key "
                f"side by side, but got {list(new.shape)}"
            )
        if new.dtype != self.rows.dtype:
            raise ValueError(f"the cache holds {self.rows.dtype}, not {new.dtype}")
        starts, size = self.lengths[layer], self.pages.page
        self.pages.allocate(starts + counts)
        row, column = new_places(counts, new.shape[1])
        at = starts[row] + column
        page = self.page_table()[row, at // size]
        self.rows[layer][page, at % size] = new.detach()[row, column]
        self.lengths[layer] = starts + counts
        return self.read(layer)

    def read(self, layer: int = 0) -> Tensor:
        """All rows, [B, longest, width]; zeros, which must be masked, beyond a
        sequence's length."""
        empty = beyond(self.lengths[layer])
        rows = self.rows[layer][self.page_table()].flatten(1, 2)
        return rows[:, : empty.shape[1]].masked_fill(empty[..., None], 0)

    def page_table(self) -> Tensor:
        """[B, most pages], int64."""
        return self.pages.as_tensor(self.rows.device)

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages can be taken by others."""
        known(sequence, self.lengths.shape[1])
        self.pages.give_back(sequence)
        self.lengths[:, sequence] = 0
