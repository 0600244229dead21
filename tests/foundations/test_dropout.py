"""Dropout against PyTorch, Philox against its published answers and Triton's, statistics against the binomial."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmbook.foundations.dropout import figures
from llmbook.foundations.dropout.masks import ReplayedMask, StoredMask, dropout
from llmbook.foundations.dropout.philox import Stream, philox, uniform_at
from llmbook.foundations.dropout.theory import kept_band, sum_variance
from llmbook.kit.kernels import tl, triton

WAYS = [dropout, StoredMask.apply, ReplayedMask.apply]
ways = pytest.mark.parametrize("way", WAYS, ids=["dropout", "StoredMask", "ReplayedMask"])
probabilities = st.floats(0, 1)
seeds = st.integers(0, 2**63 - 1)


def values(*shape, dtype=torch.float64):
    """Away from zero, so that a zero in the output is a dropped element."""
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    """Random123's known-answer vectors for philox4x32-10."""
    assert tuple(philox(torch.tensor(counter), key).tolist()) == answer


@triton.jit
def randint_kernel(out_ptr, seed, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.randint(seed, at))


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**40 + 3])
def test_the_numbers_are_tritons(seed):
    out = torch.empty(64, dtype=torch.int32)
    randint_kernel[(1,)](out, seed, 64)
    words = out.to(torch.int64) & 0xFFFFFFFF
    assert torch.equal(uniform_at(torch.arange(64), seed), words.double() / 2**32)


