"""What is masked weighs nothing, whatever it holds; what is seen counts, whatever its score; and any scale will do."""

import pytest
import torch
from torch import tensor

from llmbook.block.attention_and_kv_cache.attention import Attention, attend, softmax_over, visible
from llmbook.block.attention_and_kv_cache.cache import PagedCache, StaticCache
from llmbook.block.attention_and_kv_cache.decode import flash_decode
from llmbook.block.attention_and_kv_cache.heads import Heads
from llmbook.block.mla.attention import LatentAttention, attend_absorbed, attend_rebuilt
from llmbook.block.mla.cache import LatentCache
from llmbook.block.mla.decode import latent_decode
from llmbook.block.mla.sizes import Sizes
from llmbook.gpu.attention_on_the_roofline.decode import decode
from llmbook.gpu.flash_attention_2 import attention as flash_2
from llmbook.gpu.flash_attention_2.tiles import Tiles
from llmbook.gpu.online_softmax.kernel import softmax
from llmbook.gpu.online_softmax.state import absorb as absorb_block
from llmbook.gpu.online_softmax.state import empty, finish

HEADS, SIZES = Heads(16, 4, 2, 4), Sizes(16, 4, 8, 4, 4, 4)
BAD = [torch.nan, torch.inf, -torch.inf]
LOWEST = torch.finfo(torch.float32).min


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def modules():
    """(layer, its caches of batch 2), float64."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    return {
        "static": (Attention(HEADS).double(), lambda: StaticCache(2, 2, 16, 4, **options)),
        "paged": (Attention(HEADS).double(), lambda: PagedCache(2, 2, 8, 2, 4, **options)),
        "latent": (LatentAttention(SIZES).double(), lambda: LatentCache(2, 8, 2, SIZES.row, **options)),
        "latent, in rows": (LatentAttention(SIZES).double(), lambda: LatentCache(2, 2, 16, SIZES.row, **options)),
    }


def forms(kind):
    """What a layer is called with besides: both forms of the latent one."""
    return [{"absorb": True}, {"absorb": False}] if kind.startswith("latent") else [{}]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", modules())
def test_a_neighbours_nan_stays_its_own(kind, bad):
    """The issue's case: the sequence that owns page 0 is ill, and the other's table is shorter."""
    layer, cache_of = modules()[kind]
    x = randn(2, 6, 16)
    ill = x.clone()
    ill[0] = bad
    for options in forms(kind):
        o = layer(ill, cache_of(), tensor([6, 2]), **options)
        right = layer(x, cache_of(), tensor([6, 2]), **options)
        assert o[0].isnan().all()
        assert torch.equal(o[1], right[1])
        assert right[1, :2].all()
        assert not right[1, 2:].any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", modules())
def test_what_padding_holds_reaches_no_output_and_no_gradient(kind, bad):
    layer, cache_of = modules()[kind]
    counts = tensor([6, 2])
    x = randn(2, 6, 16)
    ill = x.clone()
    ill[1, 2:] = bad
    for options in forms(kind):
        for cache in (None, cache_of):
            results = []
            for given in (x, ill):
                given = given.clone().requires_grad_()
                o = layer(given, cache and cache(), counts, **options)
                leaves = (given, *layer.parameters())  # a cache keeps keys without their gradient
                results.append([o, *torch.autograd.grad(o.square().sum(), leaves, materialize_grads=True)])
            for right, ours in zip(*results, strict=True):
                assert torch.equal(right, ours)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", modules())
def test_the_next_owner_of_a_place_does_not_meet_what_was_left(kind, bad):
    layer, cache_of = modules()[kind]
    used, fresh = cache_of(), cache_of()
    x = randn(2, 5, 16)
    with torch.no_grad():
        layer(torch.full((2, 7, 16), bad, dtype=torch.float64), used, tensor([7, 7]))
        for b in (0, 1):
            used.free(b)
        for step, counts in ((5, [5, 2]), (1, [1, 1]), (1, [0, 1])):
            ours = layer(x[:, :step], used, tensor(counts))
            assert torch.equal(ours, layer(x[:, :step], fresh, tensor(counts)))
    for ours, right in zip(read(used), read(fresh), strict=True):
        assert torch.equal(ours, right)  # zeros behind the shorter sequence
        assert not ours[1][..., 4:, :].any()


def read(cache):
    return [cache.read()] if isinstance(cache, LatentCache) else cache.read()


@pytest.mark.parametrize("bad", BAD)
def test_attend_takes_no_notice_of_keys_that_nobody_sees(bad):
    q, k, v = randn(2, 4, 3, 8), randn(2, 2, 7, 8, seed=1), randn(2, 2, 7, 8, seed=2)
    starts, counts = tensor([3, 0]), tensor([3, 1])
    seen = visible(starts, counts, 3, 7)
    ill_k, ill_v = k.clone(), v.clone()
    for b, length in enumerate((starts + counts).tolist()):
        ill_k[b, :, length:] = ill_v[b, :, length:] = bad
    outs = []
    for keys, values in ((k, v), (ill_k, ill_v)):
        given = [t.clone().requires_grad_() for t in (q, keys, values)]
        o = attend(*given, seen)
        outs.append([o, *torch.autograd.grad(o.square().sum(), given)])
    for right, ours in zip(*outs, strict=True):
        assert torch.equal(right, ours)
    up = randn(4, 8, 4, seed=3)
    rows = randn(2, 7, 8, seed=4)
    ill = torch.where((torch.arange(7) >= (starts + counts)[:, None])[..., None], bad, rows)
    for form in (attend_rebuilt, attend_absorbed):
        right, ours = (form(q[..., :4], q[..., 4:], r, up, 0.3, seen) for r in (rows, ill))
        assert torch.equal(right, ours)


def test_the_lowest_visible_score_is_visible_still():
    scores = torch.full((3, 5), torch.finfo(torch.float64).min, dtype=torch.float64)
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1, 2:] = False
    seen[2] = False
    right = tensor([[0.2] * 5, [0.5, 0.5, 0, 0, 0], [0.0] * 5], dtype=torch.float64)
    assert torch.equal(softmax_over(scores, seen), right)
    lowest = torch.full((2, 70), LOWEST)
    assert torch.allclose(softmax(lowest), torch.full((2, 70), 1 / 70))
    state = absorb_block(empty(2, d=3), lowest, torch.ones(70, 3))
    o, lse = finish(state)
    assert torch.allclose(o, torch.ones(2, 3))
    assert (lse > -torch.inf).all()


@pytest.mark.parametrize("bad", BAD)
def test_kernels_read_no_place_that_is_not_the_sequences_own(bad):
    half, single = torch.float16, torch.float32
    lengths = tensor([40, 0, 17], dtype=torch.int32)
    q, k, v = randn(3, 4, 32, dtype=half), randn(3, 2, 64, 32, dtype=half), randn(3, 2, 64, 32, seed=1, dtype=half)
    rows, q_rows = randn(3, 64, 48, dtype=single), randn(3, 4, 48, seed=2, dtype=single)
    wide = [randn(3, heads, n, 64, seed=heads, dtype=half) for heads, n in ((4, 1), (2, 64), (2, 64))]
    outside = torch.arange(64) >= lengths[:, None]
    ill = [t.masked_fill(outside[:, None, :, None], bad) for t in (k, v, *wide[1:])]
    ill_rows = rows.masked_fill(outside[..., None], bad)

    def pages(t, at):  # page 4b + i of the pool holds sequence b's tokens from 16i on
        return t.unflatten(at, (4, 16)).movedim(at, 1).flatten(0, 1)

    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    short = torch.where(table % 4 * 16 < lengths[:, None], table, 0)  # as the caches fill them
    for one, other in (
        (flash_decode(q, k, v, lengths, parts=3), flash_decode(q, *ill[:2], lengths, parts=3)),
        (flash_decode(q, k, v, lengths, parts=2),
         flash_decode(q, *(pages(t, 2) for t in ill[:2]), lengths, table=short, parts=2)),
        (latent_decode(q_rows, rows, lengths, 0.2, latent=32),
         latent_decode(q_rows, ill_rows, lengths, 0.2, latent=32)),
        (latent_decode(q_rows, rows, lengths, 0.2, latent=32),
         latent_decode(q_rows, pages(ill_rows, 1), lengths, 0.2, latent=32, table=short)),
        *((decode(*wide, lengths=lengths, kernel=kernel, splits=2),
           decode(wide[0], *ill[2:], lengths=lengths, kernel=kernel, splits=2)) for kernel in ("per head", "packed")),
    ):
        for right, ours in zip(one, other, strict=True):
            assert torch.equal(right, ours)
            assert not ours.isnan().any()


# --- scales


def exact(q, k, v, scale, causal=False):
    """Attention and logsumexp in float64; a query that sees no key is zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1 + s.shape[-1] - s.shape[-2]), -torch.inf)
    lse = s.logsumexp(-1)
    return (s - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ v, lse


SCALES = [0.0, -1.0, -0.1, 1e-30, 40.0]
TILES = Tiles(32, 16, 4, 1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("n_q", "n_k", "causal"), [(40, 40, True), (33, 50, True), (50, 33, True), (20, 37, False), (32, 32, False)]
)
def test_flash_attention_2_at_any_scale(scale, n_q, n_k, causal):
    given = [randn(1, heads, n, 32, seed=heads + n, dtype=torch.float16).requires_grad_() for heads, n in (
        (4, n_q), (2, n_k), (2, n_k))]
    wide = [t.detach().double().requires_grad_() for t in given]
    o, lse = flash_2.flash_attention_2(*given, causal=causal, scale=scale)
    right, right_lse = exact(*wide, scale, causal)
    do = randn(*o.shape, seed=5)
    with torch.no_grad():
        tma = flash_2.forward(*given, causal, scale, kind="tma", tiles=TILES)
        plain = flash_2.forward(*given, causal, scale, kind="forward", tiles=TILES)
    for ours in ((o, lse), tma, plain):
        torch.testing.assert_close(ours[0].double(), right, atol=4e-3, rtol=4e-3)
        torch.testing.assert_close(ours[1].double(), right_lse, atol=2e-3, rtol=1e-5)
    gradients = torch.autograd.grad(o, given, do.half())
    for ours, theirs in zip(gradients, torch.autograd.grad(right, wide, do), strict=True):
        bound = 0.01 * max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(ours.double(), theirs, atol=bound, rtol=0.02)


@pytest.mark.parametrize("scale", SCALES)
def test_decoding_kernels_at_any_scale(scale):
    lengths = tensor([37, 0, 16], dtype=torch.int32)
    q, k, v = (randn(3, heads, n, 64, seed=heads, dtype=torch.float16) for heads, n in ((4, 1), (2, 40), (2, 40)))
    q_rows, rows = randn(3, 4, 48, dtype=torch.float32), randn(3, 40, 48, seed=1, dtype=torch.float32)
    results = [
        decode(q, k, v, lengths=lengths, scale=scale, splits=2, kernel=kernel) for kernel in ("per head", "packed")
    ]
    latent, latent_lse = latent_decode(q_rows, rows, lengths, scale, latent=32, parts=2)
    for b, n in enumerate(lengths.tolist()):
        right, lse = exact(q[b : b + 1].double(), k[b : b + 1, :, :n].double(), v[b : b + 1, :, :n].double(), scale)
        for o, ours in results:
            torch.testing.assert_close(o[b : b + 1].double(), right, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(ours[b : b + 1].double(), lse, atol=1e-3, rtol=1e-5)
        keys = rows[b : b + 1, None, :n].double()
        right, lse = exact(q_rows[b : b + 1, :, None].double(), keys, keys[..., :32], scale)
        torch.testing.assert_close(latent[b : b + 1, :, None].double(), right, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(latent_lse[b : b + 1, :, None].double(), lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("n", [5, 40])
def test_kernels_count_scores_at_the_lowest_finite_number(n):
    """−3.4e38 in the kernels' unit, log₂ of e^s: seen, and one of n equals."""
    q, k, v = torch.ones(1, 1, 1, 64).half(), -torch.ones(1, 1, n, 64).half(), randn(1, 1, n, 64, dtype=torch.float16)
    scale = 0.999999 * -LOWEST / 64 / 1.4426951
    mean = v.double().mean(2)
    flash = flash_2.forward(q, k, v, False, scale)
    causal = flash_2.forward(q, k, v, True, scale, tiles=TILES)
    rows = torch.cat((v[:, 0].float(), k[:, 0].float()), -1)  # the values weigh nothing in the score
    q_rows, lengths = torch.cat((0 * q, q), -1)[:, :, 0].float(), tensor([n], dtype=torch.int32)
    latent = latent_decode(q_rows, rows, lengths, scale, latent=64)
    decoded = [decode(q, k, v, scale=scale, kernel=kernel) for kernel in ("packed", "per head")]
    for o, lse in (flash, causal, *decoded, latent):
        torch.testing.assert_close(o.double().view(1, 1, 64), mean, atol=1e-3, rtol=1e-3)
        assert (lse < -1e38).all()
        assert (lse > -torch.inf).all()
