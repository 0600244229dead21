"""The grouped GEMM in Triton's interpreter against float64, beside PyTorch's own error, and the benchmark's cases."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from triton.runtime import interpreter

from llmbook.block.deepseek_moe import benchmark, grouped, kernel, layer
from llmbook.block.deepseek_moe.dispatch import by_slices
from llmbook.block.deepseek_moe.gate import Rule
from llmbook.kit import measure


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(product, x, w, ends, upstream):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    out = product(x, w, ends)
    return (out, *torch.autograd.grad(out, (x, w), upstream))


def laid_out(kind, shape, seed, dtype):
    """The same values with other strides."""
    t = randn(*shape, seed=seed, dtype=dtype)
    if kind == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "sliced":
        return F.pad(t, (3, 2))[..., 3:-2]
    if kind == "every second":
        return F.pad(t[..., None], (0, 1))[..., 0]
    return t


@given(
    st.lists(st.sampled_from([0, 0, 1, 3, 31, 33, 65, 150]), min_size=1, max_size=6),
    st.sampled_from([1, 16, 33, 64]), st.sampled_from([1, 16, 70, 128]), st.sampled_from(grouped.DTYPES),
    st.sampled_from(["plain", "transposed", "sliced", "every second"]),
)
@example([0, 0, 200, 0], 64, 128, torch.float16, "plain")
@example([1] * 6, 128, 64, torch.bfloat16, "transposed")
@example([0, 0], 16, 16, torch.float32, "plain")
@example([3, 200], 0, 4, torch.float32, "plain")
@example([3, 200], 4, 0, torch.float32, "plain")
@settings(max_examples=9, deadline=None)
def test_forward_and_backward_no_worse_than_twice_torchs_error(loads, k, n, dtype, kind):
    ends = torch.tensor(loads).cumsum(0).int()
    x, w = laid_out(kind, (sum(loads), k), 0, dtype), laid_out(kind, (len(loads), k, n), 1, dtype)
    upstream = laid_out(kind, (sum(loads), n), 2, dtype)
    mine = results(grouped.grouped_product, x, w, ends, upstream)
    own = results(by_slices, x, w, ends, upstream)
    exact = results(by_slices, x.double(), w.double(), ends, upstream.double())
    for a, b, c in zip(mine, own, exact, strict=True):
        assert a.dtype == dtype
        assert a.shape == c.shape
        assert measure.relative_error(a, c) <= 2 * measure.relative_error(b, c) + torch.finfo(dtype).eps


def test_every_generations_tiles_give_the_same(monkeypatch):
    loads, dtype = [70, 0, 1, 40], torch.float16
    ends = torch.tensor(loads).cumsum(0).int()
    x, w, g = randn(111, 72, dtype=dtype), randn(4, 72, 136, seed=1, dtype=dtype), randn(111, 136, seed=2, dtype=dtype)
    exact = results(by_slices, x.double(), w.double(), ends, g.double())
    for sm in (75, 90):
        monkeypatch.setattr(grouped, "capability", lambda sm=sm: sm)
        for a, c in zip(results(grouped.grouped_product, x, w, ends, g), exact, strict=True):
            assert measure.relative_error(a, c) < torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nothing_is_written_or_read_across_experts():
    """inf and NaN of one expert's rows stay with it; an expert without rows has a zero gradient."""
    x, w = randn(40, 16, dtype=torch.float32), randn(3, 16, 8, seed=1, dtype=torch.float32)
    x[10:20] = float("inf")
    ends = torch.tensor([10, 20, 40]).int()
    out, dx, dw = results(grouped.grouped_product, x, w, ends, torch.ones(40, 8))
    assert out[:10].isfinite().all()
    assert out[20:].isfinite().all()
    assert not out[10:20].isfinite().any()
    assert dw[0].isfinite().all()
    assert dw[2].isfinite().all()
    assert dx.isfinite().all()
    _, _, dw = results(grouped.grouped_product, x, w, torch.tensor([0, 40, 40]).int(), torch.ones(40, 8))
    assert not dw[0].any()
    assert not dw[2].any()


def test_one_launch_whatever_the_loads(monkeypatch):
    launched = []
    whole = grouped.grouped_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return whole[grid]

    monkeypatch.setattr(grouped, "grouped_kernel", Counted())
    x, w = randn(90, 16, dtype=torch.float32), randn(30, 16, 8, dtype=torch.float32)
    for loads in ([3] * 30, [90] + [0] * 29, [0] * 29 + [90]):
        ends = torch.tensor(loads).cumsum(0).int()
        torch.testing.assert_close(grouped.grouped_product(x, w, ends), by_slices(x, w, ends))
    assert len(launched) == 3
    assert len(set(launched)) == 1, "the grid must not depend on the loads: that would wait for the GPU"


