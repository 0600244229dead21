"""What a mixture of experts costs: combinations, parameters in all and per token, FLOPs."""

from math import comb
from typing import NamedTuple

from .gate import V3, Rule


class Shape(NamedTuple):
    """Where DeepSeek-V3's parameters lie; its own configuration by default.

    layers, dense: in all, and the first ones without experts. dim, hidden: D and an
    expert's H. wide: a dense layer's inner width. vocab: rows of the embedding and
    of the head. The rest is its multi-head latent attention.
    """

    layers: int = 61
    dense: int = 3
    dim: int = 7168
    hidden: int = 2048
    wide: int = 18_432
    shared: int = 1
    rule: Rule = V3
    vocab: int = 129_280
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128


def expert_parameters(dim: int, hidden: int) -> int:
    """A SwiGLU expert: gate, up and down."""
    return 3 * dim * hidden


def moe_parameters(shape: Shape, experts: int) -> int:
    """One MoE layer with this many routed experts counted; the router always whole."""
    one = expert_parameters(shape.dim, shape.hidden)
    return (experts + shape.shared) * one + shape.rule.experts * shape.dim


def attention_parameters(s: Shape) -> int:
    """One layer's latent attention, with the norms of its two latents."""
    query = s.dim * s.q_rank + s.q_rank + s.q_rank * s.heads * (s.nope + s.rope)
    latent = s.dim * (s.kv_rank + s.rope) + s.kv_rank
    return query + latent + s.kv_rank * s.heads * (s.nope + s.value) + s.heads * s.value * s.dim


def model_parameters(s: Shape, experts: int) -> int:
    """The model, counting `experts` routed experts per layer: all of them, or k."""
    every = attention_parameters(s) + 2 * s.dim
    blocks = s.layers * every + s.dense * expert_parameters(s.dim, s.wide)
    blocks += (s.layers - s.dense) * moe_parameters(s, experts)
    return blocks + 2 * s.vocab * s.dim + s.dim


def moe_flop(tokens: int, dim: int, hidden: int, rule: Rule, shared: int) -> int:
    """Products of one layer's forward: k + shared experts per token, and the router."""
    experts = (rule.active + shared) * expert_parameters(dim, hidden)
    return 2 * tokens * (experts + rule.experts * dim)


def split(experts: int, active: int, parts: int) -> tuple[int, int, int]:
    """Each expert cut into `parts` of 1/parts the width, as many times more active.

    Returns experts, active, and how many sets of experts a token can get: the
    parameters used per token stay what they were.
    """
    return experts * parts, active * parts, comb(experts * parts, active * parts)
