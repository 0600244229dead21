"""What the attention_and_kv_cache chapter times: split-KV decode, in rows and in pages, and a layer with its cache."""

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llmbook.kit.compare import half, need_same_shape, reference_dtype, wide, worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .attention import Attention
from .cache import StaticCache
from .cost import decode_bytes, forward_flop
from .decode import flash_decode
from .heads import Heads

Shape = tuple[int, int, int, int, int]

# (batch, n_h, n_kv, tokens, d): Llama-3-70B's heads, all on one GPU: GQA 8:1.
SHAPES = tuple((batch, 64, 8, tokens, 128) for batch in (1, 16) for tokens in (4096, 16_384, 65_536, 131_072))
LAYER = (4096, 32, 8, 4096)  # Llama-3-8B's attention: D, n_h, n_kv; and tokens in the cache
SMALL: dict[str, Any] = {"shapes": ((1, 8, 1, 96, 64), (2, 8, 2, 70, 64)), "layer": (32, 4, 2, 9)}
FLEX = (16, 16_384)  # the batch and tokens that FlexAttention is compiled for
PAGE = 16
CHUNK = 256  # tokens of a prefill at a time: the scores of all would not fit


def cases(
    device: torch.device = DEVICE, shapes: Iterable[Shape] = SHAPES, layer: tuple[int, int, int, int] = LAYER,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Decode over rows and over pages per shape, then one layer's decode step; bf16 where the GPU has it."""
    dtype = dtype or half(device)
    for shape in shapes:
        batch, heads, kv_heads, tokens, d = shape
        sizes = {"batch": batch, "n_h": heads, "n_kv": kv_heads, "tokens": tokens, "d": d, "dtype": str(dtype)[6:]}
        work, held = 4 * batch * heads * tokens * d, 2 * batch * (kv_heads * tokens + heads) * d * dtype.itemsize
        # Beside K and V: the parts' results, and one head's K, V and scores in float64.
        memory = held + 2**28 + 8 * (4 * d + 6 * heads // kv_heads) * (tokens + PAGE)
        for name, make in (("split-KV decode", _rows), ("split-KV decode, paged", _pages)):
            yield Case(name, sizes, partial(make, shape, dtype, device), work, held, memory)
    dim, n_h, n_kv, tokens = layer
    heads_ = Heads(dim, n_h, n_kv)
    weights = 2 * dim * (n_h + n_kv) * heads_.head_dim * dtype.itemsize
    yield Case(
        "a layer's decode step", {"D": dim, "n_h": n_h, "n_kv": n_kv, "tokens": tokens, "dtype": str(dtype)[6:]},
        partial(_layer, layer, dtype, device), forward_flop(heads_, 1, tokens),
        weights + decode_bytes(heads_, tokens, dtype.itemsize),
        5 * weights + 2 * tokens * dim * dtype.itemsize + 8 * 7 * min(CHUNK, tokens) * (n_h * tokens + 4 * dim)
        + 3 * 8 * 2 * tokens * n_kv * heads_.head_dim,
    )


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Keys and values in rows: [B, n_kv, T, d]."""
    batch, heads, kv_heads, tokens, d = shape
    torch.manual_seed(tokens + batch)
    q = torch.randn(batch, heads, d, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, tokens, d, device=device, dtype=dtype)
    lengths = torch.full((batch,), tokens, device=device, dtype=torch.int32)
    one = q[:, :, None]
    peers: dict[str, Callable[[], Any]] = {
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(one, k, v, enable_gqa=True)[:, :, 0],
    }
    if (batch, tokens) == FLEX:
        peers["FlexAttention"] = lambda: _compiled_flex()(one, k, v, enable_gqa=True)[:, :, 0]
    return Work(
        lambda: flash_decode(q, k, v, lengths)[0], _error(q, kv_heads, lambda b, head: (k[b, head], v[b, head])), peers,
        {"copy of as many bytes": k.clone},  # reads K, writes as much: the bytes of K and V
    )


def _pages(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Keys and values in pages that lie in random order: pools [pages, n_kv, page, d]."""
    batch, heads, kv_heads, tokens, d = shape
    torch.manual_seed(tokens + batch)
    each = -(-tokens // PAGE)
    q = torch.randn(batch, heads, d, device=device, dtype=dtype)
    k, v = torch.randn(2, batch * each, kv_heads, PAGE, d, device=device, dtype=dtype)
    table = torch.randperm(batch * each, device=device).view(batch, each)
    lengths, places = torch.full((batch,), tokens, device=device, dtype=torch.int32), table.int()

    def gathered(b: int, head: int) -> tuple[Tensor, ...]:
        return tuple(pool[table[b], head].flatten(0, 1)[:tokens] for pool in (k, v))

    return Work(
        lambda: flash_decode(q, k, v, lengths, table=places)[0], _error(q, kv_heads, gathered), {},
        {"copy of as many bytes": k.clone},
    )


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _error(
    q: Tensor, kv_heads: int, keys_values: Callable[[int, int], tuple[Tensor, ...]]
) -> Callable[[Tensor], tuple[float, float]]:
    """Against plain attention, one KV head of one sequence at a time: K is never repeated for the heads of a group."""
    group = q.shape[1] // kv_heads

    def exact(b: int, head: int) -> Tensor:
        k, v = map(wide, keys_values(b, head))
        rows = wide(q[b, head * group : (head + 1) * group])
        return (rows @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def error(out: Tensor) -> tuple[float, float]:
        need_same_shape(out, q)
        heads = out.unflatten(1, (kv_heads, group))
        pairs = ((heads[b, head], exact(b, head)) for b in range(len(q)) for head in range(kv_heads))
        return worst_error(pairs), 2 * torch.finfo(q.dtype).eps

    return error


def _layer(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """One token through one layer: what it sees comes from a cache, or is computed again."""
    dim, n_h, n_kv, tokens = sizes
    heads = Heads(dim, n_h, n_kv)
    torch.manual_seed(0)
    layer = Attention(heads).to(device, dtype).requires_grad_(False)
    x = torch.randn(1, tokens, dim, device=device, dtype=dtype)

    def prefilled(layer: Attention, x: Tensor) -> tuple[Tensor, StaticCache]:
        """The last token's output [1, 1, D], and the cache."""
        cache = StaticCache(1, n_kv, tokens, heads.head_dim, dtype=x.dtype, device=device)
        *_, last = (layer(part, cache) for part in x.split(CHUNK, 1))
        return last[:, -1:], cache

    _, cache = prefilled(layer, x)

    def step() -> Tensor:
        cache.lengths.fill_(tokens - 1)  # the same token again
        return layer(x[:, -1:], cache)

    @functools.cache
    def exact() -> Tensor:
        precise = Attention(heads).to(device, reference_dtype(device)).requires_grad_(False)
        precise.load_state_dict(layer.state_dict())
        return prefilled(precise, wide(x))[0]

    def error(result: Tensor) -> tuple[float, float]:
        return worst_error([(result, exact())]), 4 * torch.finfo(dtype).eps

    return Work(step, error, {"without a cache": lambda: layer(x)[:, -1:]})
