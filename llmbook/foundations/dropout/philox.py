"""Random numbers by position: Philox 4x32-10, the generator of GPUs, in integers, so the same on every machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

Tensor = torch.Tensor
WORD = 0xFFFFFFFF


def philox(counter: Tensor, seed: int) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): four 32-bit words from four.

    Args:
        counter: [..., 4], int64, each in [0, 2³²).
        seed: the 64-bit key.

    Returns: [..., 4], int64, each in [0, 2³²).
    """
    a, b, c, d = counter.unbind(-1)
    low, high = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        # Products wrap at 2⁶⁴; their two halves are right all the same.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return torch.stack((a, b, c, d), -1)


def uniform_at(position: Tensor, seed: int) -> Tensor:
    """The uniform number in [0, 1) that belongs to each position.

    Args:
        position: any shape, int64, not negative.

    Returns: the same shape, float64, multiples of 2⁻³². The first Philox word
    of counter (position, 0), as Triton's tl.randint has it.
    """
    low, high = position & WORD, position >> 32
    counter = torch.stack((low, high, low * 0, low * 0), -1)
    return philox(counter, seed)[..., 0].double() / 2**32


@dataclass
class Stream:
    """A sequence of random numbers; all of its state is two integers.

    Attributes:
        seed: which sequence, 0 ≤ seed < 2⁶³.
        offset: how many numbers have been taken from it.

    Raises:
        ValueError: the seed does not fit, or the offset is negative.
    """

    seed: int
    offset: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63 or self.offset < 0:
            raise ValueError(
                "a stream needs 0 <= seed < 2**63 and offset >= 0, "
                f"not seed {self.seed} and offset {self.offset}"
            )

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """The next prod(shape) numbers, [*shape], float64 in [0, 1)."""
        first, self.offset = self.offset, self.offset + prod(shape)
        position = torch.arange(first, self.offset)
        return uniform_at(position, self.seed).view(tuple(shape))
