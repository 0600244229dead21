"""What the literature says a schedule costs, in formulas: the simulator and the runtime are held against
these.

p ranks, m micro-batches, v chunks per rank; F, B: one micro-batch's forward and backward through all layers
of a rank.
"""


def bubble(ranks: int, forward: float, backward: float, chunks: int = 1) -> float:
    """Idle time per rank: (p − 1)(F + B)/v for GPipe and 1F1B (v = 1) and for interleaved 1F1B.

    With recomputation too: the first R of a rank runs while its gradient is still on the way, so R adds work
    and no idle time. For `naive`, F and B are those of the whole batch. Source: Narayanan et al. 2021, 2.2.
    """
    return (ranks - 1) * (forward + backward) / chunks


def bubble_of_ideal(ranks: int, micros: int, chunks: int = 1) -> float:
    """(p − 1)/(v·m): idle time as a share of the work, without recomputation (Narayanan et al. 2021, 2.2)."""
    return (ranks - 1) / (chunks * micros)


def bubble_of_total(ranks: int, micros: int, chunks: int = 1) -> float:
    """(p − 1)/(v·m + p − 1): idle share of the step, without recomputation (Huang et al. 2019, 2.3)."""
    return (ranks - 1) / (chunks * micros + ranks - 1)


def peak_gpipe(micros: int) -> int:
    """Micro-batches whose activations a GPipe rank holds at its peak: all m."""
    return micros


def peak_one_f_one_b(ranks: int, micros: int, rank: int) -> int:
    """The same for 1F1B: min(p − rank, m)."""
    return min(ranks - rank, micros)


def peak_interleaved(ranks: int, micros: int, chunks: int, rank: int) -> float:
    """The same for interleaved 1F1B, chunks counted as 1/v: min(2(p − rank − 1) + (v − 1)p + 1, v·m)/v.

    On rank 0 that is p(1 + (p − 1)/(p·v)): Korthikanti et al. 2022, 4.2.3.
    """
    return min(2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1, chunks * micros) / chunks


def messages(ranks: int, micros: int, chunks: int = 1) -> int:
    """Messages per step of all ranks: each of p·v − 1 boundaries passes m activations and m gradients."""
    return 2 * (ranks * chunks - 1) * micros if ranks > 1 else 0
