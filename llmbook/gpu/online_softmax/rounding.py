"""How far float32 is from float64 in a row's sum l, by the order in which its keys are merged."""

import functools

import torch

from .state import State, merge, stream

Tensor = torch.Tensor


def halve(s: Tensor) -> State:
    """All keys as states of their own, merged with their neighbours level by level. s: [rows, 2^k]; o has d = 0."""
    state = State(s, torch.ones_like(s), s.new_zeros(*s.shape, 0))
    while state.l.shape[-1] > 1:
        left, right = (State(state.m[:, i::2], state.l[:, i::2], state.o[:, i::2]) for i in (0, 1))
        state = merge(left, right)
    return State(state.m[:, 0], state.l[:, 0], state.o[:, 0])


def error_of_l(state: State, s: Tensor) -> float:
    """Relative error of Σ e^s against float64, root mean square over rows. s: [rows, n]."""
    off = state.m.double() + state.l.double().log() - s.double().logsumexp(-1)
    return float(off.expm1().square().mean().sqrt())


@functools.cache
def errors(spread: int, most: int = 12) -> dict[str, list[float]]:
    """`error_of_l` for 2⁴ … 2^most keys of the given standard deviation, by how they are merged."""
    s = spread * torch.randn(32, 2**most, generator=torch.Generator().manual_seed(spread), dtype=torch.float32)
    found: dict[str, list[float]] = {"one key at a time": [], "blocks of 64 keys": [], "balanced tree": []}
    lengths = [2**k for k in range(4, most + 1)]
    for name, block in (("one key at a time", 1), ("blocks of 64 keys", 64)):
        for read, state in enumerate(stream(s, s.new_zeros(2**most, 0), block)):
            if read * block in lengths:  # every state on the way is that of a shorter row
                found[name].append(error_of_l(state, s[:, : read * block]))
    found["blocks of 64 keys"] = [float("nan")] * 2 + found["blocks of 64 keys"]
    found["balanced tree"] = [error_of_l(halve(s[:, :n]), s[:, :n]) for n in lengths]
    return found
