"""What a loss is to be compared with: counting bytes after their context, and compressors."""

import lzma
import math
from collections import Counter, defaultdict

from torch import Tensor

Counts = dict[bytes, Counter[int]]


def counts(data: Tensor, order: int) -> Counts:
    """How often each byte followed each context of 0 to `order` bytes.

    data: [N], uint8. Returns context → byte → count.
    """
    text = bytes(data.tolist())
    found: Counts = defaultdict(Counter)
    for i, byte in enumerate(text):
        for n in range(min(order, i) + 1):
            found[text[i - n : i]][byte] += 1
    return found


def probability(found: Counts, context: bytes, byte: int) -> float:
    """Of a byte after a context, by counts; shorter contexts fill the gaps.

    A context that was followed by k kinds of bytes leaves k of n + k shares
    to its shorter self (Witten and Bell 1991); below the empty one is 1/256.
    """
    shorter = probability(found, context[1:], byte) if context else 1 / 256
    if context not in found:
        return shorter
    seen = found[context]
    n, kinds = seen.total(), len(seen)
    return (seen[byte] + kinds * shorter) / (n + kinds)


def ngram_bits(train: Tensor, held_out: Tensor, order: int) -> float:
    """Bits per held-out byte, predicted from `order` bytes before it."""
    found, text = counts(train, order), bytes(held_out.tolist())
    bits = 0.0
    for i, byte in enumerate(text):
        context = text[max(0, i - order) : i]
        bits -= math.log2(probability(found, context, byte))
    return bits / len(text)


def compressed_bits(train: Tensor, held_out: Tensor) -> float:
    """Bits per held-out byte that LZMA adds to the compressed training text."""
    a, b = bytes(train.tolist()), bytes(held_out.tolist())
    return 8 * (len(lzma.compress(a + b)) - len(lzma.compress(a))) / len(b)
