"""What the online_softmax chapter times: row softmax at attention's and vocabularies' row lengths, beside its peers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from llmbook.kit.compare import PIECE, blocks, half, need_same_shape, wide, worst
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .kernel import fits, softmax

# (rows, row length): short rows, attention rows, then the vocabularies of Llama 2, Llama 3 and DeepSeek-V3.
SHAPES = (
    (1_048_576, 128), (262_144, 1_024), (65_536, 4_096), (16_384, 16_384), (8_192, 32_000), (4_096, 128_256),
    (4_096, 129_280), (16, 128_256),
)
SMALL: dict[str, Any] = {"shapes": ((150, 40), (2, 16_500))}


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int]] = SHAPES, dtype: torch.dtype | None = None
) -> Iterator[Case]:
    """One case per shape, checked against float64; peers: eager and compiled PyTorch, and a copy of the same tensor."""
    dtype = dtype or half(device)
    for rows, n in shapes:
        accesses = 2 if fits(n) else 3
        yield Case(
            "row softmax", {"rows": rows, "n": n, "dtype": str(dtype).removeprefix("torch.")},
            functools.partial(_make, rows, n, dtype, device),
            5 * rows * n,  # compare, subtract, exponential, add, divide
            accesses * rows * n * dtype.itemsize, 2 * rows * n * dtype.itemsize + 6 * 8 * min(rows * n, PIECE + n),
        )


def _make(rows: int, n: int, dtype: torch.dtype, device: torch.device) -> Work:
    generator = torch.Generator(device=device).manual_seed(n)
    x = torch.randn(rows, n, dtype=dtype, device=device, generator=generator)
    limits = torch.finfo(dtype)

    def off(part: slice, out: torch.Tensor) -> float:
        """Of each probability by itself: the smallest count as much as the largest, down to what is subnormal."""
        exact = wide(x[part]).softmax(-1)
        return float(((out[part] - exact).abs() / exact.clamp_min(limits.smallest_normal)).max())

    def error(out: torch.Tensor) -> tuple[float, float]:
        need_same_shape(out, x)
        return worst(off(part, out) for part in blocks(rows, n)), limits.eps

    peers: dict[str, Callable[[], Any]] = {
        "torch.softmax": lambda: torch.softmax(x, -1), "torch.compile": lambda: _compiled()(x),
    }
    return Work(lambda: softmax(x), error, peers, {"copy: one read, one write": x.clone})


@functools.cache
def _compiled() -> Callable[[torch.Tensor], Any]:
    """Compiled at the first call: to name this peer costs nothing."""
    return torch.compile(functools.partial(torch.softmax, dim=-1), dynamic=False)
