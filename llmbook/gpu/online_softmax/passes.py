"""A softmax in three passes, in two, and in one with its product; every element that crosses memory is counted.

Three is what libraries call safe softmax, two is Algorithm 3 of Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

import torch

from .state import absorb, anchor, empty, finish, starts

Tensor = torch.Tensor


class Traffic:
    """Counts the elements read from and written to large memory."""

    def __init__(self) -> None:
        self.reads = self.writes = 0

    @property
    def total(self) -> int:
        return self.reads + self.writes

    def load(self, x: Tensor, j: int, block: int, dim: int = -1) -> Tensor:
        """Up to `block` entries along `dim`, from entry j on."""
        tile = x.narrow(dim, j, min(block, x.shape[dim] - j))
        self.reads += tile.numel()
        return tile

    def store(self, y: Tensor, j: int, tile: Tensor) -> None:
        """Write a tile along the last dimension, from entry j on."""
        self.writes += tile.numel()
        y[..., j : j + tile.shape[-1]] = tile


def three_passes(x: Tensor, mem: Traffic, block: int) -> Tensor:
    """Safe softmax of the rows of x, [..., n]: maximum, sum, normalise.

    A row of −inf alone gives zeros.
    """
    n, y = x.shape[-1], torch.zeros_like(x)
    m = x.new_full((*x.shape[:-1], 1), -torch.inf)
    l = torch.zeros_like(m)
    for j in starts(n, block):
        m = torch.maximum(m, mem.load(x, j, block).amax(-1, keepdim=True))
    for j in starts(n, block):
        tile = mem.load(x, j, block)
        l = l + torch.exp(tile - anchor(m)).sum(-1, keepdim=True)
    for j in starts(n, block):
        tile = mem.load(x, j, block)
        mem.store(y, j, torch.exp(tile - anchor(m)) / torch.where(l == 0, 1, l))
    return y


def two_passes(x: Tensor, mem: Traffic, block: int) -> Tensor:
    """The same with maximum and sum in one pass: the online normaliser."""
    n, y = x.shape[-1], torch.zeros_like(x)
    m = x.new_full((*x.shape[:-1], 1), -torch.inf)
    l = torch.zeros_like(m)
    for j in starts(n, block):
        tile = mem.load(x, j, block)
        new = torch.maximum(m, tile.amax(-1, keepdim=True))
        p = torch.exp(tile - anchor(new))
        l = torch.exp(m - anchor(new)) * l + p.sum(-1, keepdim=True)
        m = new
    for j in starts(n, block):
        tile = mem.load(x, j, block)
        mem.store(y, j, torch.exp(tile - anchor(m)) / torch.where(l == 0, 1, l))
    return y


def one_pass(s: Tensor, v: Tensor, mem: Traffic, block: int) -> Tensor:
    """softmax(s) · v without the softmax. s: [..., n]; v: [n, d]. Returns [..., d].

    Raises:
        ValueError: s and v differ in n.
    """
    if s.shape[-1] != len(v):
        raise ValueError(
            f"{s.shape[-1]} scores per row need as many values, not {len(v)}"
        )
    state = empty(*s.shape[:-1], d=v.shape[-1], dtype=s.dtype, device=s.device)
    for j in starts(len(v), block):
        keys, values = mem.load(s, j, block), mem.load(v, j, block, dim=0)
        state = absorb(state, keys, values)
    o, _ = finish(state)
    mem.writes += o.numel()
    return o


def product(p: Tensor, v: Tensor, mem: Traffic) -> Tensor:
    """p · v for weights that lie in large memory: what has to follow a softmax of its own. p: [..., n]; v: [n, d]."""
    mem.reads += p.numel() + v.numel()
    o = p @ v
    mem.writes += o.numel()
    return o


# Accesses per score until softmax(s)·v is known: the softmax's own, then one more to read its result.
PER_SCORE = {
    "three passes": 4 + 1, "two passes": 3 + 1, "row fits on chip": 2 + 1,
    "one pass, fused": 1,
}


def elements(way: str, n: int, d: int, rows: int = 1) -> int:
    """Elements that cross for `rows` rows of n scores, n values and outputs of d."""
    return PER_SCORE[way] * rows * n + n * d + rows * d


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """The gradient of the scores from that of the weights, p and dp: [..., n].

    The Jacobian is diag(p) − p pᵀ; its product with dp needs no matrix.
    """
    return p * (dp - (p * dp).sum(-1, keepdim=True))
