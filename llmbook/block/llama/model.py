"""A Llama of the earlier chapters' parts: RMSNorm, RoPE, grouped attention and its cache; SwiGLU is written here.

Architecture: Touvron et al. 2023 (arXiv 2302.13971); SwiGLU: Shazeer 2020 (arXiv 2002.05202). Names are Hugging Face's.
"""


import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from llmbook.block.attention_and_kv_cache.attention import Attention
from llmbook.block.attention_and_kv_cache.cache import Cache, StaticCache
from llmbook.block.norms.rms import RMSNorm

from .config import Config


class SwiGLU(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), three matrices and no bias.

    x: [..., D], through [..., D_ff], to [..., D].
    """

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn, bias=False)
        self.up_proj = nn.Linear(dim, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. The stream x, [B, S, D], is added to twice, never replaced."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.eps)
        self.self_attn = Attention(c.attention, layer, c.theta, c.angles)
        self.post_attention_layernorm = RMSNorm(c.dim, c.eps)
        self.mlp = SwiGLU(c.dim, c.ffn)

    def forward(
        self, x: Tensor, cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, counts)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, last norm. ids: [B, S] → [B, S, D]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.dim, c.eps)

    def forward(
        self, ids: Tensor, cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cache, counts)
        return self.norm(x)


class Llama(nn.Module):
    """The language model. ids: [B, S] → logits: [B, S, V].

    Weights start as N(0, 0.02²), norms as ones.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.dim, c.vocab, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        if c.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids: Tensor, cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        ids: [B, S], int64. cache: continues it, and is filled. counts: [B],
        how many tokens of each row are real; logits of padding mean nothing.

        Raises:
            ValueError: ids that are no [B, S] of whole numbers in [0, V), or
                positions beyond the model's context.
        """
        refuse_ids(ids, self.config, cache)
        return self.lm_head(self.model(ids, cache, counts))

    def cache(self, batch: int = 1, room: int = 0) -> StaticCache:
        """An empty cache for `room` tokens of each sequence, or a full context."""
        c, weight = self.config, self.model.norm.weight
        return StaticCache(
            batch, c.kv_heads, room or c.context, c.head_dim, layers=c.layers,
            dtype=weight.dtype, device=weight.device,
        )


def refuse_ids(ids: Tensor, c: Config, cache: Cache | None) -> None:
    """Refuse what cannot be read, in one sentence; ids on "meta" have no values."""
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids must be whole numbers [B, S], not {ids.dtype} of shape {list(ids.shape)}"
        )
    if not ids.is_meta and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < c.vocab:
        bad = ids[(ids < 0) | (ids >= c.vocab)][0].item()
        raise ValueError(f"token {bad} is not in [0, {c.vocab}), the vocabulary")
    held = int(cache.lengths[0].max()) if cache is not None and cache.lengths.numel() else 0
    if held + ids.shape[1] > c.context:
        raise ValueError(
            f"{held} tokens in the cache and {ids.shape[1]} new ones need {held + ids.shape[1]} "
            f"positions, but the model has {c.context}: its context"
        )
