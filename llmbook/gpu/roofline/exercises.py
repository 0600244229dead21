"""Checkers for the roofline chapter's exercises."""

from collections.abc import Callable, Sequence

import torch

from llmbook.kit.exercise import exercise, expect

from .counting import count
from .gemm import Gemm, batch_at_ridge
from .roofs import chip, peak

# Operations of a chain by the tensors they read and write, for `fuse_a_chain`.
Op = tuple[tuple[str, ...], str]


@exercise
def bytes_of_a_softmax(answer: Callable[[int, int, int], tuple[int, int]]) -> str:
    """answer(rows, n, itemsize) → bytes of amax, sub, exp, sum, div in turn, and of one fused kernel."""
    for rows, n in ((4, 8), (128, 1000), (1, 32_000)):
        x = torch.empty(rows, n, dtype=torch.float16, device="meta")

        def chain(x: torch.Tensor) -> torch.Tensor:
            e = (x - x.amax(1, keepdim=True)).exp()
            return e / e.sum(1, keepdim=True)

        counted = count(chain, x)
        apart, one = counted.unfused().bytes, counted.fused().bytes
        yours = answer(rows, n, 2)
        expect(len(yours) == 2, f"return two numbers, unfused and fused, not {len(yours)}")
        expect(yours[1] != 8 * rows * n, "the fused kernel reads fp16 and writes fp16: that a register holds fp32 "
               "does not show in memory")
        expect(yours[1] == one, f"fused, {rows} × {n} in fp16 read once and written once are {one:,} bytes, "
               f"not {yours[1]:,}")
        big = 2 * rows * n
        expect(yours[0] != 8 * big, "you left out the row maxima and sums: each is written once and read once")
        expect(yours[0] == apart, f"unfused, {rows} × {n} in fp16 move {apart:,} bytes, not {yours[0]:,}: the matrix "
               "passes 8 times, and each of the two columns twice")
    return "8 passes over the matrix become 2."


@exercise
def batch_that_pays(answer: Callable[[int, int, float, float, int], int]) -> str:
    """answer(N, K, rate, bandwidth, itemsize) → the least M at which x[M, K] @ w[K, N] is compute-bound."""
    for name, dtype, N, K in (
        ("H100 SXM", "fp16", 8192, 8192), ("A100-80 SXM", "bf16", 4096, 14_336), ("T4", "fp16", 11_008, 4096),
        ("L4", "fp8", 8192, 8192),
    ):
        right = batch_at_ridge(N, K, name, dtype)
        assert right is not None
        rate, bandwidth = peak(name, dtype), chip(name).bandwidth * 1e9
        yours = answer(N, K, rate, bandwidth, {"fp8": 1}.get(dtype, 2))
        told = f"{name}, {dtype}, N = {N}, K = {K}: "
        weights_only = rate / bandwidth * {"fp8": 1}.get(dtype, 2) / 2
        expect(abs(yours - weights_only) > 1, told + f"{yours:g} counts the weight's bytes alone; x and the result "
               "move too")
        if yours < right:
            intensity = Gemm(max(1, int(yours)), N, K, dtype).intensity
            expect(False, told + f"at M = {yours:g} the intensity is {intensity:.1f}, under the ridge of "
                   f"{rate / bandwidth:.1f}")
        expect(yours == right, told + f"M = {right} is enough, and you gave {yours:g}")
    return "right on four GPUs: hundreds of tokens, and each weight is read once for all of them."


@exercise
def predict_a_layer(answer: Callable[[int, int, int, str, str], tuple[float, str]]) -> str:
    """answer(M, N, K, dtype, gpu) → (seconds, "memory" or "compute")."""
    for M, N, K, dtype, name in (
        (16, 8192, 1024, "fp16", "A100-40 SXM"), (4096, 8192, 8192, "bf16", "H100 SXM"),
        (64, 14_336, 4096, "fp8", "L4"), (2048, 2048, 2048, "fp32", "RTX 4090"), (2048, 2048, 2048, "fp16", "RTX 4090"),
    ):
        g = Gemm(M, N, K, dtype)
        cal, mem = g.flop / peak(name, dtype), g.bytes / (chip(name).bandwidth * 1e9)
        seconds, binds = answer(M, N, K, dtype, name)
        told = f"{M} × {N} × {K} in {dtype} on a {name}: "

        def near(wanted: float, got: float = seconds) -> bool:
            return abs(got - wanted) <= 1e-6 * wanted

        expect(not near(cal + mem), told + "the two overlap, so take the larger one, not the sum")
        expect(not near(min(cal, mem)) or near(max(cal, mem)), told + "the slower one binds: the larger time")
        expect(dtype != "fp32" or not near(max(g.flop / peak(name, "fp16"), mem)), told +
               "fp32 runs on CUDA cores: another roof")
        expect(near(max(cal, mem)), told + f"{max(cal, mem):.3g} s, not {seconds:.3g} s")
        wanted = "memory" if mem >= cal else "compute"
        expect(binds == wanted, told + f"{wanted} binds, not {binds}")
    return "five layers predicted before running one."


@exercise
def fuse_a_chain(answer: Callable[[Sequence[Op], dict[str, int], set[str]], int]) -> str:
    """answer(ops, size, results) → bytes one fused kernel moves. ops: (names read, name written) in order."""
    for ops, results, right, hint in (
        ([(("x",), "a"), (("a",), "y")], {"y"}, {"x", "y"}, "what is made and used inside stays on the chip"),
        ([(("x", "x"), "y")], {"y"}, {"x", "y"}, "an input that is used twice is read once"),
        ([(("x",), "a"), (("a", "x"), "y")], {"y"}, {"x", "y"}, "x is read once, though two operations use it"),
        ([(("x",), "a"), (("a", "w"), "y")], {"a", "y"}, {"x", "w", "a", "y"},
         "a is wanted outside, so it is written; but not read back"),
        ([(("x",), "a"), (("w",), "b"), (("a", "b"), "y")], {"y"}, {"x", "w", "y"}, "two inputs and one result"),
        ([(("x",), "a"), (("x",), "b")], {"b"}, {"x", "b"}, "nobody wants a: it is not written"),
    ):
        size = {name: 10**i for i, name in enumerate(("x", "w", "a", "b", "y"))}
        yours, wanted = answer(ops, size, results), sum(size[name] for name in right)
        told = f"for {ops} with results {sorted(results)} it is {wanted:,} bytes, not {yours:,}: {hint}"
        expect(yours == wanted, told)
    return "this is the bookkeeping behind every byte that a fusing compiler saves."
