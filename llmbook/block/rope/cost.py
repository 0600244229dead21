"""What RoPE computes and moves: counted while it runs, and as a formula."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ARITHMETIC = {"mul", "add", "sub", "neg", "div"}


class Count(TorchDispatchMode):
    """Counts what PyTorch really executes inside a `with` block.

    Attributes:
        flops: elements written by additions, subtractions, products.
        bytes: sizes of what each operation reads and writes; views are free.
        calls: operations that touch memory, one kernel launch each on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in _tensors(args) if t.numel()]
        written = [t for t in _tensors((out,)) if t.numel()]
        known = {t.untyped_storage().data_ptr() for t in read}
        # An output that shares its input's memory is a view: nothing moved.
        if all(t.untyped_storage().data_ptr() in known for t in written):
            return out
        self.calls += 1
        self.bytes += sum(t.numel() * t.element_size() for t in read + written)
        if func.overloadpacket.__name__ in ARITHMETIC:
            self.flops += sum(t.numel() for t in written)
        return out


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [t for value in values for t in _tensors(value)]
    return []


def flops(tokens: int, heads: int, head_dim: int) -> int:
    """4 products and 2 sums per pair: 3 FLOP per element.

    `heads` counts query and key heads together.
    """
    return 3 * tokens * heads * head_dim


def fused_bytes(
    tokens: int, heads: int, head_dim: int, element: int, table: int = 4
) -> int:
    """What one fused pass must move: x read once and written once, cos and
    sin read once per token.

    Args:
        heads: query and key heads together.
        element, table: bytes per element of x, and of cos and sin.
    """
    return tokens * (2 * heads * head_dim * element + head_dim * table)
