"""What the attention_and_kv_cache chapter times: split-KV decode, in rows and in pages, and a layer with its cache."""

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.kernels import DEVICE, capability
from llmbook.kit.measure import Case, relative_error

from .attention import Attention
from .cache import StaticCache
from .cost import decode_bytes, forward_flop
from .decode import flash_decode
from .heads import Heads

# (batch, n_h, n_kv, tokens, d): Llama-3-70B's heads, all on one GPU: GQA 8:1.
SHAPES = tuple((batch, 64, 8, tokens, 128) for batch in (1, 16) for tokens in (4096, 16_384, 65_536, 131_072))
LAYER = (4096, 32, 8, 8192)  # Llama-3-8B's attention: D, n_h, n_kv; and tokens in the cache
PAGE = 16


def cases(
    device: torch.device = DEVICE, shapes: Iterable[tuple[int, int, int, int, int]] = SHAPES,
    layer: tuple[int, int, int, int] = LAYER, dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Decode over rows and over pages per shape, then one layer's decode step; bf16 where the GPU has it."""
    dtype = dtype or (torch.bfloat16 if capability() >= 80 else torch.float16)
    for batch, heads, kv_heads, tokens, d in shapes:
        torch.manual_seed(tokens + batch)
        q = torch.randn(batch, heads, d, device=device, dtype=dtype)
        k, v = torch.randn(2, batch, kv_heads, tokens, d, device=device, dtype=dtype)
        lengths = torch.full((batch,), tokens, device=device, dtype=torch.int32)
        yield _decode("split-KV decode", q, k, v, partial(flash_decode, q, k, v, lengths))
        pools, table = _paged(k, v)
        yield _decode(
            "split-KV decode, paged", q, k, v,
            partial(flash_decode, q, *pools, lengths, table=table),
        )
    yield _layer(layer, dtype, device)


def _paged(k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The same keys and values in pages that lie in random order."""
    batch, heads, tokens, d = k.shape
    each = -(-tokens // PAGE)
    where = torch.randperm(batch * each, device=k.device)

    def pool(rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, 0, 0, each * PAGE - tokens)).view(batch, heads, each, PAGE, d)
        pages = torch.empty(batch * each, heads, PAGE, d, device=k.device, dtype=k.dtype)
        pages[where] = padded.transpose(1, 2).flatten(0, 1)
        return pages

    return (pool(k), pool(v)), where.view(batch, each).int()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _decode(name: str, q: Tensor, k: Tensor, v: Tensor, run: Callable[[], Any]) -> Case:
    batch, heads, d = q.shape
    kv_heads, tokens = k.shape[1:3]
    one = q[:, :, None]

    def error(result: tuple[Tensor, Tensor]) -> tuple[float, float]:
        worst = 0.0
        for b in {0, batch - 1}:  # float64 of all would not fit
            right = F.scaled_dot_product_attention(
                one[b : b + 1].double(), k[b : b + 1].double(), v[b : b + 1].double(), enable_gqa=True
            )
            off = relative_error(result[0][b], right[0, :, 0])
            worst = off if off != off else max(worst, off)  # NaN stays NaN
        return worst, 2 * torch.finfo(q.dtype).eps

    return Case(
        name, {"batch": batch, "n_h": heads, "n_kv": kv_heads, "tokens": tokens, "d": d, "dtype": str(q.dtype)[6:]},
        run, error, 4 * batch * heads * tokens * d, k.nbytes + v.nbytes + 2 * q.nbytes,
        {
            "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(one, k, v, enable_gqa=True),
            "FlexAttention": lambda: _compiled_flex()(one, k, v, enable_gqa=True),
            "copy of as many bytes": k.clone,  # reads K, writes as much: the bytes of K and V
        },
    )


def _layer(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """One token through one layer: what it sees comes from a cache, or is computed again."""
    dim, n_h, n_kv, tokens = sizes
    heads = Heads(dim, n_h, n_kv)
    torch.manual_seed(0)
    layer = Attention(heads).to(device, dtype).requires_grad_(False)
    x = torch.randn(1, tokens, dim, device=device, dtype=dtype)
    cache = StaticCache(1, n_kv, tokens, heads.head_dim, dtype=dtype, device=device)
    layer(x[:, :-1], cache)

    def step() -> Tensor:
        cache.lengths.fill_(tokens - 1)  # the same token again
        return layer(x[:, -1:], cache)

    def error(result: Tensor) -> tuple[float, float]:
        exact = Attention(heads).to(device, torch.float32)
        exact.load_state_dict(layer.state_dict())
        return relative_error(result[0, 0], exact(x.float())[0, -1]), 4 * torch.finfo(dtype).eps

    weights = sum(p.nbytes for p in layer.parameters())
    return Case(
        "a layer's decode step", {"D": dim, "n_h": n_h, "n_kv": n_kv, "tokens": tokens, "dtype": str(dtype)[6:]},
        step, error, forward_flop(heads, 1, tokens), weights + decode_bytes(heads, tokens, dtype.itemsize),
        {"without a cache": lambda: layer(x)[:, -1:]},
    )
