"""A Llama-style language model with Hugging Face's names, so that its weights load and its log can be compared.

Architecture: Touvron et al. 2023 (arXiv 2302.13971); grouped heads: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Sizes of a model; each is a count.

    Raises:
        ValueError: sizes that do not divide as heads need.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    theta: float = 10_000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"{self.heads} heads share a width of {self.dim}: each needs the "
                "same even number of elements, so choose a multiple of "
                f"{2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key and "
                "value heads evenly: the second must divide the first"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


# From the models' published configurations (config.json and model cards).
PUBLISHED = {
    "Llama-2-7B": Config(32_000, 4_096, 32, 32, 32, 11_008),
    "Llama-3-8B": Config(128_256, 4_096, 32, 32, 8, 14_336, 500_000.0),
    "Llama-3-70B": Config(128_256, 8_192, 80, 64, 8, 28_672, 500_000.0),
    "Llama-3.1-405B": Config(128_256, 16_384, 126, 128, 8, 53_248, 500_000.0),
}


def every_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with each step's tensor in memory.

    q: [B, H, S, d_h]; k, v: [B, H_kv, S, d_h]. Returns [B, H, S, d_h].
    """
    S, shared = q.shape[2], q.shape[1] // k.shape[1]
    if shared > 1:  # each key and value head serves that many query heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    return p @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in one operation, which stores no scores."""
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mark each position by turning pairs of elements: the RoPE chapter's subject.

    x: [B, H, S, d_h]; cos, sin: [S, d_h].
    """
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Rotary(nn.Module):
    """cos and sin of each position's angles, [S, d_h] each."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        pair = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        self.inv_freq = nn.Buffer(1.0 / c.theta**pair, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        angle = torch.outer(at, self.inv_freq.float()).repeat(1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class Attention(nn.Module):
    """x: [B, S, D] → [B, S, D]."""

    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.head_dim, self.attend = c.head_dim, attend
        wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, wide, bias=False)
        self.k_proj = nn.Linear(c.dim, narrow, bias=False)
        self.v_proj = nn.Linear(c.dim, narrow, bias=False)
        self.o_proj = nn.Linear(wide, c.dim, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, H·d_h] → [B, H, S, d_h], a view."""
        heads = x.shape[2] // self.head_dim
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self.split(self.q_proj(x)), cos, sin)
        k = rotate(self.split(self.k_proj(x)), cos, sin)
        v = self.split(self.v_proj(x))
        o = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.o_proj(o)


class FeedForward(nn.Module):
    """x: [B, S, D] → [B, S, D], through a gated layer of width D_ff."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the stream x: [B, S, D]."""

    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c, attend), FeedForward(c)
        self.input_layernorm = nn.RMSNorm(c.dim, c.eps)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """ids: [B, S], int64 → [B, S, D].

    Raises:
        ValueError: ids that are no [B, S] whole numbers in [0, V).
    """

    def __init__(self, c: Config, attend: Attend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c, attend) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.eps)
        self.rotary_emb = Rotary(c)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.rotary_emb(x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def embed(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "input ids must be whole numbers (int64) of shape [B, S], but "
                f"these are {ids.dtype} of shape {list(ids.shape)}"
            )
        try:
            return self.embed_tokens(ids)
        except IndexError as error:  # looked at only now: a check costs a pass
            rows = self.embed_tokens.num_embeddings
            bad = ids[(ids < 0) | (ids >= rows)][0].item()
            raise ValueError(
                f"token id {bad} is not in [0, {rows}), the rows of the embedding"
            ) from error


class Llama(nn.Module):
    """The language model. ids: [B, S] → logits: [B, S, V].

    attend: `every_tensor` or `fused`, or anything with their signature.
    """

    def __init__(self, c: Config, attend: Attend = every_tensor) -> None:
        super().__init__()
        self.model = Decoder(c, attend)
        self.lm_head = nn.Linear(c.dim, c.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))
