"""The decode kernels in Triton's interpreter against SDPA in float64, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from llmbook.gpu.attention_on_the_roofline.cache import launch
from llmbook.gpu.attention_on_the_roofline.decode import decode, splits_for
from llmbook.gpu.attention_on_the_roofline.kernel import place, share
from llmbook.gpu.attention_on_the_roofline.tiles import rows_for, tiles_for
from llmbook.kit import kernels
from llmbook.kit.kernels import tl, triton

HALF, BRAIN = torch.float16, torch.bfloat16


def inputs(batch, heads, kv_heads, n, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, 1, d), (batch, kv_heads, n, d), (batch, kv_heads, n, d))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def sdpa(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def logsumexp(q, k, scale=None):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).logsumexp(-1)


def holds(out, lse, q, k, v, scale=None):
    """Twice the error of SDPA in the same dtype, and one rounding."""
    exact = sdpa(q.double(), k.double(), v.double(), scale)
    same = (sdpa(q.float(), k.float(), v.float(), scale).to(q.dtype).double() - exact).abs().max()
    assert out.dtype == q.dtype
    assert (out.double() - exact).abs().max() <= 2 * same + 2 * torch.finfo(q.dtype).eps * exact.abs().max()
    torch.testing.assert_close(lse.double(), logsumexp(q.double(), k.double(), scale), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["per head", "packed"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "d", "dtype", "splits"),
    [
        (1, 1, 1, 1, 64, HALF, None), (2, 4, 4, 65, 64, HALF, 1), (1, 6, 2, 200, 128, BRAIN, 3),
        (1, 8, 1, 129, 64, BRAIN, None), (2, 3, 1, 31, 128, HALF, 1), (1, 20, 1, 70, 64, HALF, 2),
        (1, 4, 2, 10, 64, HALF, 9),  # more shares than tiles: most are empty
    ],
)
def test_equals_sdpa(kernel, batch, heads, kv_heads, n, d, dtype, splits):
    q, k, v = inputs(batch, heads, kv_heads, n, d, dtype)
    out, lse = decode(q, k, v, kernel=kernel, splits=splits)
    assert (out.shape, lse.shape) == ((batch, heads, 1, d), (batch, heads, 1))
    holds(out, lse, q, k, v)


def test_a_group_of_more_rows_than_a_tile():
    q, k, v = inputs(1, 70, 1, 40, 64, HALF)
    holds(*decode(q, k, v), q, k, v)


@pytest.mark.parametrize(("heads", "n", "splits"), [(5, 40, 1), (128, 33, 2)])
def test_mla_reads_values_out_of_the_key(heads, n, splits):
    q, k, _ = inputs(1, heads, 1, n, 576, HALF)
    out, lse = decode(q, k, None, splits=splits)
    assert out.shape == (1, heads, 1, 512)
    holds(out, lse, q, k, k[..., :512])


@pytest.mark.parametrize("kernel", ["per head", "packed"])
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_of_different_lengths(kernel, splits):
    q, k, v = inputs(4, 4, 2, 100, 64, HALF)
    lengths = torch.tensor([0, 1, 64, 100], dtype=torch.int32)
    out, lse = decode(q, k, v, kernel=kernel, lengths=lengths, splits=splits)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    for b, n in enumerate(lengths.tolist()):
        if n:
            one = slice(b, b + 1)
            holds(out[one], lse[one], q[one], k[one, :, :n], v[one, :, :n])
    # What lies behind a sequence's end is never looked at.
    k[1, :, 1:], v[1, :, 1:] = torch.nan, torch.nan
    assert torch.equal(decode(q, k, v, kernel=kernel, lengths=lengths, splits=splits)[0][1], out[1])


@pytest.mark.parametrize("kernel", ["per head", "packed"])
def test_nothing_to_attend_to(kernel):
    q, k, v = inputs(2, 4, 2, 0, 64, HALF)
    out, lse = decode(q, k, v, kernel=kernel)
    assert torch.equal(out, torch.zeros_like(q))
    assert (lse == -torch.inf).all()
    out, lse = decode(q[:0], k[:0], v[:0], kernel=kernel)
    assert (out.shape, lse.shape) == ((0, 4, 1, 64), (0, 4, 1))


@pytest.mark.parametrize("kernel", ["per head", "packed"])
def test_views_are_read_where_they_lie_and_scale_counts(kernel):
    q, k, v = inputs(2, 4, 2, 50, 64, HALF)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))  # [batch, n, kv_heads, d] in memory
    assert not k.is_contiguous()
    holds(*decode(q, k, v, kernel=kernel, scale=0.4), q, k, v, scale=0.4)
    columns = [t.mT.contiguous().mT for t in (q, k, v)]  # rows that are not contiguous are copied
    assert torch.equal(decode(*columns, kernel=kernel)[0], decode(q, k, v, kernel=kernel)[0])


@pytest.mark.parametrize("kernel", ["per head", "packed"])
def test_large_scores_neither_overflow_nor_lose_the_sum(kernel):
    q, k, v = inputs(1, 2, 1, 80, 64, BRAIN)
    out, lse = decode(q * 100, k * 100, v, kernel=kernel, splits=2)
    assert (out.double() - sdpa((q * 100).double(), (k * 100).double(), v.double())).abs().max() < 0.03
    torch.testing.assert_close(lse.double(), logsumexp((q * 100).double(), (k * 100).double()), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (1, 3), (16, 2)])
def test_the_launch_that_is_replayed_is_the_launch_that_runs(rows, splits):
    """`cache.launch` lists programs and their tiles as the kernels' `place` and `share` do."""

    @triton.jit
    def note(out_ptr, units, blocks, splits, n, BN: tl.constexpr):
        which, block, split = place(tl.program_id(0), units, blocks)
        start, end = share(split, splits, n, BN)
        out = out_ptr + 4 * tl.program_id(0)
        tl.store(out, which)
        tl.store(out + 1, block)
        tl.store(out + 2, start)
        tl.store(out + 3, end)

    kv_heads, group, tiles = 3, 20, 7
    blocks = -(-group // rows)
    programs = launch(kv_heads, group, tiles, rows, splits)
    out = torch.empty(len(programs), 4, dtype=torch.int64)
    note[(len(programs),)](out, kv_heads * blocks, blocks, splits, 16 * tiles - 5, BN=16)
    for program, (which, block, start, end) in zip(programs, out.tolist(), strict=True):
        assert program.kv == which
        assert program.heads[0] == which * group + block * rows
        assert [tile.number for tile in program.reads] == list(range(start // 16, -(-end // 16)))


def test_shares_and_tiles():
    assert [splits_for(units, n, 64, 132) for units, n in ((8, 32_768), (264, 4096), (1000, 64), (1, 64), (4, 0))] == [
        33, 1, 1, 1, 1
    ]
    assert [rows_for(g) for g in (1, 8, 16, 17, 33, 128)] == [16, 16, 16, 32, 64, 64]
    assert tiles_for("per head", 128, 8, 90).rows == 1
    assert [tiles_for("packed", 576, 128, sm).rows for sm in (75, 80, 89, 90, 100, 120)] == [8, 32, 16, 32, 64, 16]
    for arguments, message in (
        (("nothing", 64, 1, 90), "no kernel is called 'nothing'"), (("packed", 96, 1, 90), "64, 128, 576 wide, not 96"),
        (("per head", 576, 1, 90), "'per head' kernel takes keys 64, 128 wide, not 576"),
    ):
        with pytest.raises(ValueError, match=message):
            tiles_for(*arguments)


LENGTHS = torch.tensor([3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda q, k, v: (q[0], k, v), {}, r"q must be \[batch, heads, 1, d\].*got q \[4, 1, 64\]"),
        (lambda q, k, v: (q.repeat(1, 1, 2, 1), k, v), {}, r"q must be \[batch, heads, 1, d\]"),
        (lambda q, k, v: (q, k, v[:, :, :4]), {}, r"k, v one \[batch, kv_heads, n, d\]"),
        (lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), {}, "agree in batch and head dimension"),
        (lambda q, k, v: (q[..., :32], k, v), {}, "agree in batch and head dimension"),
        (lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]), {}, "64, 128, 576 wide, not 32"),
        (lambda q, k, v: (q, k, None), {}, r"left out if and only if k is 576 wide \(MLA\)"),
        (lambda q, k, v: (q[:, :3], k, v), {}, "2 do not divide 3"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, "0 do not divide 4"),
        (lambda q, k, v: (q, k, v.bfloat16()), {}, "share one of float16, bfloat16, not float16, float16, bfloat16"),
        (lambda q, k, v: (q.float(), k.float(), v.float()), {}, "share one of float16, bfloat16, not float32"),
        (lambda q, k, v: (q, k, v), {"kernel": "fast"}, "no kernel is called 'fast'"),
        (lambda q, k, v: (q, k, v), {"splits": 0}, "splits must be 1 or more, not 0"),
        (lambda q, k, v: (q, k, v), {"lengths": LENGTHS.long()}, r"torch.int32 \[1\], one per.* not torch.int64"),
        (lambda q, k, v: (q, k, v), {"lengths": LENGTHS.repeat(2)}, r"not torch.int32 \[2\]"),
        (lambda q, k, v: (q, k, v), {"lengths": LENGTHS + 5}, r"from 0 to 5, the keys there are, but are \[8\]"),
        (lambda q, k, v: (q, k, v), {"lengths": LENGTHS - 4}, r"from 0 to 5.*\[-1\]"),
        (lambda q, k, v: (q.to("meta"), k, v), {}, "kernels run on cpu here"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change, options, message):
    q, k, v = inputs(1, 4, 2, 5, 64, HALF)
    with pytest.raises(ValueError, match=message):
        decode(*change(q, k, v), **options)


def test_bf16_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda: 75)
    with pytest.raises(ValueError, match="sm_75 has no bf16"):
        decode(*inputs(1, 1, 1, 5, 64, BRAIN))
