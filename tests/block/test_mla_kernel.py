"""Absorbed decode in Triton's interpreter and as one MQA head, against float64; and the compiler's report."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.block.mla.cache import LatentCache
from llmbook.block.mla.decode import decode_as_mqa, latent_decode
from llmbook.block.mla.tiles import tiles_for
from llmbook.kit import ahead

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def randn(*shape, seed=0, dtype=HALF):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact(q, rows, lengths, latent, scale):
    """Output and logsumexp in float64, sequence by sequence."""
    outs, sums = [], []
    for b, length in enumerate(lengths.tolist()):
        own = rows[b, :length].double()
        s = q[b].double() @ own.T * scale
        outs.append(s.softmax(-1) @ own[:, :latent])
        sums.append(s.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


CASES = [
    # heads, room, lengths, latent, rope, parts, dtype
    (16, 200, (200, 131), 64, 16, 3, HALF),
    (128, 40, (40, 33), 32, 16, 1, HALF),  # two blocks of heads
    (20, 90, (90, 1), 32, 16, 1, BRAIN),  # heads that are no power of two
    (3, 64, (64, 63), 16, 32, 5, HALF),  # fewer heads than rows; rotary part wider than the latent
    (65, 30, (30, 17), 16, 16, 1, HALF),  # one head over
    (6, 130, (0, 130), 64, 16, 4, BRAIN),  # an empty sequence, empty parts
    (9, 50, (50, 7), 64, 16, 3, SINGLE),
    (1, 300, (300, 299), 16, 16, 37, HALF),  # more parts than tiles, no power of two
    (16, 40, (40, 21), 512, 64, 2, HALF),  # DeepSeek's widths
]


@pytest.mark.parametrize(("heads", "room", "lengths", "latent", "rope", "parts", "dtype"), CASES)
def test_kernel_equals_float64(heads, room, lengths, latent, rope, parts, dtype):
    q, rows, n = randn(2, heads, latent + rope, dtype=dtype), randn(2, room, latent + rope, seed=1, dtype=dtype), \
        ints(*lengths)
    scale = 2 * (latent + rope) ** -0.5
    o, lse = latent_decode(q, rows, n, scale, latent=latent, parts=parts)
    right, right_lse = exact(q, rows, n, latent, scale)
    assert o.dtype == dtype
    # The rounding of p before the product with c, and of the output.
    assert (o.double() - right).abs().max() <= 3 * torch.finfo(dtype).eps * right.abs().max() + 1e-6
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [3, 16])
def test_pages_give_what_rows_give(page):
    lengths = ints(37, 0, 70)
    reserved = LatentCache(3, 3, 80, 48, dtype=HALF)
    pages = LatentCache(3, 200, page, 48, dtype=HALF)
    for seed in range(2):  # interleaved appends, so that tables are not in order
        new = randn(3, 40, 48, seed=seed)
        counts = (lengths - 40 * seed).clamp(0, 40).long()
        reserved.append(new, counts)
        pages.append(new, counts)
    q = randn(3, 5, 48, seed=7)
    rows = latent_decode(q, pages.read(), lengths, 0.2, latent=32, parts=2)
    for cache in (reserved, pages):
        table = cache.page_table().int()
        paged = latent_decode(q, cache.rows[0], lengths, 0.2, latent=32, table=table, parts=2)
        for one, other in zip(rows, paged, strict=True):
            assert torch.equal(one, other)


def test_views_are_read_where_they_lie():
    rows, q = randn(90, 1, 48, seed=1).transpose(0, 1), randn(4, 1, 48).transpose(0, 1)
    wide = randn(1, 90, 64, seed=2)[..., 5:53]
    for r in (rows, wide):
        other = latent_decode(q.contiguous(), r.contiguous(), ints(90), 0.2, latent=32)[0]
        assert torch.equal(latent_decode(q, r, ints(90), 0.2, latent=32)[0], other)


def test_what_lies_beyond_a_length_is_not_read():
    q, rows = randn(2, 4, 48), randn(2, 60, 48, seed=1)
    clean = latent_decode(q, rows, ints(20, 60), 0.2, latent=32, parts=2)[0]
    rows[0, 20:] = torch.nan
    assert torch.equal(latent_decode(q, rows, ints(20, 60), 0.2, latent=32, parts=2)[0], clean)


def test_a_nan_stays_in_its_own_sequence_and_head():
    q, rows = randn(2, 4, 48), randn(2, 60, 48, seed=1)
    q[0, 2] = torch.nan
    o, lse = latent_decode(q, rows, ints(60, 60), 0.2, latent=32, parts=2)
    assert o[0, 2].isnan().all()
    assert lse[0, 2].isnan()
    assert o.isnan().sum() == 32
    rows[1, 5] = torch.nan
    o, _ = latent_decode(q, rows, ints(60, 60), 0.2, latent=32, parts=2)
    assert o[1].isnan().all()
    assert o.isnan().sum() == 5 * 32


def test_large_scores_neither_overflow_nor_lose_the_sum():
    q, rows = randn(1, 2, 48) * 100, randn(1, 300, 48, seed=1) * 30
    o, lse = latent_decode(q, rows, ints(300), 1.0, latent=32, parts=3)
    right, right_lse = exact(q, rows, ints(300), 32, 1.0)
    assert (o.double() - right).abs().max() < 3e-3 * right.abs().max()
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=0)


def test_no_sequence_gives_nothing_and_no_rows_give_zeros():
    o, lse = latent_decode(randn(0, 4, 48), randn(0, 5, 48), ints(), 0.2, latent=32)
    assert (o.shape, lse.shape) == ((0, 4, 32), (0, 4))
    q, none = randn(2, 4, 48), torch.zeros(2, 0, dtype=torch.int32)
    for rows, table in ((randn(2, 0, 48), None), (randn(3, 8, 48), none)):
        o, lse = latent_decode(q, rows, ints(0, 0), 0.2, latent=32, table=table)
        assert not o.any()
        assert (lse == -torch.inf).all()


@given(st.integers(1, 60), st.data())
@settings(max_examples=25, deadline=None)
def test_one_mqa_head_in_any_number_of_parts(keys, data):
    parts = data.draw(st.integers(1, keys))
    q, rows = randn(2, 6, 20, dtype=torch.float64), randn(2, keys, 20, seed=keys, dtype=torch.float64)
    whole = F.scaled_dot_product_attention(
        q[:, :, None], rows[:, None], rows[:, None, :, :12], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(decode_as_mqa(q, rows, 12, 0.3, parts), whole[:, :, 0], rtol=0, atol=1e-13)


BAD = [
    ({"q": randn(1, 4, 32)}, "q must be"),
    ({"rows": randn(1, 1, 8, 48)}, "q must be"),
    ({"rows": randn(2, 8, 48)}, "needs its length"),
    ({"lengths": ints(8, 8)}, "needs its length"),
    ({"latent": 24}, "powers of two"),
    ({"latent": 48}, "powers of two"),
    ({"rows": randn(1, 8, 48, dtype=BRAIN)}, "q, rows must share one of float16, bfloat16, float32"),
    ({"q": randn(1, 4, 48).double(), "rows": randn(1, 8, 48).double()}, "q, rows must share .* not float64, float64"),
    ({"lengths": torch.tensor([8])}, "must be int32, not"),
    ({"table": torch.tensor([[0]])}, "must be int32, not"),
    ({"table": ints(0)}, r"must be \[B, n\]"),
    ({"table": ints(1)[None]}, "pages 0 to 0"),
    ({"lengths": ints(9)}, "from 0 to 8"),
    ({"lengths": ints(-1)}, "from 0 to 8"),
    ({"parts": 0}, "parts must be 1 or more"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_what_the_kernel_cannot_do_is_refused(changed, words):
    given = {"q": randn(1, 4, 48), "rows": randn(1, 8, 48), "lengths": ints(8), "latent": 32} | changed
    q, rows, lengths = (given.pop(name) for name in ("q", "rows", "lengths"))
    with pytest.raises(ValueError, match=words):
        latent_decode(q, rows, lengths, 0.2, **given)


def test_every_generation_compiles_without_spills():
    """A build for each; all builds for all of them compile in `python -m llmbook.kit.ahead`."""
    name = "llmbook.block.mla.kernel"
    rows = ahead.report(*(f"{name}:{build}" for build in ("1@75", "1@80", "1@89", "0@90", "1@100", "0@120", "3@90")))
    assert {row["sm"] for row in rows} == set(ahead.TARGETS)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= row["limit"], row
        assert row["tensor_core"] or row["sm"] == 75 or row["kernel"] == "merge_kernel", row


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("element", [2, 4])
def test_tiles_fit_their_heads(sm, element):
    for heads in (1, 16, 20, 128):
        tiles = tiles_for(heads, element, sm)
        assert tiles.rows <= 64
        assert tiles.BN >= 16
        assert tiles.rows < 16 or tiles.rows < 2 * max(heads, 9)
