"""Checkers for the llama chapter's exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmbook.block.rope.rotation import frequencies, rotate_half_split, rotate_interleaved, tables
from llmbook.kit.exercise import exercise, expect

from .sample import nucleus


@exercise
def width_of_swiglu(answer: Callable[[int, int], int]) -> str:
    """answer(dim, multiple) → D_ff: two thirds of 4·dim, rounded up to a multiple."""
    for dim, multiple, wanted in ((4096, 256, 11_008), (5120, 256, 13_824), (96, 8, 256), (128, 32, 352)):
        found = answer(dim, multiple)
        told = f"a width of {dim} with multiples of {multiple} needs {wanted}, but you gave {found}"
        expect(found == wanted, told)
    return "Llama 2's 11,008 and 13,824 among them."


@exercise
def smallest_set(answer: Callable[[Tensor, float], Tensor]) -> str:
    """answer(p [V], top_p) → bool [V]: the smallest set of tokens that reaches top_p."""
    for p, top_p in (([0.5, 0.3, 0.2], 0.6), ([0.1, 0.7, 0.2], 0.7), ([0.25, 0.5, 0.25], 0.2), ([0.2, 0.5, 0.3], 1.0)):
        given = torch.tensor(p, dtype=torch.float64)
        wanted, found = nucleus(given, top_p).tolist(), [bool(keep) for keep in answer(given.clone(), top_p)]
        expect(found == wanted, f"of {p} the nucleus at {top_p} is {wanted}, but you gave {found}")
    return "never one token too many, never none."


@exercise
def rows_for_halves(answer: Callable[[Tensor, int], Tensor]) -> str:
    """answer(weight [H·d, D], heads) → Meta's wq with its rows where a half-split model expects them."""
    heads, d, tokens = 2, 6, 5
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * d, 4, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, 4, generator=g, dtype=torch.float64)
    angles = tables(torch.arange(tokens), frequencies(d, 100.0), torch.float64)
    found = answer(weight.clone(), heads)
    expect(list(found.shape) == [heads * d, 4], f"the shape must stay [12, 4], not {list(found.shape)}")

    def scores(rotated: Tensor) -> Tensor:
        return torch.einsum("shd,thd->hst", rotated, rotated)

    wanted = scores(rotate_interleaved((x @ weight.T).view(tokens, heads, d), *angles))
    mine = scores(rotate_half_split((x @ found.T).view(tokens, heads, d), *angles))
    off = float((mine - wanted).abs().max())
    expect(off < 1e-9, f"the scores of a half-split model differ from Meta's by up to {off:.2f}; they must not")
    return "a half-split model has Meta's scores."


@exercise
def bits_of_a_byte(answer: Callable[[float, float], float]) -> str:
    """answer(nats_per_token, bytes_per_token) → bits per byte, which models of different vocabularies share."""
    for nats, width in ((math.log(2), 1.0), (2.0, 4.0), (1.8, 4.4), (math.log(256), 1.0)):
        wanted, found = nats / math.log(2) / width, answer(nats, width)
        told = f"{nats:.3f} nats per token of {width:g} bytes are {wanted:.3f} bits per byte, but you gave {found:.3f}"
        expect(abs(found - wanted) < 1e-9, told)
    return "uniform bytes cost 8, whatever the unit they were measured in."
