"""A Llama's sizes, under short names here and under Hugging Face's in config.json.

Published sizes: Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783) and their config.json.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmbook.block.attention_and_kv_cache.heads import Heads
from llmbook.block.rope.rotation import frequencies
from llmbook.block.rope.scaling import by_parts


@dataclass(frozen=True)
class Longer:
    """How Llama 3.1 stretches RoPE: pairs that turned less than `fast` times in training are slowed down.

    factor: s. trained: L. slow, fast: turns between which the slowing is blended.
    """

    factor: float = 8.0
    trained: int = 8192
    slow: float = 1.0
    fast: float = 4.0


@dataclass(frozen=True)
class Config:
    """Sizes of a model.

    Args:
        vocab: V. dim: D. layers: L. heads, kv_heads: n_h, n_kv.
        ffn: D_ff, the width inside SwiGLU.
        theta: RoPE's base. eps: RMSNorm's. context: positions it may use.
        tied: the LM head is the embedding.
        head_dim: d_h; 0 stands for dim / heads.
        longer: how the context was stretched, if it was.

    Raises:
        ValueError: counts below 1, or heads that do not divide.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    theta: float = 10_000.0
    eps: float = 1e-5
    context: int = 4096
    tied: bool = False
    head_dim: int = 0
    longer: Longer | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "ffn", "context"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )
        object.__setattr__(self, "head_dim", self.attention.head_dim)

    @property
    def attention(self) -> Heads:
        """The sizes that the attention chapter's module takes."""
        return Heads(self.dim, self.heads, self.kv_heads, self.head_dim)

    def angles(self, head_dim: int, base: float) -> Tensor:
        """RoPE's θ, [head_dim / 2], float64."""
        theta, x = frequencies(head_dim, base), self.longer
        return theta if x is None else by_parts(theta, x.factor, x.trained, x.slow, x.fast)


def swiglu_width(dim: int, multiple: int = 256, factor: float = 1.0) -> int:
    """D_ff of Meta's Llamas: ⅔ of 4·D, times `factor`, rounded up.

    Two thirds, because SwiGLU has three matrices where an MLP has two: the
    parameters stay those of an MLP of width 4·D (Shazeer 2020).
    """
    width = int(factor * int(2 * 4 * dim / 3))
    return -(-width // multiple) * multiple


PUBLISHED = {
    "Llama-2-7B": Config(32_000, 4096, 32, 32, 32, 11_008),
    "Llama-2-70B": Config(32_000, 8192, 80, 64, 8, 28_672),
    "Llama-3-8B": Config(128_256, 4096, 32, 32, 8, 14_336, 5e5, context=8192),
    "Llama-3-70B": Config(128_256, 8192, 80, 64, 8, 28_672, 5e5, context=8192),
    "Llama-3.1-405B": Config(
        128_256, 16_384, 126, 128, 8, 53_248, 5e5, context=131_072, longer=Longer()
    ),
}

# What Hugging Face calls our fields.
FIELDS = {
    "vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size", "eps": "rms_norm_eps",
    "context": "max_position_embeddings", "tied": "tie_word_embeddings",
    "head_dim": "head_dim",
}

LONGER = {
    "factor": "factor", "trained": "original_max_position_embeddings", "slow": "low_freq_factor",
    "fast": "high_freq_factor",
}


def to_hugging_face(c: Config) -> dict[str, Any]:
    """The content of config.json: what `LlamaConfig` reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.theta}
    if c.longer is not None:
        rope["rope_type"] = "llama3"
        rope |= {theirs: getattr(c.longer, ours) for ours, theirs in LONGER.items()}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        **{theirs: getattr(c, ours) for ours, theirs in FIELDS.items()},
        "hidden_act": "silu", "rope_parameters": rope, "rope_theta": c.theta,
        "attention_bias": False, "mlp_bias": False,
        # Byte 0 is in no text: it stands before each, and nothing ends one.
        "bos_token_id": 0, "eos_token_id": None,
    }


def from_hugging_face(fields: dict[str, Any]) -> Config:
    """The sizes in a config.json, old (rope_theta) or new (rope_parameters).

    Raises:
        ValueError: a field is missing, or asks for what this model lacks.
    """
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    wanted = {
        "model_type": (fields.get("model_type"), "llama"),
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "attention_bias": (fields.get("attention_bias", False), False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "llama3":
        wanted["rope_type"] = (kind, "default")
    for name, (found, right) in wanted.items():
        if found != right:
            raise ValueError(
                f"config.json says {name} = {found!r}, but this Llama knows {right!r} only"
            )
    optional = {"head_dim": 0, "tied": False, "kv_heads": fields.get("num_attention_heads")}
    sizes: dict[str, Any] = {}
    for ours, theirs in FIELDS.items():
        sizes[ours] = fields.get(theirs)
        if sizes[ours] is None:  # old files leave these out
            sizes[ours] = optional.get(ours)
        if sizes[ours] is None:
            raise ValueError(f"config.json lacks {theirs}")
    base = rope.get("rope_theta", fields.get("rope_theta", 1e4))
    if kind != "llama3":
        return Config(**sizes, theta=base)
    if missing := sorted(set(LONGER.values()) - set(rope)):
        raise ValueError(f"config.json says rope_type = 'llama3', but its RoPE lacks {missing[0]}")
    return Config(**sizes, theta=base, longer=Longer(**{ours: rope[theirs] for ours, theirs in LONGER.items()}))