def test_every_row_tile_has_one_program():
    """The mapping of program numbers is a bijection, whatever the sizes."""
    for row_tiles, column_tiles, tall in ((1, 1, 8), (5, 3, 8), (8, 2, 8), (19, 4, 8), (17, 1, 8)):
        seen = set()
        for number in range(row_tiles * column_tiles):
            band = number // (tall * column_tiles)
            high = min(row_tiles - band * tall, tall)
            within = number % (tall * column_tiles)
            seen.add((band * tall + within % high, within // high))
        assert seen == {(r, c) for r in range(row_tiles) for c in range(column_tiles)}


def test_bad_input_is_refused():
    x, w, ends = torch.zeros(4, 3), torch.zeros(2, 3, 5), torch.tensor([1, 4]).int()
    for bad in ((x[0], w, ends), (x, w[0], ends), (x, w[:, :2], ends), (x, w, ends[:1]), (x, w[:0], ends[:0])):
        with pytest.raises(ValueError, match=r"x \[R, K\], w \[E, K, N\] and ends \[E\]"):
            grouped.grouped_product(*bad)
    for bad in ((x.double(), w.double(), ends), (x.half(), w, ends)):
        with pytest.raises(ValueError, match="x, w must share one of float16, bfloat16, float32"):
            grouped.grouped_product(*bad)
    with pytest.raises(ValueError, match="ends must be int32, not int64"):
        grouped.grouped_product(x, w, ends.long())
    with pytest.raises(ValueError, match="32 bits inside an expert"):
        grouped.grouped_product(torch.zeros(4, 2**16), torch.zeros(1).expand(2, 2**16, 2**15), ends)
    for bad in ([1, 5], [1, 3], [3, 2], [-1, 4], [5, 4]):
        with pytest.raises(ValueError, match="ends must ascend from 0 to the 4 rows"):
            grouped.grouped_product(x, w, torch.tensor(bad).int())
    with pytest.raises(ValueError, match="kernels run on cpu"):
        grouped.grouped_product(x, w.to("meta"), ends)


def test_only_the_gradients_asked_for(monkeypatch):
    x, w, ends = randn(4, 3, dtype=torch.float32), randn(2, 3, 5, dtype=torch.float32), torch.tensor([1, 4]).int()
    monkeypatch.setattr(grouped, "_launch_weight", None)
    x.requires_grad_()
    assert torch.autograd.grad(grouped.grouped_product(x, w, ends).sum(), x)[0].shape == x.shape


def test_a_layer_trains_with_the_kernel_as_without():
    torch.manual_seed(0)
    rule = Rule(8, 4, 2, 3)
    ours = layer.DeepSeekMoE(8, 6, rule, product=grouped.grouped_product)
    plain = layer.DeepSeekMoE(8, 6, rule)
    plain.load_state_dict(ours.state_dict())
    x = randn(20, 8, dtype=torch.float32)
    for model in (ours, plain):
        model(x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_tiles_fit_every_generation():
    for sm in (75, 80, 86, 89, 90, 100, 120):
        for name in ("grouped", "weight"):
            for size in (2, 4):
                for rows in (1, 64, 65, 4096):
                    tile, options = kernel.tiles_for(name, size, sm, rows)
                    assert all(v >= 16 and v & (v - 1) == 0 for v in tile.values())
                    assert options["num_warps"] in (4, 8)


def test_the_interpreter_is_what_runs_here():
    assert isinstance(kernel.grouped_kernel, interpreter.InterpretedFunction)


def test_benchmark_cases_say_what_they_count():
    made = list(benchmark.cases(**benchmark.SMALL))
    assert {c.sizes["load"] for c in made} == {"uniform", "skewed"}
    for case in made:
        work = case.make()
        assert {"torch._grouped_mm", "a loop over experts"} == set(work.peers)
        if case.name == "forward":
            assert case.flops == 2 * 32 * 2 * 32 * 16
            assert work.peers["a loop over experts"]().shape == work.run().shape == (64, 16)
        dense = work.yardsticks["one dense GEMM of as many FLOPs"]()
        assert [t.shape for t in dense] == ([(64, 32), (32, 16)] if case.name == "backward" else [(16,)] * 64)


@pytest.mark.parametrize("load", ["uniform", "skewed"])
def test_loads_give_all_rows_away(load):
    ends = benchmark._ends(1000, 7, load, torch.device("cpu"))
    shares = ends.diff(prepend=ends.new_zeros(1))
    assert ends[-1] == 1000
    assert shares.min() > 0
    most = 1000 * benchmark._busiest(7) if load == "skewed" else 1000 / 7
    assert abs(int(shares.max()) - most) <= 1
