"""The kernels in Triton's interpreter, against float64, by FlashAttention's own rule; and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from llmbook.gpu.flash_attention_2 import attention, schedule
from llmbook.gpu.flash_attention_2.attention import flash_attention_2
from llmbook.gpu.flash_attention_2.kernel import tile_of
from llmbook.gpu.flash_attention_2.tiles import TABLE, Tiles, padded, tiles_for
from llmbook.kit import ahead, kernels
from llmbook.kit.kernels import tl, triton

HALF, BRAIN = torch.float16, torch.bfloat16


def exact(q, k, v, causal, scale=None):
    """Attention and logsumexp as formulas, in the inputs' dtype; bottom-right causal; blind rows are zero."""
    group, (n_q, n_k) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool).triu(1 + n_k - n_q), -torch.inf)
    lse = s.logsumexp(-1)
    return s.softmax(-1).nan_to_num(0.0) @ v, lse


def inputs(batch, heads, kv_heads, n_q, n_k, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n_q, d), (batch, kv_heads, n_k, d), (batch, kv_heads, n_k, d))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(outputs, tensors, do, dlse):
    o, lse = outputs
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.autograd.grad([o, lse], tensors, [do.to(o.dtype), dlse.to(lse.dtype)])


def holds(ours, same_dtype, reference, times):
    """FlashAttention's rule: no further from float64 than `times` plain PyTorch in this dtype, plus rounding."""
    off = (ours.double() - reference).abs().max().item()
    floor = torch.finfo(ours.dtype).eps * max(reference.abs().max().item(), 1e-3)
    assert off <= times * (same_dtype.double() - reference).abs().max().item() + floor
    assert not ours.isnan().any()


CASES = [
    # batch, heads, kv_heads, n_q, n_k, d, dtype, causal
    (1, 1, 1, 128, 128, 64, HALF, False),
    (1, 2, 2, 128, 128, 64, BRAIN, True),
    (2, 4, 2, 65, 65, 32, HALF, True),
    (1, 4, 1, 70, 150, 64, HALF, True),  # more keys than queries
    (1, 2, 1, 150, 70, 64, BRAIN, True),  # more queries than keys: the first 80 see nothing
    (1, 1, 1, 1, 200, 128, HALF, True),  # decoding
    (1, 1, 1, 130, 1, 64, HALF, False),
    (1, 3, 3, 33, 47, 40, BRAIN, False),  # a head dimension that is no power of two
    (1, 1, 1, 40, 100, 96, HALF, True),
    (1, 1, 1, 66, 66, 128, BRAIN, True),
    (1, 1, 1, 70, 40, 256, HALF, False),
    (1, 1, 1, 1, 1, 16, HALF, True),
]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "n_q", "n_k", "d", "dtype", "causal"), CASES)
def test_forward_and_backward_by_flash_attentions_rule(batch, heads, kv_heads, n_q, n_k, d, dtype, causal):
    tensors = inputs(batch, heads, kv_heads, n_q, n_k, d, dtype)
    do, dlse = torch.randn(batch, heads, n_q, d).to(dtype), torch.randn(batch, heads, n_q)
    runs = []
    for function, dt in ((flash_attention_2, dtype), (exact, dtype), (exact, torch.float64)):
        mine = [t.detach().to(dt).requires_grad_() for t in tensors]
        out = function(*mine, causal=causal)
        blind = out[1] == -torch.inf
        runs.append([*out, *gradients(out, mine, do, dlse.masked_fill(blind, 0.0))])
    (o, lse, *grads), (o_same, _, *g_same), (o_ref, lse_ref, *g_ref) = runs
    holds(o, o_same, o_ref, 2)
    torch.testing.assert_close(lse.double(), lse_ref, atol=2e-3, rtol=1e-3)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    for ours, same, reference in zip(grads, g_same, g_ref, strict=True):
        holds(ours, same.nan_to_num(0.0), reference.nan_to_num(0.0), 3)


@pytest.mark.parametrize(("n_q", "n_k", "d", "causal"), [(70, 150, 64, True), (150, 70, 32, True), (40, 33, 96, False)])
@pytest.mark.parametrize("split", [False, True])
def test_descriptors_and_pointers_give_the_same(n_q, n_k, d, causal, split):
    q, k, v = inputs(2, 2, 1, n_q, n_k, d, HALF)
    tiles = Tiles(64, 32, 4, 1, split)
    with torch.no_grad():
        by_pointer = attention.forward(q, k, v, causal, 0.1, kind="forward", tiles=tiles)
        by_descriptor = attention.forward(q, k, v, causal, 0.1, kind="tma", tiles=tiles)
    for one, other in zip(by_pointer, by_descriptor, strict=True):
        assert torch.equal(one, other)


def test_views_are_read_where_they_lie():
    """[batch, N, heads, d] transposed, a slice of packed QKV, an expanded batch: the same as contiguous copies."""
    packed = torch.randn(2, 40, 3, 2, 32).half()
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    assert not q.is_contiguous()
    expanded = torch.randn(1, 2, 40, 32).half().expand(2, -1, -1, -1)
    for tensors in ((q, k, v), (q, expanded, expanded), (q.mT.contiguous().mT, k, v)):
        copies = [t.contiguous() for t in tensors]
        assert torch.equal(flash_attention_2(*tensors, causal=True)[0], flash_attention_2(*copies, causal=True)[0])