@given(seeds, st.integers(0, 2**40), st.integers(0, 9), st.integers(0, 9))
def test_a_stream_does_not_depend_on_how_it_is_taken(seed, offset, a, b):
    stream, whole = Stream(seed, offset), Stream(seed, offset)
    parts = torch.cat([stream.uniform((a,)), stream.uniform((b,))])
    assert torch.equal(parts, whole.uniform((a + b,)))
    assert stream == whole == Stream(seed, offset + a + b)
    assert ((parts >= 0) & (parts < 1)).all()


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_uniform_numbers_are_float64_whatever_the_default(default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        numbers = Stream(1).uniform((2, 3))
    finally:
        torch.set_default_dtype(before)
    assert numbers.dtype == torch.float64
    assert numbers.shape == (2, 3)
    assert Stream(1).uniform(()).shape == ()
    assert torch.equal(numbers * 2**32, (numbers * 2**32).round())  # float32 could round up to 1


def test_uniform_numbers_are_uniform():
    counts = torch.histc(Stream(3).uniform((64_000,)), 64, 0, 1)
    # 64 bins of 1,000: chi-squared has 63 degrees of freedom, standard deviation √126.
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert abs(chi_squared - 63) < 5 * math.sqrt(126)
    pair = torch.stack([Stream(3).uniform((64_000,)), Stream(4).uniform((64_000,))])
    assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(64_000)


@ways
@given(p=probabilities, seed=st.integers(0, 10**6))
def test_kept_elements_are_scaled_and_the_gradient_is_the_mask(way, p, seed):
    x = values(3, 7).requires_grad_()
    y = way(x, p, Stream(seed))
    kept = y != 0
    assert torch.equal(kept, Stream(seed).uniform((3, 7)) >= p)
    scale = kept.double() / (1 - p) if p < 1 else kept.double()
    torch.testing.assert_close(y, x * scale, atol=0, rtol=1e-12)
    upstream = values(3, 7) - 1
    (dx,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(dx, upstream * scale)


@ways
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_share_mean_and_variance_lie_in_the_band_as_pytorchs_do(way, p):
    n = 200_000
    low, high = kept_band(n, p, 5)
    torch.manual_seed(1)
    ones = torch.ones(n, dtype=torch.float64)
    for y in (way(ones, p, Stream(21)), F.dropout(ones, p)):
        assert low < (y != 0).double().mean() < high
        assert low / (1 - p) < y.mean() < high / (1 - p)
        assert low / (1 - p) ** 2 < y.square().mean() < high / (1 - p) ** 2
        assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}


@ways
def test_gradcheck(way):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for p in (0.0, 0.4, 1.0):
        assert torch.autograd.gradcheck(lambda x, p=p: way(x, p, Stream(2)), x)


@ways
def test_p_0_and_p_1_behave_as_pytorchs(way):
    x = values(5, 3)
    for p in (0.0, 1.0):
        torch.testing.assert_close(way(x, p, Stream(0)), F.dropout(x, p), atol=0, rtol=0)


@given(probabilities)
def test_evaluation_is_the_identity_and_draws_nothing(p):
    x, stream = values(4), Stream(0, 5)
    assert dropout(x, p, stream, training=False) is x
    assert stream == Stream(0, 5)


@ways
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_p_outside_0_and_1_is_refused(way, p):
    with pytest.raises(ValueError, match=r"p is the probability of a zero, between 0 and 1, not"):
        way(values(2), p, Stream(0))


def test_bad_p_is_refused_in_evaluation_too_and_integers_always():
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        dropout(values(2), 2, Stream(0), training=False)
    with pytest.raises(TypeError, match=r"must be floating point, not torch\.int64"):
        dropout(torch.arange(3), 0.5, Stream(0))


@pytest.mark.parametrize(("seed", "offset"), [(-1, 0), (2**63, 0), (0, -1)])
def test_a_stream_that_cannot_be_is_refused(seed, offset):
    with pytest.raises(ValueError, match="a stream needs 0 <= seed"):
        Stream(seed, offset)


@ways
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar_tensors(way, shape):
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    stream = Stream(0)
    y = way(x, 0.5, stream)
    assert y.shape == shape
    assert stream.offset == x.numel()
    y.sum().backward()
    assert x.grad.shape == shape


@ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays(way, dtype):
    x = values(50, dtype=dtype).requires_grad_()
    y = way(x, 0.5, Stream(1))
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(y, x * x.grad)


def test_a_replayed_mask_survives_whatever_the_stream_did_since():
    x, stream = values(100).requires_grad_(), Stream(3)
    y = ReplayedMask.apply(x, 0.5, stream)
    stream.uniform((1000,))
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize(("way", "wanted"), [(StoredMask.apply, 1000), (ReplayedMask.apply, 16)])
def test_what_is_kept_for_backward(way, wanted):
    kept = []
    x = values(1000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        way(x, 0.5, Stream(0))
    assert sum(kept) == wanted


def test_the_variance_of_a_sum_by_all_masks():
    """Every one of the 2⁴ masks with its probability: no sampling."""
    w, x, p = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.3, 1.0, -2.0, 0.1]), 0.3
    masks = torch.tensor([[m >> i & 1 for i in range(4)] for m in range(16)], dtype=torch.float64)
    weight = ((1 - p) ** masks * p ** (1 - masks)).prod(1)
    sums = (masks / (1 - p)) @ (w * x).double()
    mean = weight @ sums
    torch.testing.assert_close(mean, (w.double() @ x.double()))
    torch.testing.assert_close(sum_variance(w.double(), x.double(), p), weight @ (sums - mean) ** 2)


@given(st.integers(1, 10**6), probabilities)
def test_the_band_is_a_part_of_0_to_1_around_the_expected_share(n, p):
    low, high = kept_band(n, p)
    assert 0 <= low <= 1 - p <= high <= 1


def test_every_stop_of_an_explorer_has_its_own_picture_and_caption():
    cases = [
        (figures.layer, figures.layer_caption,
         [(p, s) for p in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1) for s in range(1, 9)]),
        (figures.on_ranks, figures.on_ranks_caption,
         [(a, s, r) for a in figures.ACTIVATIONS for s in figures.STREAMS for r in (2, 4)]),
    ]
    for draw, caption, stops in cases:
        assert len({draw(*stop).as_str() for stop in stops}) == len(stops)
        assert len({caption(*stop) for stop in stops}) == len(stops)
    stops = [(s, n) for s in figures.SCALINGS for n in (100, 1000, 10_000)]
    captions = {figures.moments_caption(*stop) for stop in stops}
    assert len(captions) == len(stops)
    assert all("38 of 38 measured points" in caption for caption in captions)
