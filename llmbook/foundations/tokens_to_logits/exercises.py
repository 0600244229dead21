"""Checkers for the first chapter's exercises."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llmbook.kit.exercise import exercise, expect

from .flop import block_flop
from .llama import PUBLISHED, Block, Config, Llama, every_tensor
from .tracer import Tracer

Tensor = torch.Tensor
B, S, V = 4, 8192, 128_256


@exercise
def bytes_of_the_logits(answer: int) -> str:
    """Llama 3's logits for 4 sequences of 8,192 tokens in bfloat16, and their float32 copy for the loss."""
    half = B * S * V * 2
    expect(isinstance(answer, int), f"a number of bytes is a whole number, but you gave {answer!r}")
    expect(answer != half, "that is the bfloat16 tensor alone; its float32 copy comes on top")
    expect(answer != 2 * half, "that is the float32 copy alone; the bfloat16 original is alive too")
    expect(answer != 3 * half // 2, "every element takes bytes: multiply B·S·V by 2 and by 4, not by their half")
    expect(answer != S * V * 6, "that is one sequence; there are 4")
    expect(answer == 3 * half, f"{answer:,} is not B·S·V·(2 + 4) with B = {B}, S = {S:,}, V = {V:,}")
    with torch.device("meta"):
        weights = sum(p.numel() * 2 for p in Llama(PUBLISHED["Llama-3-8B"]).parameters())
    return f"{answer / 1e9:.1f} GB, {answer / weights:.1f} times the model's own weights ({weights / 1e9:.1f} GB)."


@exercise
def flop_of_a_block(answer: Callable[..., int]) -> str:
    """answer(B, S, D, heads, kv_heads, ffn) → the forward FLOPs that the tracer counts in one block."""
    for b, s, c in (
        (1, 1, Config(9, 8, 1, 2, 2, 12)), (2, 7, Config(9, 16, 1, 4, 4, 24)), (3, 5, Config(9, 24, 1, 6, 2, 40)),
    ):
        block, x = Block(c, every_tensor), torch.zeros(b, s, c.dim)
        with Tracer(block) as log:
            block(x, torch.zeros(s, c.head_dim), torch.zeros(s, c.head_dim))
        given, parts = answer(b, s, c.dim, c.heads, c.kv_heads, c.ffn), block_flop(c, b, s)
        told = f"B={b}, S={s}, D={c.dim}, heads={c.heads}, kv_heads={c.kv_heads}, ffn={c.ffn}"
        expect(given != log.flop / 2, f"for {told}: half of the count; a multiply-add is 2 FLOP")
        expect(given != log.flop - parts["scores, values"], f"for {told}: Q·Kᵀ and P·V are missing")
        wide = log.flop - parts["Q, K, V, O"] + 8 * b * s * c.dim**2
        expect(given == log.flop or given != wide, f"for {told}: K and V have only {c.kv_heads} heads of {c.head_dim}")
        expect(given == log.flop, f"for {told}: the tracer counts {log.flop:,}, but you gave {given:,}")
    return "equal to the count, with grouped heads too."


@exercise
def loss_with_shift(answer: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """answer(logits [B, S, V], ids [B, S], pad) → the next-token loss in which no padding is a target."""
    chosen = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, 11, generator=chosen, dtype=torch.float64)
    ids = torch.randint(1, 11, (3, 6), generator=chosen)
    ids[1, 3:] = ids[2, 5:] = 0
    given = answer(logits, ids, 0)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    expect(isinstance(given, Tensor) and given.dim() == 0, "a loss is one number: a tensor of shape []")

    def same(other: Tensor) -> bool:
        return bool((given - other).abs() < 1e-9)

    rows = [F.cross_entropy(x[:-1], y[1:], ignore_index=0) for x, y in zip(logits, ids, strict=True)]
    expect(not same(F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0)),
           "position t is compared with token t, which it has already read; its target is token t + 1")
    expect(not same(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())), "padding counts as a target")
    expect(not same(torch.stack(rows).mean()), "each sequence has the same weight; each token should")
    expect(not same(F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten(), ignore_index=0)),
           "shifted the wrong way: position t + 1 predicts token t")
    expect(same(wanted), f"the loss is {wanted:.6f}, but you gave {given:.6f}")
    return "shifted by one, and only real tokens are targets."


@exercise
def loss_in_pieces(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> str:
    """answer(h [N, D], W [V, D], targets [N], piece) → mean cross-entropy of h Wᵀ, at most `piece` rows at once."""
    N, D, vocab, piece = 40, 8, 500, 6
    chosen = torch.Generator().manual_seed(2)
    h, W = (torch.randn(rows, D, generator=chosen, dtype=torch.float64) for rows in (N, vocab))
    targets = torch.arange(N) % 13
    with torch.no_grad(), Tracer(nn.Module()) as log:
        given = answer(h, W, targets, piece)
    wanted = F.cross_entropy(h @ W.T, targets)
    most = max((spec.shape[0] for op in log.ops if not op.view for spec in op.outputs
                if len(spec.shape) == 2 and spec.shape[1] == vocab), default=0)
    close = abs(float(given) - float(wanted)) < 1e-12
    pieces = [F.cross_entropy(a @ W.T, b) for a, b in zip(h.split(piece), targets.split(piece), strict=True)]
    expect(abs(float(given) - sum(map(float, pieces)) / len(pieces)) > 1e-12 or close,
           f"a mean of the pieces' means weighs the last {N % piece} rows like {piece}: sum first, divide by {N} once")
    expect(close, f"the loss is {float(wanted):.6f}, but you gave {float(given):.6f}")
    expect(most <= piece, f"right, but the tracer saw {most} rows of logits at once; at most {piece} fit")
    limit = 4 * piece * vocab * 8
    expect(log.peak <= limit, f"right, but {log.peak:,} bytes were held at once; let go of each piece's logits")
    return f"equal, and the tracer saw at most {most} of {N} rows of logits at once."
