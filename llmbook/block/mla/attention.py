"""Multi-head latent attention as a module, under Hugging Face's names: two forms of one function, one cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from llmbook.block.attention_and_kv_cache.attention import new_tokens, softmax_over, visible, without_padding
from llmbook.block.norms.rms import RMSNorm
from llmbook.block.rope.rotation import frequencies, rotate_interleaved, tables
from llmbook.block.rope.scaling import yarn

from .cache import LatentCache
from .cost import absorbed_is_cheaper
from .sizes import Sizes


@dataclass(frozen=True)
class Yarn:
    """A longer context by YaRN as DeepSeek configures it (`rope_parameters`).

    factor: s; trained: L; slow, fast: `beta_slow`, `beta_fast`. mscale
    multiplies the tables, mscale_all_dim the softmax scale, squared.
    """

    factor: float
    trained: int
    slow: float = 1.0
    fast: float = 32.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def strength(self, m: float) -> float:
        """0.1·m·ln s + 1."""
        return 0.1 * m * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    @property
    def of_tables(self) -> float:
        """What cos and sin are multiplied by: 1 where both mscales agree."""
        return self.strength(self.mscale) / self.strength(self.mscale_all_dim)


def seen_rows(rows: Tensor, seen: Tensor) -> Tensor:
    """Rows [B, T, d], zeros where no query sees them: 0 · NaN would be NaN."""
    return rows.masked_fill(~seen.any(1)[..., None], 0)


def softmax_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax of [B, n_h, S, T] over the keys that `seen`, [B, S, T], allows."""
    return softmax_over(scores, seen[:, None])


def attend_rebuilt(
    q: Tensor, q_r: Tensor, rows: Tensor, up: Tensor, scale: float, seen: Tensor
) -> Tensor:
    """Every head's keys and values are made from the latent, then MHA.

    q, q_r: [B, n_h, S, nope] and [B, n_h, S, d_r]; rows: [B, T, d_c + d_r];
    up: W_UK over W_UV, [n_h, nope + v, d_c]; seen: [B, S, T].
    Returns [B, n_h, S, v].
    """
    n_h, wide, d_c = up.shape
    rows = seen_rows(rows, seen)
    c, k_r = rows[..., :d_c], rows[..., d_c:]
    kv = (c @ up.flatten(0, 1).T).unflatten(-1, (n_h, wide)).transpose(1, 2)
    k, v = kv.split((q.shape[-1], wide - q.shape[-1]), -1)
    p = softmax_weights((q @ k.mT + turned(q_r, k_r)) * scale, seen)
    return p @ v


def attend_absorbed(
    q: Tensor, q_r: Tensor, rows: Tensor, up: Tensor, scale: float, seen: Tensor
) -> Tensor:
    """The query goes down to the latent, the result comes up: in between, all
    heads share one key, a whole row, and one value, its first d_c elements.

    Shapes as in `attend_rebuilt`, whose result this is.
    """
    d_c, nope = up.shape[2], q.shape[-1]
    rows = seen_rows(rows, seen)
    c, k_r = rows[..., :d_c], rows[..., d_c:]
    down = torch.einsum("bhsn,hnc->bhsc", q, up[:, :nope])
    p = softmax_weights((turned(down, c) + turned(q_r, k_r)) * scale, seen)
    o = (p.flatten(1, 2) @ c).view(down.shape)
    return torch.einsum("bhsc,hvc->bhsv", o, up[:, nope:])


def turned(q: Tensor, k: Tensor) -> Tensor:
    """q · k for heads that share one key: [B, n_h, S, d], [B, T, d] → [B, n_h, S, T].

    All heads' queries are rows of one matrix, so that k is read once.
    """
    return (q.flatten(1, 2) @ k.mT).view(*q.shape[:3], k.shape[1])


