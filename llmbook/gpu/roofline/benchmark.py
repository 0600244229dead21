"""What the roofline chapter times: the roofs themselves, GEMMs from decode batch 1 to 4096, and what fusion buys."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from .chains import gelu
from .counting import count
from .gemm import Gemm
from .roofs import NAMES

Tensor = torch.Tensor
BATCHES = tuple(2**i for i in range(13))  # 1 … 4096
WIDE = 8192  # rows and columns of the weight: 134 MB in half precision, more than any L2
COPIED = 2**30  # elements; 2 GiB in half precision
CHECKED = 64  # rows of a product that are compared with float64


def cases(
    device: torch.device = DEVICE, batches: Iterable[int] = BATCHES, wide: int = WIDE, copied: int = COPIED,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """The copy and the large products that draw the roofs, then points under them; bf16 where the GPU has it."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    yield _copy(copied, dtype, device)
    yield _gemm("GEMM, large", wide, wide, dtype, device)
    yield _gemm("GEMM, CUDA cores", wide // 2, wide // 2, torch.float32, device)
    for M in batches:
        yield _gemm("GEMM, decode", M, wide, dtype, device)
    yield from _gelus(copied // 8, dtype, device)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(shape[0])
    return torch.randn(*shape, dtype=dtype, device=device, generator=generator)


def _copy(n: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = _random(n, dtype=dtype, device=device)
    out = torch.empty_like(x)
    return Case(
        "copy", {"elements": n, "dtype": NAMES[dtype]}, lambda: out.copy_(x),
        lambda copy: (0.0 if torch.equal(copy, x) else 1.0, 0.0), 0, 2 * x.nbytes, {"clone": x.clone},
    )


def _gemm(name: str, M: int, wide: int, dtype: torch.dtype, device: torch.device) -> Case:
    """[M, wide] × [wide, wide]; the weight is stored [out, in], as a linear layer has it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise ValueError("fp32 products would be rounded to tf32: call torch.set_float32_matmul_precision('highest')")
    a, w = (_random(rows, wide, dtype=dtype, device=device) for rows in (M, wide))
    g = Gemm(M, wide, wide, NAMES[dtype])

    def error(out: Tensor) -> tuple[float, float]:
        rows = slice(max(0, M - CHECKED), M)  # the last rows: a tile over the edge shows there
        return relative_error(out[rows], a[rows].double() @ w.double().T), 4 * torch.finfo(dtype).eps

    peers: dict[str, Callable[[], Any]] = {"F.linear": lambda: F.linear(a, w)}
    if M > 1:
        peers["torch.compile"] = lambda: _compiled()(a, w)
    else:  # a vector: another kernel, the GEMV
        peers["torch.mv"] = lambda: torch.mv(w, a[0])
    sizes = {"M": M, "N": wide, "K": wide, "dtype": g.dtype}
    return Case(name, sizes, lambda: torch.mm(a, w.T), error, g.flop, g.bytes, peers)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compiled at the first call, and let choose among Triton's GEMMs."""
    return torch.compile(F.linear, dynamic=False, mode="max-autotune-no-cudagraphs")


def _gelus(n: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    x = _random(n, dtype=dtype, device=device)
    bare = torch.empty(n, dtype=dtype, device="meta")
    sizes = {"elements": n, "dtype": NAMES[dtype]}

    def error(out: Tensor) -> tuple[float, float]:
        ends = torch.cat([x[:CHECKED], x[-CHECKED:]]).double()
        return relative_error(torch.cat([out[:CHECKED], out[-CHECKED:]]), F.gelu(ends)), 4 * torch.finfo(dtype).eps

    counted = count(gelu, bare)
    apart, one = counted.unfused(), counted.fused()
    yield Case("GELU, an operation at a time", sizes, lambda: gelu(x), error, apart.flop, apart.bytes)
    yield Case(
        "GELU, fused", sizes, lambda: F.gelu(x), error, one.flop, one.bytes,
        {"torch.compile of the chain": lambda: _compiled_gelu()(x)},
    )


@functools.cache
def _compiled_gelu() -> Callable[..., Any]:
    return torch.compile(gelu, dynamic=False)
