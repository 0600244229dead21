"""A recorded run of three places in a batch: sequences arrive, grow token by token, end and are replaced."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmbook.foundations.tokens_to_logits.tracer import Tracer

from .attention import Attention
from .cache import PagedCache, StaticCache
from .cost import decode_bytes, forward_flop
from .heads import Heads

HEADS = Heads(32, 4, 2, 8)
ROOM, PAGE = 16, 4
PAGES = 3 * ROOM // PAGE  # as many slots as the static cache reserves


class Event(NamedTuple):
    """One forward pass: new tokens per place, and what is freed before it."""

    words: str
    counts: tuple[int, int, int]
    ends: int | None = None


STORY = (
    Event("A and B arrive and are prefilled", (6, 3, 0)),
    Event("each decodes one token", (1, 1, 0)),
    Event("C arrives: its prefill runs beside two decodes", (1, 1, 5)),
    Event("three decodes", (1, 1, 1)),
    Event("B has ended: its memory is free", (1, 0, 1), ends=1),
    Event("D arrives in B's place: the first 4 of its 7 tokens", (1, 4, 1)),
    Event("the other 3 of D's tokens: a second chunk", (1, 3, 1)),
    Event("three decodes", (1, 1, 1)),
    Event("three decodes", (1, 1, 1)),
)


class Moment(NamedTuple):
    """What one forward pass did.

    names: of the sequence in each place. before, lengths: tokens, before and
    after. rows: per place the probabilities of head 0 that were computed,
    [rows, lengths[b]]. tables: pages per place. out: per place, the new
    tokens' outputs.
    """

    names: tuple[str, ...]
    before: list[int]
    lengths: list[int]
    rows: list[Tensor]
    flop: int
    read: int
    written: int
    tables: list[list[int]]
    out: list[Tensor]


@functools.cache
def play(kind: str) -> list[Moment]:
    """The story with cache "none", "static" or "paged", in float64; bytes are counted as bf16's."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    layer = Attention(HEADS).double().requires_grad_(False)
    layer.q_proj.weight.mul_(4)  # untrained scores are flat; these have something to show
    tokens = torch.randn(4, ROOM, HEADS.dim, dtype=torch.float64, generator=generator)
    sizes = (HEADS.kv_heads, ROOM, HEADS.head_dim)
    cache: StaticCache | PagedCache = (
        PagedCache(3, sizes[0], PAGES, PAGE, sizes[2], dtype=torch.float64) if kind == "paged"
        else StaticCache(3, *sizes, dtype=torch.float64)
    )
    lengths, who, moments = [0, 0, 0], [0, 1, 2], []
    for event in STORY:
        if event.ends is not None:
            cache.free(event.ends)
            lengths = [0 if b == event.ends else n for b, n in enumerate(lengths)]
            who[event.ends] = 3
        before, lengths = lengths, [a + b for a, b in zip(lengths, event.counts, strict=True)]
        x = [tokens[who[b], before[b] : lengths[b]] for b in range(3)]
        if kind == "none":
            runs = [_run(layer, tokens[who[b] : who[b] + 1, : lengths[b]]) for b in range(3)]
            rows = [p[0] if event.counts[b] else p[0, :0] for b, (_, p) in enumerate(runs)]
            out = [y[0, before[b] : lengths[b]] for b, (y, _) in enumerate(runs)]
        else:
            padded = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
            y, p = _run(layer, padded, cache, torch.tensor(event.counts))
            rows = [p[b, :n, : lengths[b]] for b, n in enumerate(event.counts)]
            out = [y[b, :n] for b, n in enumerate(event.counts)]
        grown = [b for b in range(3) if event.counts[b]]
        moments.append(Moment(
            tuple("ABCD"[w] for w in who), before, lengths, rows,
            sum(forward_flop(HEADS, len(rows[b]), lengths[b]) for b in grown),
            0 if kind == "none" else sum(decode_bytes(HEADS, lengths[b]) for b in grown),
            0 if kind == "none" else decode_bytes(HEADS, sum(event.counts)),
            [list(table) for table in cache.pages.tables] if isinstance(cache, PagedCache) else [], out,
        ))
    return moments


def _run(layer: Attention, x: Tensor, *cached: object) -> tuple[Tensor, Tensor]:
    """The layer's output, and the probabilities of query head 0, [B, S, T], as they were computed."""
    with Tracer(layer, keep=torch.clone) as log:
        y = layer(x, *cached)
    # The softmax, then the mask that takes out what padding saw.
    after = next(i for i, op in enumerate(log.ops) if op.name == "aten._softmax")
    masked = next(op for op in log.ops[after:] if op.name in ("aten.masked_fill", "aten.masked_fill_"))
    return y, masked.kept[:, 0, 0]
