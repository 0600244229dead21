"""FLOPs against torch.utils.flop_counter, bytes against closed forms, roofs against published numbers."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmbook.foundations.tokens_to_logits.flop import block_flop
from llmbook.foundations.tokens_to_logits.llama import PUBLISHED
from llmbook.gpu.roofline import benchmark, errors
from llmbook.gpu.roofline.chains import CHAINS, counted, partly_fused
from llmbook.gpu.roofline.counting import Cost, count, elements
from llmbook.gpu.roofline.gemm import Gemm, batch_at_ridge, quantised, read_back, tiles, waves
from llmbook.gpu.roofline.layer import KERNELS, cache_gb, kernels, layer, together, total
from llmbook.gpu.roofline.roofs import L2_READ, attainable, dtypes, mac_array, peak, predict, ridge
from llmbook.kit.hardware import GPUS
from llmbook.kit.measure import Work, record

size = st.integers(1, 7)
HALF = torch.float16


def meta(*shape, dtype=HALF):
    return torch.empty(*shape, dtype=dtype, device="meta")


# --- FLOPs


CALLS = {
    "mm": lambda m, n, k, dev: (torch.mm, torch.ones(m, k, device=dev), torch.ones(k, n, device=dev)),
    "linear": lambda m, n, k, dev: (
        F.linear, torch.ones(2, m, k, device=dev), torch.ones(n, k, device=dev), torch.ones(n, device=dev)),
    "bmm": lambda m, n, k, dev: (torch.matmul, torch.ones(3, m, k, device=dev), torch.ones(3, k, n, device=dev)),
    "broadcast": lambda m, n, k, dev: (torch.matmul, torch.ones(3, m, k, device=dev), torch.ones(k, n, device=dev)),
    "einsum": lambda m, n, k, dev: (
        lambda a, b: torch.einsum("bmk,bkn->nm", a, b), torch.ones(2, m, k, device=dev), torch.ones(2, k, n, device=dev)
    ),
    "sdpa": lambda m, n, k, dev: (
        F.scaled_dot_product_attention, torch.ones(1, 2, m, k, device=dev), *torch.ones(2, 1, 2, n, k, device=dev)),
    "conv": lambda m, n, k, dev: (F.conv1d, torch.ones(2, m, 9, device=dev), torch.ones(n, m, 3, device=dev)),
    "mlp": lambda m, n, k, dev: (
        torch.nn.Sequential(torch.nn.Linear(k, n), torch.nn.GELU(), torch.nn.Linear(n, k)).to(dev),
        torch.ones(m, k, device=dev)),
}


@given(name=st.sampled_from(sorted(CALLS)), m=size, n=size, k=size, dev=st.sampled_from(["cpu", "meta"]))
def test_products_are_those_of_the_flop_counter(name, m, n, k, dev):
    function, *args = CALLS[name](m, n, k, dev)
    counted_here = count(function, *args).unfused().products
    if name == "sdpa" and dev == "cpu":  # PyTorch's table has no entry for its own attention on a CPU
        assert counted_here == 4 * 2 * m * n * k
        return
    with FlopCounterMode(display=False) as mode:
        function(*args)
    assert counted_here == mode.get_total_flops()


def test_backward_is_counted_too():
    layer_ = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.ones(5, 8, requires_grad=True)

    def step():
        layer_(x).sum().backward()

    here = count(step).unfused().products
    with FlopCounterMode(display=False) as mode:
        step()
    assert here == mode.get_total_flops() == 3 * 2 * 5 * (8 * 16 + 16 * 4)


def test_a_gemv_counts_although_the_flop_counter_has_no_formula():
    w, x = torch.ones(6, 5), torch.ones(5)
    for function, args in ((torch.mv, (w, x)), (torch.matmul, (w, x)), (torch.addmv, (torch.ones(6), w, x))):
        with FlopCounterMode(display=False) as mode:
            function(*args)
        assert mode.get_total_flops() == 0
        assert count(function, *args).unfused().products == 2 * 6 * 5
    assert count(torch.dot, x, x).unfused().products == 10
    assert count(torch.addmv, torch.ones(6), w, x).unfused().others == 6


@pytest.mark.parametrize(("function", "per_element"), [
    (torch.exp, 1), (lambda x: x + 1, 1), (lambda x: x * x, 1), (torch.sqrt, 1), (F.relu, 1), (torch.tanh, 1),
    (lambda x: x > 0, 1), (lambda x: x.sum(1), 1), (lambda x: x.amax(), 1), (lambda x: x.cumsum(1), 1),
    (F.gelu, 5), (lambda x: x.softmax(1), 5), (lambda x: x.clone(), 0), (lambda x: x.double(), 0),
    (lambda x: torch.cat([x, x]), 0), (lambda x: x.T, None), (lambda x: x.masked_fill(x.isnan(), 0.0), 1),
    (lambda x: torch.arange(5) + 1, 0),
])
def test_everything_else_counts_one_per_element(function, per_element):
    x = torch.ones(6, 8)
    if per_element is None:
        with pytest.raises(ValueError, match="nothing was counted"):
            count(function, x)
        return
    cost = count(function, x).unfused()
    assert cost.products == 0
    assert cost.others == per_element * 48


def test_a_kernel_counts_as_its_parts():
    x = meta(64, 128)
    one, parts = count(F.gelu, x).unfused(), counted("GELU", 64, 128).unfused()
    assert one.others == parts.others == 5 * 64 * 128
    assert count(lambda x: x.softmax(1), x).unfused().others == counted("softmax", 64, 128).unfused().others
    with_bias = count(torch.addmm, meta(9), meta(4, 5), meta(5, 9)).unfused()
    assert (with_bias.products, with_bias.others) == (2 * 4 * 5 * 9, 36)


# --- bytes


@given(m=size, n=size, k=size, dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_bytes_of_a_gemm_are_its_three_matrices(m, n, k, dtype):
    cost = count(torch.mm, meta(m, k, dtype=dtype), meta(k, n, dtype=dtype)).unfused()
    assert cost.bytes == (m * k + k * n + m * n) * dtype.itemsize
    assert cost.flop == 2 * m * n * k
    if dtype in (torch.float16, torch.float32):
        g = Gemm(m, n, k, "fp16" if dtype == torch.float16 else "fp32")
        assert (g.flop, g.bytes, g.intensity) == (cost.flop, cost.bytes, cost.intensity)


@given(b=size, m=size, n=size)
def test_a_repeated_or_expanded_input_is_read_once(b, m, n):
    x = torch.ones(m, n)
    assert count(lambda x: x * x, x).unfused().bytes == 8 * m * n
    assert count(lambda x: x + x.view(-1).view(m, n), x).unfused().bytes == 8 * m * n
    assert count(lambda x: x.expand(b, m, n) + 1, x).unfused().bytes == 4 * m * n * (1 + b)
    part = torch.ones(9, m, n)[3]  # of a larger memory
    assert count(lambda: part * part).unfused().bytes == 8 * m * n
    assert count(lambda x: x @ x.T, x).unfused().bytes == 4 * (m * n + m * m)


@given(shape=st.lists(st.integers(0, 5), max_size=4), data=st.data())
def test_elements_of_a_view_are_those_it_shows(shape, data):
    x = torch.arange(max(1, torch.Size(shape).numel())).float()[: torch.Size(shape).numel()].view(shape)
    order = data.draw(st.permutations(range(len(shape))))
    shown = x.permute(order)[tuple(slice(None, None, data.draw(st.integers(1, 3))) for _ in order)]
    shown = shown.expand(2, *shown.shape)
    assert elements(shown)[0] == len(set(shown.flatten().tolist()))


def test_halves_of_one_memory_are_two_inputs_and_overlaps_are_not_more_than_all():
    x = torch.ones(8, 6)
    assert count(lambda x: x[:4] + x[4:], x).unfused().bytes == 4 * (48 + 24)
    assert count(lambda x: x[:6] + x[2:], x).unfused().bytes == 4 * (48 + 36)


def test_a_table_is_read_where_it_is_looked_up():
    table, ids = torch.ones(1000, 16), torch.tensor([3, 3, 7])
    cost = count(F.embedding, ids, table).unfused()
    assert cost.bytes == 3 * 8 + 2 * 3 * 16 * 4
    assert cost.flop == 0
    cache = torch.zeros(1000, 16)
    written = count(lambda c, v: c.index_put_((ids,), v), cache, torch.ones(3, 16)).unfused()
    assert written.bytes == 3 * 8 + 2 * 3 * 16 * 4


def test_in_place_reads_and_writes_and_a_copy_only_writes():
    x, y = torch.ones(10), torch.ones(10)
    assert count(lambda: x.add_(y)).unfused().bytes == 3 * 40
    assert count(lambda: x.copy_(y)).unfused().bytes == 2 * 40
    assert count(lambda: x.zero_()).unfused().bytes == 40
    assert count(lambda: torch.add(x, y, out=torch.empty(10))).unfused().bytes == 3 * 40
    assert count(lambda: torch.empty(10) + 1).unfused().bytes == 80


@given(rows=size, n=st.integers(2, 9))
def test_fused_chains_read_once_and_write_once(rows, n):
    m = 2 * rows * n
    for name in CHAINS:
        whole = counted(name, rows, n)
        assert whole.fused().bytes == 2 * m
        assert whole.fused().flop == whole.unfused().flop
    assert counted("GELU", rows, n).unfused().bytes == 5 * 2 * m + m  # the last product reads two
    assert counted("softmax", rows, n).unfused().bytes == 8 * m + 4 * 2 * rows


@pytest.mark.parametrize("name", CHAINS)
def test_fusing_one_more_operation_never_moves_more(name):
    whole = counted(name)
    moved = [sum(r + w for _, r, w in partly_fused(whole, k)) for k in range(1, len(whole.ops) + 1)]
    assert moved[0] == whole.unfused().bytes
    assert moved[-1] == whole.fused().bytes
    assert moved == sorted(moved, reverse=True)
    for k in (0, len(whole.ops) + 1):
        with pytest.raises(ValueError, match="operations can be fused"):
            partly_fused(whole, k)


def test_a_result_that_is_wanted_outside_is_written():
    x = torch.ones(100)

    def both(x):
        y = x + 1
        return y, y * 2

    assert count(both, x).fused().bytes == 3 * 400
    whole = count(lambda x: (x + 1) * 2, x)
    assert whole.fused(whole.ops[:1]).bytes == 2 * 400
    with pytest.raises(ValueError, match="nothing was counted"):
        whole.fused([])


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match="strided"):
        count(torch.mm, torch.eye(3).to_sparse(), torch.ones(3, 3))


# --- a layer


@pytest.mark.parametrize("model", ["Llama-2-7B", "Llama-3-8B"])
def test_prefill_is_the_closed_form(model):
    c, B, S = PUBLISHED[model], 2, 64
    costs = kernels(layer(model, "prefill", B, S))
    wanted = block_flop(c, B, S)
    assert list(costs) == [name for name, _ in KERNELS]
    assert costs["QKV"].products + costs["output"].products == wanted["Q, K, V, O"]
    assert costs["attention"].products == wanted["scores, values"]
    assert costs["gate, up"].products + costs["down"].products == wanted["feed-forward"]
    q, kv = B * S * c.dim, B * S * c.kv_heads * c.head_dim
    assert costs["attention"].bytes == 2 * (2 * q + 2 * kv)
    assert costs["down"].bytes == 2 * (B * S * (c.ffn + c.dim) + c.ffn * c.dim)


@given(B=st.integers(1, 64), S=st.integers(1, 4096))
def test_decode_reads_the_cache_once_whatever_the_group(B, S):
    c = PUBLISHED["Llama-3-8B"]
    costs = kernels(layer.__wrapped__("Llama-3-8B", "decode", B, S))
    cache, new = 2 * B * S * c.kv_heads * c.head_dim, 2 * B * c.kv_heads * c.head_dim
    assert costs["attention"].bytes == 2 * (cache + 2 * new + 2 * B * c.dim)
    assert costs["attention"].products == 4 * B * S * c.dim
    wide = c.dim + 2 * c.kv_heads * c.head_dim
    assert costs["QKV"].bytes == 2 * (B * c.dim + c.dim * wide + B * wide)
    assert abs(costs["down"].intensity - Gemm(B, c.dim, c.ffn).intensity) < 1e-9


def test_attention_stays_where_it_is_while_the_batch_grows():
    few, many = (kernels(layer("Llama-3-8B", "decode", B, 4096)) for B in (1, 256))
    assert abs(few["attention"].intensity / many["attention"].intensity - 1) < 1e-6
    assert many["QKV"].intensity > 200 * few["QKV"].intensity
    assert sum(len(names) for names, _ in together(many)) == len(KERNELS)
    assert total(many.values()).flop == sum(cost.flop for cost in many.values())
    assert cache_gb("Llama-3-8B", 1, 8192) == pytest.approx(8192 * 131_072 / 1e9)  # 128 KiB a token


@pytest.mark.parametrize(("args", "words"), [
    (("GPT-9", "decode", 1, 1), "no model called"), (("Llama-3-8B", "train", 1, 1), "a phase is"),
    (("Llama-3-8B", "decode", 0, 1), "at least 1"), (("Llama-3-8B", "prefill", 1, -3), "at least 1"),
])
def test_a_layer_that_is_none_is_refused(args, words):
    with pytest.raises(ValueError, match=words):
        layer(*args)


# --- roofs


def test_published_rates_and_ridge_points():
    assert mac_array(256, 256, 700e6) == pytest.approx(92e12, rel=0.005)  # TPU v1
    assert mac_array(256, 4 * 108, 1.41e9) == pytest.approx(312e12, rel=0.001)  # A100: 4 tensor cores per SM
    assert mac_array(64, 108, 1.41e9) == pytest.approx(19.5e12, rel=0.002)  # and its CUDA cores
    wanted = {"T4": 203, "L4": 403, "RTX 4090": 164, "A100-40 SXM": 201, "A100-80 SXM": 153, "H100 SXM": 295}
    assert {name: round(ridge(name)) for name in wanted} == wanted
    for g in GPUS:
        assert ridge(g.name) == g.ridge
    assert peak("H100 SXM", "fp8") == pytest.approx(1979e12, rel=0.001)
    assert peak("L4", "fp8") == pytest.approx(242e12, rel=0.001)
    assert peak("A100-80 SXM", "tf32") == 156e12
    assert peak("RTX 4090", "fp32") == 82.58e12
    assert ridge("A100-80 SXM", "fp16", L2_READ["A100-80 SXM"]) < ridge("A100-80 SXM") / 3
    assert dtypes("T4") == ("fp16", "fp32")


@pytest.mark.parametrize(("call", "words"), [
    (lambda: peak("H100", "fp16"), "no GPU called 'H100' in the table: choose one of T4, L4"),
    (lambda: peak("T4", "bf16"), r"the T4 \(sm_75\) has no bf16 tensor cores: choose one of fp16, fp32"),
    (lambda: peak("A100-80 SXM", "fp8"), "has no fp8 tensor cores"),
    (lambda: peak("H100 SXM", "int3"), "dtype 'int3' has no roof"),
    (lambda: Gemm(0, 1, 1), "M of a GEMM must be a positive whole number, not 0"),
    (lambda: Gemm(1, 1, -4), "K of a GEMM must be"), (lambda: Gemm(1, 1.5, 1), "N of a GEMM must be"),
    (lambda: Gemm(1, 1, 1, "fp4"), "dtype 'fp4' has no size"),
    (lambda: mac_array(0, 4, 1e9), "must be positive"), (lambda: mac_array(4, 4, -1e9), "must be positive"),
    (lambda: quantised(0, 5, 132), "sizes must be positive"), (lambda: total([]), "no cost to add up"),
    (lambda: predict(Cost(1, 0, 1, torch.bfloat16), "T4"), "has no bf16"),
    (lambda: predict(Cost(1, 0, 1, torch.float64), "T4"), "dtype 'float64' has no roof"),
    (lambda: count(lambda: None), "nothing was counted"),
])
def test_bad_input_gets_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(M=st.integers(1, 9000), N=st.integers(1, 9000), K=st.integers(1, 9000), name=st.sampled_from(
    [g.name for g in GPUS]))
def test_the_slower_roof_predicts(M, N, K, name):
    g = Gemm(M, N, K)
    p = predict(Cost(g.flop, 0, g.bytes, HALF), name)
    assert p.time == max(p.products, p.memory)
    assert g.flop / p.time == pytest.approx(attainable(g.intensity, peak(name, "fp16"), g.bytes / p.memory))
    assert (p.binds == "memory") == (g.intensity <= ridge(name))


def test_cuda_cores_may_bind():
    assert predict(Cost(0, 10**15, 1, HALF), "T4").binds == "CUDA cores"
    fp32 = predict(Cost(10**12, 10**12, 1, torch.float32), "T4")
    assert fp32.time == pytest.approx(2e12 / 8.1e12)  # one unit does both


# --- closed forms of a GEMM


@given(N=st.integers(1, 20_000), K=st.integers(1, 20_000), name=st.sampled_from([g.name for g in GPUS]))
def test_the_batch_at_the_ridge_is_the_least(N, K, name):
    M = batch_at_ridge(N, K, name)
    if M is None:
        assert Gemm(10**15, N, K).intensity < ridge(name)
        return
    assert Gemm(M, N, K).intensity >= ridge(name) * (1 - 1e-12)
    assert M == 1 or Gemm(M - 1, N, K).intensity < ridge(name)


def test_the_notes_gemm_is_found_and_is_alone_up_to_names():
    found = list(read_back(15.7, 11.3e-6, 11.4e-6, 1.5e12, ("fp8", "fp16", "fp32"), [2**i for i in range(15)]))
    assert {tuple(sorted((g.M, g.N, g.K))) for g in found} == {(16, 1024, 8192)}
    assert {g.dtype for g in found} == {"fp16"}
    assert Gemm(16, 8192, 1024) in found


@given(M=st.integers(1, 3000), N=st.integers(1, 3000), sms=st.integers(1, 150))
def test_quantisation_is_a_share(M, N, sms):
    share = quantised(M, N, sms)
    assert 0 < share <= 1
    assert waves(M, N, sms) * sms >= tiles(M, N) > (waves(M, N, sms) - 1) * sms
    assert quantised(128 * sms, 128, sms) == 1


def test_a_row_too_many_costs_a_wave():
    # 108 SMs take 12 × 9 tiles in one wave; one row more starts a second for 9 tiles.
    assert quantised(12 * 128, 9 * 128, 108) == 1
    assert waves(12 * 128 + 1, 9 * 128, 108) == 2
    assert quantised(12 * 128 + 1, 9 * 128, 108) < 0.51


@given(M=st.integers(1, 500), N=st.integers(1, 500), K=st.integers(1, 500))
def test_l2_sees_at_least_what_hbm_sees(M, N, K):
    g = Gemm(M, N, K)
    assert g.l2_bytes() >= g.bytes
    assert g.l2_bytes(M, N) == g.bytes


# --- the benchmark and the record


def test_the_benchmarks_cases_are_correct_on_a_cpu():
    cases = list(benchmark.cases(**benchmark.SMALL, dtype=torch.float32))
    assert len(cases) == 8
    copy, gemm = cases[0].make(), cases[3].make()
    assert copy.error(torch.zeros(800)) == (1.0, 0.0)
    assert gemm.error(gemm.run() * 1.01)[0] > gemm.error(gemm.run())[1]


def test_a_product_rounded_to_tf32_is_seen():
    """On CUDA cores the check is in float64, and its bound is far below tf32's rounding of the factors."""
    case = next(c for c in benchmark.cases(batches=(), size=128, copied=8) if c.name == "GEMM, CUDA cores")
    work = case.make()
    rounded = work.run().view(torch.int32).add(2**12).bitwise_and(-(2**13)).view(torch.float32)  # 10 bits of mantissa
    assert work.error(work.run())[0] <= work.error(work.run())[1] < work.error(rounded)[0]