def test_a_gradient_that_is_a_view_is_read_where_it_lies():
    q, k, v = inputs(1, 2, 2, 33, 33, 32, HALF)
    dq, = torch.autograd.grad(flash_attention_2(q, k, v)[0].sum(), q)  # an expanded gradient, stride 0
    other, = torch.autograd.grad(exact(q, k, v, False)[0].sum(), q)
    torch.testing.assert_close(dq, other, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_to_attend_to(batch, n_q, n_k):
    q, k, v = inputs(batch, 2, 1, n_q, n_k, 32, HALF)
    o, lse = flash_attention_2(q, k, v)
    assert o.shape == q.shape
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    o.sum().backward()
    assert all(not t.grad.any() for t in (q, k, v))


def test_large_scores_neither_overflow_nor_lose_the_sum():
    q, k, v = (t.detach() for t in inputs(1, 1, 1, 40, 40, 64, BRAIN))
    out, lse = flash_attention_2(q * 100, k * 100, v)
    wanted, wanted_lse = exact(*(t.double() for t in (q * 100, k * 100, v)), False)
    assert (out.double() - wanted).abs().max() < 0.03
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-3, atol=0)


def test_scale_and_gqa_agree_with_sdpa():
    q, k, v = (t.detach() for t in inputs(1, 8, 2, 50, 50, 64, HALF))
    ours, _ = flash_attention_2(q, k, v, causal=True, scale=0.3)
    theirs = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=0.3, enable_gqa=True
    )
    assert (ours.double() - theirs).abs().max() < 3e-3


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # raised within Dynamo
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_it_whole(dynamic):
    def loss(q, k, v):
        return flash_attention_2(q * 2, k, v, causal=True)[0].float().square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (40, 33):
        tensors = inputs(1, 2, 2, n, n, 32, HALF)
        found = [torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss)]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[batch, heads, N_q, d\].*got q \[2, 5, 32\]"),
        (lambda q, k, v: (q, k, v[:, :, :4]), r"k, v one \[batch, kv_heads, N_k, d\]"),
        (lambda q, k, v: (q, k[..., :16], v[..., :16]), "agree in batch and head dimension"),
        (lambda q, k, v: (q[:, :, :, :8], k[..., :8], v[..., :8]), "head dimension 8 is not supported"),
        (lambda q, k, v: (q.repeat(1, 2, 1, 1)[:, :3], k, v), "2 do not divide 3"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "0 do not divide 2"),
        (lambda q, k, v: (q, k, v.bfloat16()), "share one of float16, bfloat16, not float16, float16, bfloat16"),
        (lambda q, k, v: (q.float(), k.float(), v.float()), "share one of float16, bfloat16, not float32"),
        (lambda q, k, v: (q.to("meta"), k, v), "kernels run on cpu here"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change, message):
    tensors = [torch.randn(1, 2, 5, 32).half() for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        flash_attention_2(*change(*tensors))


def test_bf16_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda: 75)
    tensors = [torch.randn(1, 1, 5, 32).bfloat16() for _ in range(3)]
    with pytest.raises(ValueError, match="sm_75 has no bf16"):
        flash_attention_2(*tensors)


@pytest.mark.parametrize("causal", [False, True])
def test_the_launch_that_is_simulated_is_the_launch_that_runs(causal):
    """`schedule.launch_flash_2` lists the tiles in the order in which `tile_of` gives them to programs."""

    @triton.jit
    def note(out_ptr, blocks, CAUSAL: tl.constexpr):
        which, block = tile_of(tl.program_id(0), blocks, CAUSAL)
        tl.store(out_ptr + 2 * tl.program_id(0), which)
        tl.store(out_ptr + 2 * tl.program_id(0) + 1, block.to(tl.int64))

    launch = schedule.launch_flash_2(3, 100, 16, 16, causal)
    out = torch.empty(len(launch), 2, dtype=torch.int64)
    note[(len(launch),)](out, 7, CAUSAL=causal)
    assert [tuple(row) for row in out.tolist()] == [(tile.head, tile.block) for tile in launch]


def test_every_tile_of_the_table_is_found_and_fits_the_dot():
    for kind, generations in TABLE.items():
        for sm, row in generations.items():
            assert [tiles_for(kind, d, sm) for d in (16, 64, 65, 128, 129, 256)] == [row[i] for i in (0, 0, 1, 1, 2, 2)]
            assert all(min(tiles.BM, tiles.BN) >= 16 for tiles in row)
    assert [padded(d) for d in (16, 17, 40, 64, 96, 129)] == [16, 32, 64, 64, 128, 256]
    for arguments, message in (
        (("nothing", 64, 90), "no kernel is called 'nothing'"),
        (("tma", 64, 120), "for sm_90 and sm_100, and none that fits sm_120"),
        (("forward", 257, 90), "head dimension 257"), (("forward", 8, 90), "head dimension 8"),
    ):
        with pytest.raises(ValueError, match=message):
            tiles_for(*arguments)


@pytest.mark.slow
def test_hopper_gets_its_own_instructions():
    module = "llmbook.gpu.flash_attention_2.kernel_tma"
    hopper, blackwell, asked = ahead.report(f"{module}:0", f"{module}:4")
    assert (hopper["tensor_core"], hopper["copy"]) == ("wgmma.mma_async", "cp.async.bulk.tensor")
    # `warp_specialize` says nothing to Triton's Hopper backend: the same kernel comes out, asked or not.
    assert (hopper["constants"]["SPLIT"], asked["constants"]["SPLIT"]) == (False, True)
    assert [hopper[key] for key in ("warps", "registers", "shared")] == [
        asked[key] for key in ("warps", "registers", "shared")
    ]
    assert blackwell["warps"] > 8  # on Blackwell, warps of their own for the loads and the products
