"""Checkers for the attention_on_the_roofline chapter's exercises."""

from collections.abc import Callable, Sequence
from math import ceil

from llmbook.kit.exercise import exercise, expect

from .cache import Program, Tile, counts, replay
from .model import NOTES, Attention, cost, gain

GAINS = ((8, 1, 4, 2), (2, 1, 5.4, 2), (16, 16, 4, 2), (32, 16, 6, 4), (128, 16, 5.4, 2), (1, 1, 4, 2))


@exercise
def gain_of_a_group(answer: Callable[[int, int, float, float], float]) -> str:
    """answer(group, rows, l2, hbm) → how many times as fast as MHA, bandwidths in TB/s, compute left out."""
    for group, rows, l2, hbm in GAINS:
        on = NOTES._replace(l2=l2 * 1e12, hbm=hbm * 1e12, tensor=1e30, vector=1e30)
        wanted, given = gain(group, on, rows), answer(group, rows, l2, hbm)
        where = f"for groups of {group}, {rows} rows per program, L2 {l2} and HBM {hbm} TB/s you gave {given:.3g}"
        expect(given <= group * 1.0001, f"{where}, but HBM still delivers 1/{group} of MHA's bytes: at most {group}")
        loads = ceil(group / rows)
        limit = l2 / hbm * group / loads
        expect(given <= limit * 1.0001, f"{where}, but L2 delivers {loads} times the cache: at most {limit:.3g}")
        expect(abs(given - wanted) < 1e-6 * wanted, f"{where}; it is {wanted:.3g}, the smaller of the two bounds")
    return "the smaller of the two levels' bounds, for both kernels."


@exercise
def compute_bound_from(answer: Callable[[float, float], int]) -> str:
    """answer(tflops, tbs) → the smallest group with which the packed kernel, rows in sixteens, is compute-bound."""
    for name, tflops, tbs in (("A100", 312, 2.039), ("H100", 989, 3.35), ("H200", 989, 4.8), ("a T4", 65, 0.32)):
        on = NOTES._replace(tensor=tflops * 1e12, hbm=tbs * 1e12, l2=1e30)

        def bound(group: int, on=on) -> bool:  # type: ignore[no-untyped-def]
            return cost(Attention(group, 1), 1, on, 16).binds == "compute"

        given = answer(tflops, tbs)
        expect(isinstance(given, int) and given > 0, f"a group is a whole number of heads, not {given!r}")
        where = f"on {name} ({tflops} TFLOP/s, {tbs} TB/s) you gave {given}"
        expect(bound(given), f"{where}, but that group is still bound by HBM: see how many FLOP a byte gets")
        padded = f"{where}, but {given - 1} is compute-bound already: rows without a head are computed too"
        expect(given == 1 or not bound(given - 1), padded)
    return "one more than the last sixteen under the ridge: padding is computed, too."


@exercise
def split_the_keys(answer: Callable[[int, int, int], Sequence[Sequence[tuple[int, int]]]]) -> str:
    """answer(kv_heads, tiles, sms) → one list of (KV head, tile) per program of a packed kernel; all SMs busy."""
    for kv_heads, tiles, sms in ((1, 32, 8), (2, 30, 6), (3, 16, 12), (8, 4, 4), (1, 7, 4)):
        streams, where = answer(kv_heads, tiles, sms), f"for {kv_heads} KV heads of {tiles} tiles on {sms} SMs"
        read = [Tile(*pair) for stream in streams for pair in stream]
        everything = [Tile(kv, t) for kv in range(kv_heads) for t in range(tiles)]
        expect(sorted(set(read)) == everything, f"{where} some tiles are never read, or do not exist")
        expect(len(read) == len(everything), f"{where} {len(read)} tiles are read, though there are {len(everything)}")
        mixed = [s for s in streams if len({kv for kv, _ in s}) > 1]
        expect(not mixed, f"{where} a program reads two KV heads; its query rows belong to one")
        programs = [Program(s[0][0], (0,), tuple(Tile(*pair) for pair in s)) for s in streams if s]
        hbm, l2 = counts(programs, sms, capacity=4)
        expect(hbm == l2 == len(everything), f"{where} {hbm} tiles leave HBM and {l2} leave L2")
        ticks, least = sum(1 for _ in replay(programs, sms, 4)), ceil(len(everything) / sms)
        told = f"{where} the last SM is done after {ticks} tiles, and {least} is least: some SMs idle"
        expect(ticks <= 1.1 * least + 1, told)
    return "every tile leaves HBM once, and the multiprocessors finish together."
