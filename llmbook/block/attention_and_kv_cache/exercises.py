"""Checkers for the attention_and_kv_cache chapter's exercises."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmbook.kit.exercise import exercise, expect

from .attention import visible
from .calculator import MODELS, kv_bytes, sequences_that_fit


@exercise
def bytes_of_a_token(answer: int) -> str:
    """Cache bytes per token of Qwen3-32B in bf16: 64 layers, D = 5120, 64 heads of 128, 8 KV heads."""
    right = MODELS["Qwen3-32B"].bytes_per_token()
    told = {
        right * 80 // 128: "5120 / 64 is 80, but this model's heads are 128 wide: read head_dim, do not divide.",
        right // 2: "either keys or values are missing, or the 2 bytes of a bf16 number.",
        right // 4: "keys and values are two tensors, and a bf16 number has 2 bytes.",
        right * 8: "that stores a key for each query head; 8 KV heads serve all 64.",
        right // 64: "that is one layer; there are 64.",
        right // 8: "that is one KV head; there are 8.",
    }
    expect(answer not in told, told.get(answer, ""))
    expect(answer == right, f"{answer} is not 2 · L · n_kv · d_h · 2 bytes.")
    return f"{right:,} bytes: a quarter of a megabyte for every token of context."


@exercise
def sequences_beside_the_weights(answer: int) -> str:
    """How many sequences of 8,192 tokens of Llama-3-8B, bf16, fit on an 80 GB GPU beside the bf16 weights."""
    model, tokens, memory = MODELS["Llama-3-8B"], 8192, 80e9
    expect(answer == int(answer), f"{answer} is not a whole number of sequences.")
    right, each = sequences_that_fit(model, tokens, memory), kv_bytes(model, 1, tokens)
    told = {
        int(memory // each): "the weights want their place too.",
        int((memory - model.parameters) // each): "a bf16 weight has 2 bytes.",
        int((memory - 2 * model.parameters) // (4 * each)): "that is MHA's cache: this model has 8 KV heads, not 32.",
        right + 1: "one too many: the last one does not fit whole.",
    }
    expect(answer not in told, told.get(answer, ""))
    expect(answer == right, f"{answer} × {each:,} bytes and the weights do not just fill 80 GB.")
    return f"{right} sequences: {right * each / 1e9:.1f} GB beside {2 * model.parameters / 1e9:.1f} GB of weights."


@exercise
def mask_of_a_chunk(answer: Callable[[int, int], Tensor]) -> str:
    """answer(start, new) → bool [new, start + new]: what the tokens start … start+new−1 see."""
    for start, new in ((0, 4), (3, 2), (5, 1), (2, 3)):
        mine = answer(start, new)
        expect(isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}.")
        right = visible(torch.tensor([start]), torch.tensor([new]), new, start + new)[0]
        expect(mine.shape == right.shape, f"of shape {list(mine.shape)}; [new, start + new] is {list(right.shape)}.")
        expect(mine.dtype == torch.bool, f"the mask is {mine.dtype}: True where a key is seen.")
        top_left = torch.ones_like(right).tril()
        expect(start == 0 or not torch.equal(mine, top_left), "your first new token sees key 0 alone.")
        expect(not torch.equal(mine, ~right), "True means seen, not hidden.")
        expect(not (right & ~mine).any(), f"with start={start}, new={new} a token misses keys it may see.")
        expect(torch.equal(mine, right), f"with start={start}, new={new} a token sees the future.")
    return "decode is the case new = 1, a row of True: no mask at all."


Append = Callable[[Tensor, list[int], list[int], int, Tensor], None]


@exercise
def append_to_pages(answer: Append) -> str:
    """answer(pool [pages, page, d], table, unused, length, k [n, d]): take pages off `unused`'s end, write k."""
    generator = torch.Generator().manual_seed(0)
    table: list[int] = []
    pool, unused = torch.zeros(6, 3, 2), [4, 0, 5, 2]
    held = torch.zeros(0, 2)
    for n in (2, 3, 0, 1, 4):
        k = torch.randn(n, 2, generator=generator)
        others = [page for page in range(6) if page not in [*table, *unused]]
        answer(pool, table, unused, len(held), k)
        held = torch.cat((held, k))
        pages = -(-len(held) // 3)
        expect(len(table) >= pages, f"{len(held)} tokens need {pages} pages of 3, but the table has {len(table)}.")
        expect(len(table) == pages, f"{len(held)} tokens need {pages} pages of 3; {len(table)} were taken.")
        expect(sorted([*table, *unused]) == [0, 2, 4, 5], f"pages were lost or doubled: {table} held, {unused} unused.")
        expect(not pool[others].any(), "somebody else's page was written.")
        found = pool[table].flatten(0, 1)[: len(held)] if table else held
        expect(torch.equal(found, held), f"after {len(held)} tokens the pages, read in the table's order, differ.")
    return "every token lies at pool[table[t // page], t % page], and no page was taken early."
