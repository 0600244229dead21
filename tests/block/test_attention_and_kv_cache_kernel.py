"""The split-KV kernels in Triton's interpreter, and the split in plain PyTorch, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.block.attention_and_kv_cache import benchmark
from llmbook.block.attention_and_kv_cache.cache import PagedCache, StaticCache
from llmbook.block.attention_and_kv_cache.decode import choose_parts, dealt, decode_in_parts, flash_decode
from llmbook.kit import ahead

HALF, BRAIN = torch.float16, torch.bfloat16


def randn(*shape, seed=0, dtype=HALF):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q, k, v, lengths):
    """Output and logsumexp in float64, sequence by sequence."""
    outs, sums = [], []
    group = q.shape[1] // k.shape[1]
    for b, length in enumerate(lengths.tolist()):
        keys, values = (t[b, :, :length].double().repeat_interleave(group, 0) for t in (k, v))
        s = (keys @ q[b].double()[..., None])[..., 0] * q.shape[-1] ** -0.5
        outs.append((s.softmax(-1)[:, None] @ values)[:, 0])
        sums.append(s.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = [
    # heads, kv_heads, room, lengths, d, parts, dtype
    (8, 1, 200, (200, 131), 64, 3, HALF),  # MQA, ragged
    (8, 2, 130, (130, 1), 128, 2, BRAIN),
    (4, 4, 70, (70, 64), 32, 1, HALF),  # MHA: one row of sixteen is used
    (4, 2, 300, (5, 300), 16, 4, HALF),  # parts that are empty
    (20, 1, 65, (65, 63), 64, 5, HALF),  # a group wider than sixteen
    (6, 2, 64, (0, 64), 64, 2, HALF),  # an empty sequence
    (2, 1, 40, (40, 17), 256, 2, HALF),
    (2, 1, 90, (90, 17), 32, 37, HALF),  # more parts than tiles, no power of two
]


@pytest.mark.parametrize(("heads", "kv_heads", "room", "lengths", "d", "parts", "dtype"), CASES)
def test_kernel_equals_float64(heads, kv_heads, room, lengths, d, parts, dtype):
    q, lengths = randn(2, heads, d, dtype=dtype), ints(*lengths)
    k, v = (randn(2, kv_heads, room, d, seed=s, dtype=dtype) for s in (1, 2))
    o, lse = flash_decode(q, k, v, lengths, parts=parts)
    right, right_lse = exact(q, k, v, lengths)
    assert o.dtype == dtype
    # The rounding of p before the product with V, and of the output.
    bound = 3 * torch.finfo(dtype).eps * right.abs().max()
    assert (o.double() - right).abs().max() <= bound
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [1, 3, 16])
def test_pages_give_what_rows_give(page):
    lengths = ints(37, 0, 80)
    rows = StaticCache(3, 2, 80, 32, dtype=HALF)
    pages = PagedCache(3, 2, 200, page, 32, dtype=HALF)
    for seed in range(2):  # interleaved appends, so that tables are not in order
        k, v = randn(3, 2, 40, 32, seed=seed), randn(3, 2, 40, 32, seed=9 + seed)
        counts = (lengths - 40 * seed).clamp(0, 40).long()
        rows.append(k, v, counts)
        pages.append(k, v, counts)
    q = randn(3, 4, 32)
    table = pages.page_table().int()
    by_row = flash_decode(q, rows.k[0], rows.v[0], lengths, parts=2)
    by_page = flash_decode(q, pages.k[0], pages.v[0], lengths, table=table, parts=2)
    for one, other in zip(by_row, by_page, strict=True):
        assert torch.equal(one, other)


def test_views_are_read_where_they_lie():
    k, v = (randn(1, 90, 2, 32, seed=s).transpose(1, 2) for s in (1, 2))
    q, lengths = randn(4, 1, 32).transpose(0, 1), ints(90)
    other = flash_decode(q.contiguous(), k.contiguous(), v.contiguous(), lengths)[0]
    assert torch.equal(flash_decode(q, k, v, lengths)[0], other)


def test_large_scores_neither_overflow_nor_lose_the_sum():
    q, k, v = randn(1, 2, 64) * 100, randn(1, 1, 300, 64, seed=1) * 100, randn(1, 1, 300, 64, seed=2)
    o, lse = flash_decode(q, k, v, ints(300), parts=3)
    right, right_lse = exact(q, k, v, ints(300))
    assert (o.double() - right).abs().max() < 5e-3
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=0)


def test_no_sequence_gives_nothing():
    o, lse = flash_decode(randn(0, 4, 32), randn(0, 2, 5, 32), randn(0, 2, 5, 32), ints())
    assert o.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@given(st.integers(1, 60), st.data())
@settings(max_examples=30, deadline=None)
def test_any_number_of_parts_is_exact(keys, data):
    parts = data.draw(st.integers(1, keys))
    q, k, v = (randn(2, n, t, 8, seed=n + t, dtype=torch.float64) for n, t in ((6, 1), (2, keys), (2, keys)))
    whole = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(decode_in_parts(q, k, v, parts), whole, rtol=0, atol=1e-13)


def busiest(programs, longest, parts, slots):
    """Keys that the busiest of `slots` places reads."""
    return max(sum(work) for work in dealt(programs, longest, parts, slots))


@given(st.integers(1, 300), st.integers(1, 100_000), st.sampled_from([40, 132, 148]))
@settings(max_examples=20, deadline=None)
def test_parts_fill_the_gpu_and_are_worth_it(programs, longest, sms):
    parts = choose_parts(programs, longest, sms)
    assert parts == 1 or longest / parts >= 256
    mine = busiest(programs, longest, parts, 2 * sms)
    for other in (1, 2, 3, 5, 8, 16, 33, 64):
        if longest / other >= 256:  # a part's last key may be a rounding
            assert mine <= 1.05 * busiest(programs, longest, other, 2 * sms) + programs * parts / sms + 1


def test_parts_by_hand():
    """Two programs on each of 132 multiprocessors: 8 heads × 32 parts; a batch of 16 needs no more than 2."""
    assert [choose_parts(8 * batch, 16_384, 132) for batch in (1, 4, 16, 64)] == [32, 8, 2, 1]
    assert choose_parts(8, 300, 132) == choose_parts(0, 300, 132) == 1
    assert sum(map(sum, dealt(8, 1000, 4, 132))) == 8 * 1000


BAD = [
    ({"q": randn(1, 3, 64)}, "the KV heads must divide"),
    ({"q": randn(1, 4, 32)}, "q must be"),
    ({"q": randn(1, 4, 1, 64)}, "q must be"),
    ({"v": randn(1, 2, 9, 64)}, "q must be"),
    ({"k": randn(1, 2, 9, 24), "v": randn(1, 2, 9, 24), "q": randn(1, 4, 24)}, "head dimension 24 is not supported"),
    ({"q": randn(1, 4, 64, dtype=BRAIN)}, "q, k, v must share one of float16, bfloat16, not bfloat16, float16"),
    ({"lengths": torch.tensor([8])}, "must be int32, not int64"),
    ({"lengths": ints(8, 8)}, "needs its length"),
    ({"table": ints(0)}, r"must be \[B, n\]"),
    ({"q": randn(1, 512, 64)}, "at most 128 to one"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_what_the_kernels_cannot_do_is_refused(changed, words):
    given = {"q": randn(1, 4, 64), "k": randn(1, 2, 8, 64), "v": randn(1, 2, 8, 64), "lengths": ints(8)} | changed
    table = given.pop("table", None)
    with pytest.raises(ValueError, match=words):
        flash_decode(**given, table=table)


def test_both_kernels_compile_without_spills():
    """The interpreter takes loops whose variables change their type; the compiler does not."""
    name = "llmbook.block.attention_and_kv_cache.kernel"
    for row in ahead.report(f"{name}:2@75", f"{name}:1@90", f"{name}:3@90"):
        assert row["spills"] == 0
        assert row["shared"] <= row["limit"]
        assert row["tensor_core"] == "mma.sync" or row["sm"] == 75 or row["kernel"] == "merge_kernel"


def test_the_benchmarks_pages_are_checked_by_their_own_table():
    """A wrong page of the last sequence is seen, and the layer's step is a prefill's last row."""
    *decode, layer = benchmark.cases(**benchmark.SMALL)
    paged = decode[-1].make()
    out = paged.run()
    assert paged.error(out)[0] <= paged.error(out)[1]
    assert not paged.error(torch.cat((out[:1], out[:1])))[0] <= paged.error(out)[1]
    work = layer.make()
    torch.testing.assert_close(work.run(), work.peers["without a cache"](), rtol=2e-2, atol=2e-3)
