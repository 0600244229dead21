"""The softmax kernels in Triton's interpreter, and what the benchmark times."""

import math

import pytest
import torch

from llmbook.gpu.online_softmax import benchmark, kernel
from llmbook.gpu.online_softmax.kernel import softmax
from llmbook.kit import ahead, measure

SHAPES = [(1, 1), (3, 7), (130, 5), (2, 1024), (5, 1025), (2, 16_384), (2, 16_385), (1, 40_001)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_equal_float64(shape):
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    out = softmax(x)
    torch.testing.assert_close(out.double(), x.double().softmax(-1), atol=1e-7, rtol=2e-6)


@pytest.mark.parametrize("n", [100, 20_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_store(n, dtype):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    out = softmax(x)
    assert out.dtype == dtype
    assert measure.relative_error(out, x.double().softmax(-1)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("n", [6, 16_390])
def test_masked_and_extreme_rows(n):
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(n))
    x[0] = -math.inf
    x[1] += 1e4
    x[2] -= 1e4
    x[3, 1:] = -math.inf
    out = softmax(x)
    assert bool((out[0] == 0).all())  # torch.softmax gives NaN, attention gives zeros
    torch.testing.assert_close(out[1:].double(), x[1:].double().softmax(-1), atol=1e-7, rtol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which remarks on inf − inf
@pytest.mark.parametrize("n", [6, 16_390])
def test_nan_and_plus_infinity_make_the_row_nan(n):
    x = torch.zeros(3, n)
    x[0, n // 2], x[1, n - 1] = math.nan, math.inf
    for found in (softmax(x), x.softmax(-1)):
        assert found.isnan().any(1).tolist() == [True, True, False]


def test_views_dimensions_and_nothing_at_all():
    x = torch.randn(5, 2, 9).transpose(0, 2)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    torch.testing.assert_close(softmax(x[0, 0]), x[0, 0].softmax(-1))
    for shape in ((0, 4), (4, 0), (0,)):
        assert softmax(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("n", [33, 16_500])
def test_backward_is_autograds(n):
    x = torch.randn(2, n, requires_grad=True)
    up = torch.randn(2, n)
    (wanted,) = torch.autograd.grad(x.softmax(-1), x, up)
    (found,) = torch.autograd.grad(softmax(x), x, up)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "x must be one of float16, bfloat16, float32, not float64"),
        (torch.zeros(3, dtype=torch.int32), "not int32"),
        (torch.tensor(1.0), "at least one dimension"),
        (torch.zeros(2, 3, device="meta"), "kernels run on cpu here, but x is on meta: move them with"),
    ],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        softmax(x)


@pytest.mark.parametrize(("n", "wanted"), [(1, (1, 1024, 4)), (100, (128, 8, 4)), (5000, (8192, 1, 8))])
def test_a_programs_tile(n, wanted):
    assert kernel.tile(n) == wanted
    wide, height, warps = kernel.tile(kernel.TILE)
    assert wide * height // (32 * warps) == 32  # elements per thread


@pytest.mark.slow
def test_no_generation_spills():
    for row in ahead.report("llmbook.gpu.online_softmax.kernel"):
        assert row["spills"] == 0, row
        assert row["shared"] <= row["limit"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_benchmarks_check_sees_every_probability(dtype):
    """In fp16 a vocabulary's probabilities are subnormal: rounded coarsely, and right."""
    shapes = [(150, 40), (2, 16_500), (1, 100_000)]
    for (rows, n), case in zip(shapes, benchmark.cases(shapes=shapes, dtype=dtype), strict=True):
        assert case.bytes == (2 if n <= kernel.TILE else 3) * rows * n * 2
        work = case.make()
        out = work.run()
        error, allowed = work.error(out)
        assert error <= allowed
        smallest = int(out[-1].argmin())
        out[-1, smallest] *= 2
        out[-1, smallest] += 1e-6
        assert work.error(out)[0] > allowed
