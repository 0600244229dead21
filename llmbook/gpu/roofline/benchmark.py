"""What the roofline chapter times: the roofs themselves, GEMMs from decode batch 1 to 4096, and what fusion buys."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmbook.kit.compare import PIECE, blocks, half, need_same_shape, wide, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .chains import gelu
from .counting import count
from .gemm import Gemm
from .roofs import NAMES

Tensor = torch.Tensor
BATCHES = tuple(2**i for i in range(13))  # 1 … 4096
WIDE = 8192  # rows and columns of the weight: 134 MB in half precision, more than any L2
COPIED = 2**30  # elements; 2 GiB in half precision
SMALL: dict[str, Any] = {"batches": (1, 3, 16), "size": 32, "copied": 800}
TUNED = (16, WIDE)  # the M that torch.compile is timed at: to choose among Triton's GEMMs takes it 20 seconds


def cases(
    device: torch.device = DEVICE, batches: Iterable[int] = BATCHES, size: int = WIDE, copied: int = COPIED,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """The copy and the large products that draw the roofs, then points under them; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    yield _copy(copied, dtype, device)
    yield _gemm("GEMM, large", size, size, dtype, device)
    yield _gemm("GEMM, CUDA cores", size // 2, size // 2, torch.float32, device)
    for M in batches:
        yield _gemm("GEMM, decode", M, size, dtype, device)
    yield from _gelus(copied // 8, dtype, device)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(shape[0])
    return torch.randn(*shape, dtype=dtype, device=device, generator=generator)


def _copy(n: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make() -> Work:
        x = _random(n, dtype=dtype, device=device)
        out = torch.empty_like(x)

        def error(copy: Tensor) -> tuple[float, float]:
            need_same_shape(copy, x)
            return 0.0 if all(torch.equal(copy[part], x[part]) for part in blocks(n, 1)) else 1.0, 0.0

        return Work(lambda: out.copy_(x), error, {"clone": x.clone})

    moved = 2 * n * dtype.itemsize
    return Case("copy", {"elements": n, "dtype": NAMES[dtype]}, make, 0, moved, 2 * moved)


def _gemm(name: str, M: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """[M, size] × [size, size]; the weight is stored [out, in], as a linear layer has it."""
    g = Gemm(M, size, size, NAMES[dtype])
    held = (2 * M * size + size**2) * dtype.itemsize
    return Case(
        name, {"M": M, "N": size, "K": size, "dtype": g.dtype}, functools.partial(_product, M, size, dtype, device),
        g.flop, g.bytes, held + 8 * (size**2 + 8 * min(M * size, PIECE + size)),
    )


def _product(M: int, size: int, dtype: torch.dtype, device: torch.device) -> Work:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise ValueError("fp32 products would be rounded to tf32: call torch.set_float32_matmul_precision('highest')")
    a, w = (_random(rows, size, dtype=dtype, device=device) for rows in (M, size))
    # fp32 is checked in float64 on every GPU: beside itself it would prove nothing. Sums of K round at each step.
    exact = torch.Tensor.double if dtype == torch.float32 else wide
    allowed = 4 * torch.finfo(dtype).eps + size**0.5 * torch.finfo(torch.float32).eps

    def error(out: Tensor) -> tuple[float, float]:
        need_same_shape(out, torch.empty(M, size, device="meta"))
        right = exact(w).T
        return worst_error((out[rows], exact(a[rows]) @ right) for rows in blocks(M, size)), allowed

    peers: dict[str, Callable[[], Any]] = {"F.linear": lambda: F.linear(a, w)}
    if M == 1:  # a vector: another kernel, the GEMV
        peers["torch.mv"] = lambda: torch.mv(w, a[0])[None]
    elif M in TUNED:
        peers["torch.compile"] = lambda: _compiled()(a, w)
    return Work(lambda: torch.mm(a, w.T), error, peers)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compiled at the first call, and let choose among Triton's GEMMs."""
    return torch.compile(F.linear, dynamic=False, mode="max-autotune-no-cudagraphs")


def _gelus(n: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    counted = count(gelu, torch.empty(n, dtype=dtype, device="meta"))
    sizes = {"elements": n, "dtype": NAMES[dtype]}
    memory = 6 * n * dtype.itemsize + 8 * 8 * min(n, PIECE)

    def make(fused: bool) -> Work:
        x = _random(n, dtype=dtype, device=device)

        def error(out: Tensor) -> tuple[float, float]:
            need_same_shape(out, x)
            pairs = ((out[part], F.gelu(wide(x[part]))) for part in blocks(n, 1))
            return worst_error(pairs), 4 * torch.finfo(dtype).eps

        if not fused:
            return Work(lambda: gelu(x), error)
        return Work(lambda: F.gelu(x), error, {"torch.compile of the chain": lambda: _compiled_gelu()(x)})

    for name, fused, cost in (
        ("GELU, an operation at a time", False, counted.unfused()), ("GELU, fused", True, counted.fused()),
    ):
        yield Case(name, sizes, functools.partial(make, fused), cost.flop, cost.bytes, memory)


@functools.cache
def _compiled_gelu() -> Callable[..., Any]:
    return torch.compile(gelu, dynamic=False)