def test_fp32_that_would_be_rounded_is_not_a_cuda_core_roof(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    case = next(c for c in benchmark.cases(batches=(1,), size=8, copied=8) if c.name == "GEMM, CUDA cores")
    with pytest.raises(ValueError, match="rounded to tf32"):
        case.make()


def test_nothing_recorded_says_so(tmp_path, capsys):
    errors.report("gpu/roofline", tmp_path)
    assert "Not measured yet" in capsys.readouterr().out


def test_a_record_is_compared_case_by_case(tmp_path, capsys, monkeypatch):
    """A made-up run: the copy takes 1.25 times, the large GEMM twice, the small one 1.5 times what was predicted."""
    source = {"device": "NVIDIA A100-SXM4-80GB", "capability": "sm_80", "driver": "0", "torch": "0", "triton": "0",
              "date": "2000-01-01", "commit": "0"}
    cases = [
        c for c in benchmark.cases(batches=(16,), size=64, copied=1024, dtype=torch.float32) if c.name != "GELU, fused"
    ]
    slower = iter([1.25, 2.0, 2.0, 1.5, 1.0])
    monkeypatch.setattr("llmbook.kit.measure.provenance", lambda: source)

    def alone(case):
        """The case without peers, and the milliseconds it shall take."""
        ms = 1e3 * next(slower) * max(case.flops / 19.5e12, case.bytes / 2039e9)

        def make():
            work = case.make()
            now.append(ms)
            return Work(work.run, work.error)

        return replace(case, make=make)

    now = []
    path, bad = record("gpu/roofline", [alone(c) for c in cases], folder=tmp_path, timer=lambda call: now[-1])
    assert bad == 0
    rows = errors.compare(json.loads(path.read_text()))
    assert [round(row.ratio, 6) for row in rows] == [1.25, 2, 2, 1.5, 1]
    assert all(row.calibrated <= row.measured * (1 + 1e-9) for row in rows)
    errors.report("gpu/roofline", tmp_path)
    out = capsys.readouterr().out
    assert "NVIDIA A100-SXM4-80GB, 2000-01-01" in out
    assert "measured ÷ predicted 1.50" in out
    assert out.count("µs; measured") == 5


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200 SXM"), ("Tesla T4", "T4"), ("NVIDIA L4", "L4"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA A100-SXM4-40GB", "A100-40 SXM"), ("NVIDIA B200", "B200 HGX"),
])
def test_devices_are_found_in_the_table(device, name):
    assert errors.table_name(device) == name


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA L40", "AMD Instinct MI300X", "NVIDIA L40S"])
def test_a_device_with_other_roofs_is_not_taken_for_one_of_the_table(device):
    with pytest.raises(ValueError, match="not in the table"):
        errors.table_name(device)
