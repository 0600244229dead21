"""What the online_softmax chapter times: row softmax at attention's and vocabularies' row lengths, beside its peers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from .kernel import fits, softmax

# (rows, row length): short rows, attention rows, then the vocabularies of Llama 2, Llama 3 and DeepSeek-V3.
SHAPES = (
    (1_048_576, 128), (262_144, 1_024), (65_536, 4_096), (16_384, 16_384), (8_192, 32_000), (4_096, 128_256),
    (4_096, 129_280), (16, 128_256),
)
CHECKED = 64  # rows of float64 at either end


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int]] = SHAPES, dtype: torch.dtype | None = None
) -> Iterator[Case]:
    """One case per shape, checked against float64; peers: eager and compiled PyTorch, and a copy of the same tensor."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for rows, n in shapes:
        yield _case(rows, n, dtype, device)


def _case(rows: int, n: int, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device=device).manual_seed(n)
    x = torch.randn(rows, n, dtype=dtype, device=device, generator=generator)

    def error(out: torch.Tensor) -> tuple[float, float]:
        ends = [slice(0, CHECKED), slice(max(CHECKED, rows - CHECKED), rows)]
        found = [relative_error(out[end], x[end].double().softmax(-1)) for end in ends if len(out[end])]
        nan = any(one != one for one in found)
        return float("nan") if nan else max(found), torch.finfo(dtype).eps

    accesses = 2 if fits(n) else 3
    return Case(
        "row softmax", {"rows": rows, "n": n, "dtype": str(dtype).removeprefix("torch.")}, lambda: softmax(x), error,
        5 * rows * n,  # compare, subtract, exponential, add, divide
        accesses * rows * n * dtype.itemsize,
        {
            "torch.softmax": lambda: torch.softmax(x, -1), "torch.compile": lambda: _compiled()(x),
            "copy: one read, one write": x.clone,
        },
    )


@functools.cache
def _compiled() -> Callable[[torch.Tensor], Any]:
    """Compiled at the first call: to name this peer costs nothing."""
    return torch.compile(functools.partial(torch.softmax, dim=-1), dynamic=False)
