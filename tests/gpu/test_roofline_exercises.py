"""The roofline chapter's checkers: each takes its solution and tells wrong answers why they are wrong."""

from math import ceil

from llmbook.gpu.roofline import exercises
from llmbook.gpu.roofline.gemm import Gemm
from llmbook.gpu.roofline.roofs import chip, peak
from tests.checkers import checker_tests


def batch(N, K, rate, bandwidth, b):
    ridge = rate / bandwidth * b
    return ceil(ridge * N * K / (2 * N * K - ridge * (N + K)))


def times(M, N, K, dtype, gpu):
    g = Gemm(M, N, K, dtype)
    return g.flop / peak(gpu, dtype), g.bytes / (chip(gpu).bandwidth * 1e9)


def larger(M, N, K, dtype, gpu):
    cal, mem = times(M, N, K, dtype, gpu)
    return max(cal, mem), "memory" if mem >= cal else "compute"


def tensor_cores_for_all(M, N, K, dtype, gpu):
    mem = times(M, N, K, dtype, gpu)[1]
    cal = Gemm(M, N, K).flop / peak(gpu, "fp16" if dtype == "fp32" else dtype)
    return max(cal, mem), "memory" if mem >= cal else "compute"


def fuse(ops, size, results):
    made, reads = {written for _, written in ops}, {name for names, _ in ops for name in names}
    return sum(size[n] for n in reads - made) + sum(size[n] for n in made & results)


SOLUTIONS = {
    "bytes_of_a_softmax": lambda rows, n, b: (b * (8 * rows * n + 4 * rows), 2 * b * rows * n),
    "batch_that_pays": batch,
    "predict_a_layer": larger,
    "fuse_a_chain": fuse,
}
WRONG = {
    "bytes_of_a_softmax": [
        (lambda rows, n, b: (b * 8 * rows * n, 2 * b * rows * n), "left out the row maxima"),
        (lambda rows, n, b: (b * (8 * rows * n + 4 * rows), 8 * rows * n), "a register holds fp32"),
        (lambda rows, n, b: (b * (8 * rows * n + 4 * rows), b * rows * n), "written once"),
        (lambda rows, n, b: (b * (10 * rows * n), 2 * b * rows * n), "passes 8 times"),
        (lambda rows, n, b: (1, 2, 3), "two numbers"),
    ],
    "batch_that_pays": [
        (lambda N, K, rate, bandwidth, b: rate / bandwidth * b / 2, "the weight's bytes alone"),
        (lambda *args: batch(*args) - 1, "under the ridge"),
        (lambda *args: batch(*args) + 1, "is enough"),
        (lambda N, K, rate, bandwidth, b: 1, "under the ridge"),
    ],
    "predict_a_layer": [
        (lambda *args: (sum(times(*args)), "memory"), "not the sum"),
        (lambda *args: (min(times(*args)), "memory"), "the slower one binds"),
        (tensor_cores_for_all, "another roof"),
        (lambda *args: (larger(*args)[0], "memory"), "compute binds"),
        (lambda *args: (1e6 * larger(*args)[0], "memory"), "s, not"),
    ],
    "fuse_a_chain": [
        (lambda ops, size, results: sum(size[n] for names, w in ops for n in (*names, w)), "stays on the chip"),
        (lambda ops, size, results: sum(
            size[n] for names, _ in ops for n in names if n not in {w for _, w in ops}
        ) + sum(size[n] for n in results), "read once"),
        (lambda ops, size, results: fuse(ops, size, {ops[-1][1]}), "wanted outside"),
        (lambda ops, size, results: fuse(ops, size, {w for _, w in ops}), "stays on the chip"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
