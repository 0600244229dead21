"""Parameters, bytes and FLOPs of a Llama at every point that its tokens pass, and what the counts add up to."""

from typing import NamedTuple

from .config import Config

Shape = tuple[int, ...]


class Point(NamedTuple):
    """One stop on the way from ids to logits.

    module: its path inside a block, or in the model.
    out: shape of what leaves it. weights: its parameters. flop: forward.
    cached: elements of K and V that it reads, those of the new tokens too.
    in_block: whether it is there once per layer.
    """

    name: str
    module: str
    out: Shape
    weights: int
    flop: int
    cached: int = 0
    in_block: bool = True


def walk(c: Config, B: int, new: int, past: int = 0) -> list[Point]:
    """Every point once; the block's points stand for those of all L layers.

    B sequences of `new` tokens each, after `past` that a cache holds. No
    FLOPs are saved by the mask: all S·T scores count, as they are computed.
    """
    D, F, S, T = c.dim, c.ffn, new, past + new
    H, K, d = c.heads, c.kv_heads, c.head_dim
    x: Shape = (B, S, D)

    def linear(name: str, module: str, wide: int, out: int) -> Point:
        return Point(name, module, (B, S, out), wide * out, 2 * B * S * wide * out)

    products, read = 2 * B * H * S * T * d, B * K * T * d
    return [
        Point("embedding", "embed_tokens", x, c.vocab * D, 0, in_block=False),
        Point("RMSNorm", "input_layernorm", x, D, 0),
        linear("query", "self_attn.q_proj", D, H * d),
        linear("key", "self_attn.k_proj", D, K * d),
        linear("value", "self_attn.v_proj", D, K * d),
        Point("RoPE", "self_attn", (B, S, H + K, d), 0, 0),
        Point("scores", "self_attn", (B, H, S, T), 0, products, read),
        Point("softmax · V", "self_attn", (B, H, S, d), 0, products, read),
        linear("output", "self_attn.o_proj", H * d, D),
        Point("add", "", x, 0, 0),
        Point("RMSNorm 2", "post_attention_layernorm", x, D, 0),
        linear("gate", "mlp.gate_proj", D, F),
        linear("up", "mlp.up_proj", D, F),
        Point("SiLU · up", "mlp", (B, S, F), 0, 0),
        linear("down", "mlp.down_proj", F, D),
        Point("add 2", "", x, 0, 0),
        Point("last RMSNorm", "norm", x, D, 0, in_block=False),
        linear("LM head", "lm_head", D, c.vocab)._replace(
            weights=0 if c.tied else D * c.vocab, in_block=False
        ),
    ]


def times(c: Config, point: Point) -> int:
    """How often a point is passed: once per layer, or once."""
    return c.layers if point.in_block else 1


def parameters(c: Config) -> int:
    """N, all parameters; a tied head counts once."""
    return sum(times(c, p) * p.weights for p in walk(c, 1, 1))


def forward_flop(c: Config, B: int, new: int, past: int = 0) -> int:
    """FLOPs of B · `new` tokens after `past` each."""
    return sum(times(c, p) * p.flop for p in walk(c, B, new, past))


def training_flop(c: Config, B: int, S: int) -> int:
    """Forward and backward: each product has two more in the backward.

    6·N'·B·S and 12·B·S²·H·d_h·L for attention, where N' are the weights
    that multiply: without embedding and norms, with the head.
    """
    return 3 * forward_flop(c, B, S)


def kv_bytes(c: Config, tokens: int, width: int = 2) -> int:
    """Of a cache that holds so many tokens, `width` bytes a number."""
    return 2 * c.layers * c.kv_heads * c.head_dim * tokens * width
