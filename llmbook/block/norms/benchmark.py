"""What RMSNorm is timed on: forward, backward and with the residual's addition, at the sizes of LLMs."""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmbook.kit.compare import PIECE, blocks, half, need_same_shape, piece_error, wide, worst
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from . import kernel
from .cost import backward_bytes, flops, forward_bytes

EPS = 1e-5  # Llama 3's


class Size(NamedTuple):
    """Rows (tokens) and width D of one norm."""

    rows: int
    width: int


SIZES = (Size(4096, 2048), Size(32_768, 4096), Size(16_384, 8192))
SMALL: dict[str, Any] = {"sizes": (Size(5, 64), Size(3, 2500))}
KINDS = ("forward", "forward + backward", "add + norm forward")

Results = tuple[Tensor, ...]
Norm = Callable[[Tensor, Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return kernel.rms_norm(x, weight, EPS)


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, one fused operation on a GPU."""
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def ours_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.add_rms_norm(x, residual, weight, EPS)


def torchs_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two operations: the sum goes out to memory and comes back."""
    stream = residual + x
    return torchs(stream, weight), stream


@functools.cache
def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """Compiled at the first call: to name this peer costs nothing."""
    return torch.compile(function, dynamic=False)


def cases(device: torch.device = DEVICE, sizes: tuple[Size, ...] = SIZES) -> Iterator[Case]:
    """Every kind at every size: ours, checked against float64, beside F.rms_norm, the same through torch.compile,
    and a copy of as many bytes: ours over the copy's GB/s is the share of the device's own copy bandwidth.
    """
    dtype = half(device)
    for kind in KINDS:
        for size in sizes:
            rows, width = size
            element, add = dtype.itemsize, kind.startswith("add")
            moved = forward_bytes(rows, width, element, add)
            work = flops(rows, width, centre=False, bias=False) + add * rows * width
            if kind.endswith("backward"):
                moved += backward_bytes(rows, width, element, False, kernel.programs(rows, width))
                work += rows * width * 9  # x̂, g∘dy, their two products and sums, and three for dx
            yield Case(
                f"RMSNorm {kind}", {"rows": rows, "D": width, "dtype": str(dtype).removeprefix("torch.")},
                partial(_make, kind, size, moved, dtype, device), work, moved,
                # Inputs, results, a copy of what is moved; a block of rows in float64 with what autograd keeps.
                8 * rows * width * element + 2 * moved + 8 * 16 * min(rows * width, PIECE + width),
            )


def run(kind: str, norm: Norm, add: AddNorm, inputs: Results) -> Results:
    """One kind of work on (x, residual, weight, upstream)."""
    x, residual, weight, upstream = inputs
    if kind == "add + norm forward":
        with torch.no_grad():
            return add(x, residual, weight)
    if kind == "forward":
        with torch.no_grad():
            return (norm(x, weight),)
    y = norm(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), upstream))


def _make(kind: str, size: Size, moved: int, dtype: torch.dtype, device: torch.device) -> Work:
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    inputs = (random(*size).requires_grad_(), random(*size), random(size.width).requires_grad_(), random(*size))

    def error(result: Results) -> tuple[float, float]:
        # Llama's norm rounds twice, before the gain and after; with the addition, three times.
        return worst(_errors(kind, result, inputs)), 2 * torch.finfo(dtype).eps

    copied = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    return Work(
        lambda: run(kind, ours, ours_add, inputs), error,
        {
            "F.rms_norm": lambda: run(kind, torchs, torchs_add, inputs),
            "torch.compile": lambda: run(kind, compiled(torchs), compiled(torchs_add), inputs),  # type: ignore[arg-type]
        },
        {"copy of the same bytes": copied.clone},
    )


def _errors(kind: str, result: Results, inputs: Results) -> Iterator[float]:
    """Of each block of rows, and of the gain's gradient, which sums over all of them."""
    x, residual, weight, upstream = inputs
    by_rows, by_sum = (result[:2], result[2:]) if kind.endswith("backward") else (result, ())
    for t in by_rows:
        need_same_shape(t, x)
    gain = torch.zeros_like(wide(weight))
    for part in blocks(*x.shape):
        leaves = (
            wide(x[part]).requires_grad_(), wide(residual[part]), wide(weight).requires_grad_(), wide(upstream[part])
        )
        exact = run(kind, torchs, torchs_add, leaves)
        for t, right in zip(by_rows, exact, strict=False):  # the third, if there is one, is this block's share
            yield piece_error(t[part], right)
        if by_sum:
            gain += exact[2]
    for t in by_sum:
        yield piece_error(t, gain)