class LatentAttention(nn.Module):
    """MLA. Checkpoints of Hugging Face's DeepseekV3Attention load into it.

    Args:
        sizes: the widths.
        base: RoPE's base.
        long: YaRN's settings, if the context was extended.
        layer: which layer of the cache is its own.
    """

    theta: Tensor

    def __init__(
        self, sizes: Sizes, base: float = 1e4, long: Yarn | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        s, self.sizes, self.long, self.layer = sizes, sizes, long, layer
        self.base = base
        wide = s.heads * s.qk
        if s.q_rank is None:
            self.q_proj = nn.Linear(s.dim, wide, bias=False)
        else:
            self.q_a_proj = nn.Linear(s.dim, s.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(s.q_rank)
            self.q_b_proj = nn.Linear(s.q_rank, wide, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.dim, s.row, bias=False)
        self.kv_a_layernorm = RMSNorm(s.latent)
        self.kv_b_proj = nn.Linear(s.latent, s.heads * (s.nope + s.v), bias=False)
        self.o_proj = nn.Linear(s.heads * s.v, s.dim, bias=False)
        self.scale = s.qk**-0.5
        if long is not None:
            self.scale *= long.strength(long.mscale_all_dim) ** 2
        self.register_buffer("theta", self.angles(), persistent=False)

    def angles(self) -> Tensor:
        """RoPE's θ, [d_r / 2], float64, stretched by YaRN if asked for."""
        width, long = self.sizes.rope, self.long
        if long is None:
            return frequencies(width, self.base)
        return yarn(width, self.base, long.factor, long.trained, long.slow, long.fast)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; θ stays float64: bf16 would lose the far positions."""
        super()._apply(fn, recurse)
        self.theta = self.angles().to(self.o_proj.weight.device)
        return self

    def forward(
        self, x: Tensor, cache: LatentCache | None = None,
        counts: Tensor | None = None, absorb: bool | None = None,
    ) -> Tensor:
        """Attend from new tokens to themselves and to what the cache holds.

        x: [B, S, D], any S, 0 too. counts: [B], how many tokens of each row
        are real; all, if not given. absorb: which form computes it; the one
        with fewer FLOPs, if not given. Returns [B, S, D], zeros for padding,
        whatever it holds.
        """
        B, S, _ = need_stream(x, self.sizes.dim)
        counts = new_tokens(counts, B, S, x.device)
        x = without_padding(x, counts)
        starts = torch.zeros_like(counts)
        if cache is not None:
            starts = cache.lengths[self.layer].clone()
        q, q_r, rows = self.project(x, starts)
        if cache is not None:
            rows = cache.append(rows, counts, self.layer)
        seen = visible(starts, counts, S, rows.shape[1])
        up = self.kv_b_proj.weight.view(self.sizes.heads, -1, self.sizes.latent)
        if absorb is None:
            absorb = absorbed_is_cheaper(self.sizes, S, rows.shape[1])
        attend = attend_absorbed if absorb else attend_rebuilt
        o = attend(q, q_r, rows, up, self.scale, seen)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, n_h, S, nope] and [B, n_h, S, d_r], new rows [B, S, d_c + d_r]."""
        s = self.sizes
        low = x if s.q_rank is None else self.q_a_layernorm(self.q_a_proj(x))
        q = (self.q_proj if s.q_rank is None else self.q_b_proj)(low)
        q, q_r = q.unflatten(-1, (s.heads, s.qk)).split((s.nope, s.rope), -1)
        c, k_r = self.kv_a_proj_with_mqa(x).split((s.latent, s.rope), -1)
        at = starts[:, None] + torch.arange(x.shape[1], device=x.device)
        factor = 1.0 if self.long is None else self.long.of_tables
        turn = tables(at, self.theta, x.dtype, factor)
        q_r = rotate_interleaved(q_r, *turn)
        k_r = rotate_interleaved(k_r[:, :, None], *turn)[:, :, 0]
        rows = torch.cat((self.kv_a_layernorm(c), k_r), -1)
        return q.transpose(1, 2), q_r.transpose(1, 2), rows


def need_stream(x: Tensor, dim: int) -> torch.Size:
    """Refuse what is no stream of the module's width."""
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be [B, S, {dim}], not {list(x.shape)}")
    return x.shape
