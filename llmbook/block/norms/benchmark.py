"""What RMSNorm is timed on: forward, backward and with the residual's addition, at the sizes of LLMs."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from . import kernel
from .cost import backward_bytes, flops, forward_bytes

EPS = 1e-5  # Llama 3's


class Size(NamedTuple):
    """Rows (tokens) and width D of one norm."""

    rows: int
    width: int


SIZES = (Size(4096, 2048), Size(8192, 4096), Size(32_768, 4096), Size(4096, 8192), Size(16_384, 8192))
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

    Ours may err twice as much as F.rms_norm does in the same dtype: it rounds before the gain, as Llama does, where
    PyTorch rounds once.
    """
    dtype = torch.bfloat16 if capability() >= 80 else torch.float16
    for kind in KINDS:
        for size in sizes:
            yield _case(kind, size, dtype, device)


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


def _case(kind: str, size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    rows, width = size
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    inputs = (random(*size).requires_grad_(), random(*size), random(width).requires_grad_(), random(*size))

    def error(result: Results) -> tuple[float, float]:
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        exact = run(kind, torchs, torchs_add, wide)
        theirs = run(kind, torchs, torchs_add, inputs)
        floor = torch.finfo(dtype).eps / 8  # theirs may be exact by luck, at tiny sizes
        ratios = torch.tensor([
            relative_error(a, c) / max(relative_error(b, c), floor)
            for a, b, c in zip(result, theirs, exact, strict=True)
        ])
        return float(ratios.max()), 2.0  # a tensor's maximum keeps a NaN

    element, add, both = dtype.itemsize, kind.startswith("add"), kind.endswith("backward")
    moved = forward_bytes(rows, width, element, add)
    work = flops(rows, width, centre=False, bias=False) + add * rows * width
    if both:
        moved += backward_bytes(rows, width, element, False, kernel.programs(rows, width))
        work += rows * width * 9  # x̂, g∘dy, their two products and sums, and three for dx
    copied = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    return Case(
        f"RMSNorm {kind}", {"rows": rows, "D": width, "dtype": str(dtype).removeprefix("torch.")},
        lambda: run(kind, ours, ours_add, inputs), error, work, moved,
        {
            "F.rms_norm": lambda: run(kind, torchs, torchs_add, inputs),
            "torch.compile": lambda: run(kind, compiled(torchs), compiled(torchs_add), inputs),  # type: ignore[arg-type]
            "copy of the same bytes": copied.clone,
        },
    )
