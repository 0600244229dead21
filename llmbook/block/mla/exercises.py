"""Checkers for the mla chapter's exercises."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmbook.foundations.tokens_to_logits.tracer import Tracer
from llmbook.kit.exercise import exercise, expect

from .cost import cheaper_below
from .sizes import V2_LITE, V3


@exercise
def bytes_of_a_token(answer: int) -> str:
    """Cache bytes per token of DeepSeek-V2-Lite in bf16: 27 layers, 16 heads, d_c = 512, d_r = 64."""
    s = V2_LITE
    right = 2 * s.elements_per_token()
    told = {
        2 * right: "keys and values share the latent: it is kept once, not twice.",
        right // 2: "a bf16 number has 2 bytes.",
        2 * s.layers * s.latent: "the rotary key is kept too.",
        2 * s.layers * (s.latent + s.heads * s.rope): "one rotary key serves all heads.",
        s.heads * right: "nothing is kept per head: every head reads the same row.",
        right // s.layers: "that is one layer; there are 27.",
    }
    expect(answer not in told, told.get(answer, ""))
    expect(answer == right, f"{answer} is not L · (d_c + d_r) · 2 bytes.")
    return f"{right:,} bytes, and the number of heads did not matter."


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@exercise
def attend_without_rebuilding(answer: Attend) -> str:
    """answer(q [n_h, d], c [T, d_c], up_k [n_h, d, d_c], up_v [n_h, v, d_c]) → [n_h, v], no key or value rebuilt."""
    g = torch.Generator().manual_seed(0)
    n_h, d, d_c, v, T = 3, 8, 12, 10, 40
    q, c, up_k, up_v = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((n_h, d), (T, d_c), (n_h, d, d_c), (n_h, v, d_c))
    )
    p = ((q[:, None] @ (c @ up_k.mT).mT)[:, 0] * d**-0.5).softmax(-1)
    right = (p[:, None] @ (c @ up_v.mT))[:, 0]
    with Tracer(nn.Identity()) as log:
        mine = answer(q, c, up_k, up_v)
    expect(isinstance(mine, Tensor), f"return a tensor, not {type(mine).__name__}.")
    expect(mine.shape == right.shape, f"of shape {list(mine.shape)}; one output per head is {list(right.shape)}.")
    narrow = ((q[:, None] @ (c @ up_k.mT).mT)[:, 0] * d_c**-0.5).softmax(-1)
    scaled = (narrow[:, None] @ (c @ up_v.mT))[:, 0]
    expect(not torch.allclose(mine, scaled), "the scores are still divided by √d, the width of the query before it "
           "went down: absorbing may not change them.")
    expect(torch.allclose(mine, right), f"off by {float((mine - right).abs().max()):.3g} from the rebuilt form.")
    rebuilding = 2 * n_h * T * d_c * d
    most = 2 * n_h * (d_c * (d + v) + 2 * T * d_c)
    expect(log.flop <= most, f"right, but {log.flop:,} FLOP where {most:,} do: rebuilding one of K and V for all {T} "
           f"tokens alone takes {rebuilding:,} or more.")
    return f"{log.flop:,} FLOP; the rows of c went in as they lay in the cache, as key and as value."


@exercise
def crossover(answer: int) -> str:
    """DeepSeek-V3 with 1,000 tokens in view: the fewest queries for which rebuilding has no more FLOPs."""
    right = int(-(-cheaper_below(V3, 1000) // 1))
    through, wider = V3.latent * (V3.nope + V3.v), 2 * V3.latent - V3.nope - V3.v
    expect(answer == int(answer), f"{answer} is not a whole number of queries.")
    told = {
        -(-through // wider): "that is the limit for endless contexts; with 1,000 tokens the absorbed form also pays "
        "for its own S passes through W_UK and W_UV.",
        right - 1: "at that many, absorbed still has fewer.",
        -(-1000 * through // (through + 1000 * (wider + V3.rope))): "both forms score RoPE's 64 columns: they cancel.",
    }
    expect(answer not in told, told.get(answer, ""))
    told_how = f"with S = {answer}: compare T·A with S·A + S·T·B, where A = d_c(nope + v), B = 2d_c − nope − v."
    expect(answer == right, told_how)
    return f"from {right} queries on, a pass should rebuild: decode and speculation absorb, prefill does not."
