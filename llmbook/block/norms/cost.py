"""What norms compute and move: counted while they run, and as formulas."""

from typing import Any

from torch import Tensor

from llmbook.block.rope.cost import Count

SUMS, ROOTS = {"mean", "sum"}, {"pow", "rsqrt"}


class Tally(Count):
    """Counts FLOPs, bytes and calls of what PyTorch executes.

    A mean of n numbers is n FLOPs (n − 1 additions, one division), a power
    or a root one per element.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if name in SUMS:
            self.flops += args[0].numel()
        if name in ROOTS:
            assert isinstance(out, Tensor)
            self.flops += out.numel()
        return out


def flops(rows: int, width: int, centre: bool, bias: bool) -> int:
    """Forward: 4 per element (square, sum, ·r, ·gain), 2 more to centre
    (mean, subtract), 1 for a bias; per row eps and a root."""
    return rows * (width * (4 + 2 * centre + bias) + 2)


def forward_bytes(rows: int, width: int, element: int, add: bool) -> int:
    """One fused pass: x read and y written once, with `add` the stream
    too; the gain once, and one fp32 r per row written."""
    tiles = rows * width * element * (4 if add else 2)
    return tiles + width * element + 4 * rows


def backward_bytes(
    rows: int, width: int, element: int, add: bool, programs: int
) -> int:
    """x and dy read, dx written, with `add` the stream's gradient read;
    r and the gain read; one fp32 partial of dweight per program, written
    and read."""
    tiles = rows * width * element * (4 if add else 3)
    return tiles + 4 * rows + width * element + 2 * 4 * programs * width
