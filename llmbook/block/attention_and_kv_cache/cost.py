"""FLOPs and bytes of attention with a cache and without, as closed forms."""

from .heads import Heads


def forward_flop(h: Heads, new: int, keys: int) -> int:
    """One layer's attention from `new` tokens to `keys` keys, one sequence.

    The four projections, then QKᵀ and PV over the whole rectangle: a mask
    saves nothing in plain products.
    """
    projections = 2 * new * h.dim * 2 * (h.heads + h.kv_heads) * h.head_dim
    return projections + 4 * h.heads * new * keys * h.head_dim


def generate_flop(h: Heads, prompt: int, new: int, cached: bool) -> int:
    """All forward passes that produce `new` tokens after `prompt`.

    The first comes from the prompt, so there are `new` passes, and the last
    token produced is never fed back.
    """
    ends = range(prompt, prompt + new)
    if not cached:
        return sum(forward_flop(h, end, end) for end in ends)
    return forward_flop(h, prompt, prompt) + sum(
        forward_flop(h, 1, end) for end in ends[1:]
    )


def decode_bytes(h: Heads, tokens: int, element: int = 2) -> int:
    """Bytes of K and V that one layer reads to decode one token.

    tokens: in the cache, the new one included.
    """
    return 2 * tokens * h.kv_heads * h.head_dim * element
