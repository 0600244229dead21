"""The state of a softmax that is still being read: (m, l, o), how it takes in a block, and how two of them merge.

Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867), Algorithm 3 and equation 4. The third component, the
weighted sum of values, is Rabe and Staats 2021 (arXiv 2112.05682).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class State(NamedTuple):
    """What must be remembered of the scores s_k and values v_k read so far.

    m: [...], the largest score; −inf if none was seen.
    l: [...], Σ e^(s_k − m); 0 if none was seen, else from 1 to the count.
    o: [..., d], Σ e^(s_k − m) v_k; not yet divided by l.
    """

    m: Tensor
    l: Tensor
    o: Tensor


def empty(
    *rows: int, d: int, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> State:
    """The identity of `merge`: `rows` rows that have read nothing yet.

    dtype: what m, l and o accumulate in. Scores of any dtype are converted to
        it; a half-precision one loses small terms, and later overflows.
    """
    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return State(full(-torch.inf, *rows), full(0, *rows), full(0, *rows, d))


def anchor(m: Tensor) -> Tensor:
    """m where a score was seen, 0 where none was: −inf − (−inf) is NaN."""
    return torch.where(m == -torch.inf, 0, m)


def starts(n: int, block: int) -> range:
    """Where each block of at most `block` keys begins, of n keys.

    Raises:
        ValueError: a block of no keys.
    """
    if block < 1:
        raise ValueError(f"a block holds at least 1 key, not {block}")
    return range(0, n, block)


def absorb(state: State, s: Tensor, v: Tensor) -> State:
    """The state after one more block of keys.

    Args:
        s: scores, [..., k], any k, 0 too; −inf means masked.
        v: values, [..., k, d], with the leading dimensions of a matrix product.

    A NaN in a row makes that row NaN, and so does +inf, as in `F.softmax`.

    Raises:
        ValueError: s and v differ in k, or s and the state in rows.
    """
    if s.shape[:-1] != state.m.shape:
        raise ValueError(
            f"the state has rows {list(state.m.shape)}, "
            f"but the block's scores have {list(s.shape[:-1])}"
        )
    if s.shape[-1] != v.shape[-2]:
        raise ValueError(
            f"a block needs one value per score, but s has {s.shape[-1]} "
            f"scores and v has {v.shape[-2]} values"
        )
    if not s.shape[-1]:
        return state
    s, v = s.to(state.m.dtype), v.to(state.o.dtype)
    m = torch.maximum(state.m, s.amax(-1))
    p = torch.exp(s - anchor(m)[..., None])
    a = torch.exp(state.m - anchor(m))  # the correction factor, from 0 to 1
    return State(m, a * state.l + p.sum(-1), a[..., None] * state.o + p @ v)


def merge(a: State, b: State) -> State:
    """The state of both parts' keys together; associative and commutative.

    Raises:
        ValueError: the states differ in shape.
    """
    if a.o.shape != b.o.shape:
        raise ValueError(
            "states merge row by row, so their o must share one shape, but "
            f"they are {list(a.o.shape)} and {list(b.o.shape)}"
        )
    m = torch.maximum(a.m, b.m)
    wa, wb = torch.exp(a.m - anchor(m)), torch.exp(b.m - anchor(m))
    o = wa[..., None] * a.o + wb[..., None] * b.o
    return State(m, wa * a.l + wb * b.l, o)


def finish(state: State) -> tuple[Tensor, Tensor]:
    """softmax(s) · v, [..., d], and logsumexp(s), [...].

    A row that saw no unmasked key gives zeros, as scaled_dot_product_attention
    does, and −inf.
    """
    l = torch.where(state.l == 0, 1, state.l)
    return state.o / l[..., None], state.m + l.log()


def merge_outputs(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """`merge` for finished parts: o [..., d] and lse [...], as `finish` returns.

    One number per row instead of two; each part is usable on its own. Used by
    flash-decoding and ring attention.

    Raises:
        ValueError: shapes that do not go together.
    """
    if o1.shape != o2.shape or not lse1.shape == lse2.shape == o1.shape[:-1]:
        raise ValueError(
            "finished parts need one shape [..., d] for o and [...] for lse, "
            f"not {[list(t.shape) for t in (o1, lse1, o2, lse2)]}"
        )
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = torch.exp(lse1 - anchor(lse)), torch.exp(lse2 - anchor(lse))
    return w1[..., None] * o1 + w2[..., None] * o2, lse


def stream(
    s: Tensor, v: Tensor, block: int, dtype: torch.dtype | None = None
) -> Iterator[State]:
    """The state before the first block of keys, and after each one.

    s: [..., k]; v: [..., k, d]; block: keys at a time, at least 1.
    dtype: of the state; that of s if none is given.
    """
    state = empty(*s.shape[:-1], d=v.shape[-1], dtype=dtype or s.dtype, device=s.device)
    yield state
    for j in starts(s.shape[-1], block):
        keys = slice(j, j + block)
        state = absorb(state, s[..., keys], v[..., keys, :])
        yield state
