"""The tracer against PyTorch's own counter and against modules that do every odd thing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmbook.foundations.tokens_to_logits.llama import Config, Llama, every_tensor, fused
from llmbook.foundations.tokens_to_logits.tracer import Spec, Tracer, tensors

QUICK = settings(max_examples=15, deadline=None)


def run(module, *args, **kwargs):
    with Tracer(module) as log:
        log.result = module(*args, **kwargs)
    return log


def pytorchs(module, *args, backward=False):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = module(*args)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


class Custom(nn.Module):
    """A module whose forward is the given function of (self, x)."""

    def __init__(self, forward, **children):
        super().__init__()
        self.do = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.do(self, x)


# ---- FLOPs


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 4))
    kv = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    dim = 2 * heads * draw(st.integers(1, 4))
    return Config(draw(st.integers(2, 20)), dim, draw(st.integers(1, 3)), heads, kv, draw(st.integers(1, 24)))


@QUICK
@given(configs(), st.integers(1, 3), st.integers(1, 9), st.sampled_from([every_tensor, fused]), st.booleans())
def test_a_llama_costs_what_pytorchs_counter_says(config, B, S, attend, grad):
    model, ids = Llama(config, attend), torch.zeros(B, S, dtype=torch.int64)
    with torch.set_grad_enabled(grad):
        assert run(model, ids).flop == pytorchs(model, ids)


@QUICK
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.booleans(), st.integers(0, 4))
def test_a_perceptron_forward_and_backward(widths, bias, batch):
    layers = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths)]
    model, x = nn.Sequential(*layers, nn.GELU()), torch.randn(batch, 3, widths[0], requires_grad=True)
    with Tracer(model) as log:
        model(x).sum().backward()
    assert log.flop == pytorchs(model, x, backward=True)
    assert log.flop == 3 * run(model, x).flop
    assert {op.module for op in log.ops if op.flop and op.module != "backward"} <= {str(i) for i in range(5)}


@QUICK
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 7), st.booleans(), st.booleans())
def test_an_encoder_layer_in_training_and_on_its_fast_path(heads, B, S, train, norm_first):
    layer = nn.TransformerEncoderLayer(4 * heads, heads, 8, 0.0, batch_first=True, norm_first=norm_first).train(train)
    x = torch.randn(B, S, 4 * heads)
    with torch.inference_mode(not train):
        log = run(layer, x)
        torch.testing.assert_close(log.result, layer(x))
    wanted = pytorchs(layer.train(), x)
    assert log.flop == wanted > 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("make", [
    lambda: (nn.Conv2d(3, 5, 3, padding=1, groups=1), torch.randn(2, 3, 7, 6)),
    lambda: (nn.ConvTranspose1d(2, 3, 4), torch.randn(1, 2, 5)),
    lambda: (nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))),
    lambda: (nn.EmbeddingBag(9, 4), torch.zeros(2, 3, dtype=torch.int64)),
    lambda: (nn.GRUCell(3, 4), torch.randn(2, 3)),
])
def test_other_layers(make):
    layer, x = make()
    args = x if isinstance(x, tuple) else (x,)
    assert run(layer, *args).flop == pytorchs(layer, *args)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("S_k", [1, 6])
def test_pytorchs_attention_on_a_cpu_forward_and_backward(kv, S_k):
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, kv, S_k, 8, requires_grad=True) for _ in "kv")

    def attend(q):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    log = run(Custom(lambda self, x: attend(x)), q)
    assert [op.name for op in log.ops if op.flop] == ["aten._scaled_dot_product_flash_attention_for_cpu"]
    assert log.flop == pytorchs(attend, q) == 4 * 2 * 4 * 6 * S_k * 8
    with FlopCounterMode(display=False) as counter:
        attend(q)
    assert counter.get_total_flops() == 0, "PyTorch has its own formula now: drop ours"
    with Tracer(nn.Module()) as both:
        attend(q).sum().backward()
    # Its backward computes the scores a second time: 5 products where plain autograd has 4.
    assert both.flop == log.flop + log.flop * 5 // 2
    assert pytorchs(attend, q, backward=True) == log.flop + log.flop * 2


# ---- shapes, dtypes, bytes


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8),
])
def test_bytes_follow_the_dtype(dtype, size):
    layer = nn.Linear(3, 5).to(dtype)
    log = run(layer, torch.zeros(2, 4, 3, dtype=dtype))
    (call,) = log.calls
    assert call.inputs == (Spec((2, 4, 3), dtype, 24 * size),)
    assert call.outputs == (Spec((2, 4, 5), dtype, 40 * size),)
    (product,) = (op for op in log.ops if op.flop)
    assert (product.name, product.new, product.flop) == ("aten.addmm", 40 * size, 2 * 8 * 3 * 5)


def test_without_autograd_a_layer_is_the_same_operations():
    layer, x = nn.Linear(3, 5), torch.zeros(2, 4, 3)
    with torch.inference_mode():
        bare = run(layer, x)
    assert [(op.name, op.new) for op in bare.ops] == [(op.name, op.new) for op in run(layer, x).ops]


def test_integers_booleans_and_scalars():
    log = run(Custom(lambda self, x: (x + 1, x > 0, x.sum())), torch.zeros(3, dtype=torch.int64))
    assert [(op.outputs[0].dtype, op.new) for op in log.ops] == [
        (torch.int64, 24), (torch.bool, 3), (torch.int64, 8),
    ]


def test_a_view_describes_bytes_but_takes_none():
    def views(self, x):
        return x.view(6)[1:4], x.expand(5, 2, 3), x.T, x.T.contiguous()

    log = run(Custom(views), torch.ones(2, 3))
    assert [(op.name[5:], op.outputs[0].bytes, op.new, op.view) for op in log.ops if op.name != "aten.unsqueeze"] == [
        ("view", 24, 0, True), ("slice", 12, 0, True), ("expand", 120, 0, True), ("permute", 24, 0, True),
        ("permute", 24, 0, True), ("clone", 24, 24, False),
    ]
    assert log.peak == 24
    assert log.table().count("\n") == 1
    assert log.table(views=True).count("\n") == 6


def test_an_operation_in_place_writes_and_takes_nothing():
    def inside(self, x):
        y = x * 2
        y.add_(1)
        y[0] = 7
        return torch.relu_(y)

    log = run(Custom(inside), torch.ones(4))
    assert [(op.name[5:], op.new, op.writes) for op in log.ops if not op.view or op.writes] == [
        ("mul", 16, False), ("add_", 0, True), ("copy_", 0, True), ("relu_", 0, True),
    ]
    assert "add_" in log.table()
    assert log.peak == 16


def test_memory_that_is_let_go_is_no_longer_held():
    def three(self, x):
        y = x + 1
        z = y * 2
        del y
        return z.exp()

    with torch.no_grad():
        log = run(Custom(three), torch.ones(100))
    assert [op.held for op in log.ops] == [400, 800, 800]
    # Autograd keeps exp's result, and y is not needed: the same with gradients.
    log = run(Custom(three), torch.ones(100, requires_grad=True))
    assert [op.held for op in log.ops if not op.view] == [400, 800, 800]


def test_what_backward_needs_stays_held():
    layers = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(8, 8, bias=False), nn.Tanh())])
    x = torch.ones(10, 8)
    with torch.no_grad():
        free = run(layers, x)
    kept = run(layers, x)
    assert free.peak == 2 * 320
    assert kept.ops[-1].held == (5 + 1) * 320, "each tanh's output waits for backward; and the last one's input"


def test_a_storage_that_grows_or_is_reused_is_counted_once():
    def slices(self, x):
        whole = torch.empty(10)
        whole[:5].copy_(x)
        return whole[5:], whole

    assert run(Custom(slices), torch.ones(5)).peak == 40


def test_tuples_dicts_and_keywords():
    class Odd(nn.Module):
        def forward(self, x, *, more):
            return {"a": x + more["k"], "b": (x, [x * 2, None, 3])}

    log = run(Custom(lambda self, x: self.odd(x, more={"k": x})["b"], odd=Odd()), torch.ones(2, 3))
    outer, inner = log.calls
    assert (inner.module, inner.kind, len(inner.inputs), len(inner.outputs)) == ("odd", "Odd", 2, 3)
    assert len(outer.outputs) == 2
    assert tensors({"n": 1}) == []


def test_the_calls_nest_in_the_order_in_which_they_began():
    model = Llama(Config(7, 8, 2, 2, 1, 12))
    log = run(model, torch.zeros(1, 3, dtype=torch.int64))
    assert [call.module for call in log.calls[:5]] == [
        "Llama", "model", "model.embed_tokens", "model.rotary_emb", "model.layers.0",
    ]
    assert [c.module for c in log.calls if c.kind == "Linear"][:2] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
    ]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_shared_modules_are_named_by_the_parent_that_runs_or_by_all_names():
    one = nn.Linear(3, 3)
    twins = Custom(lambda self, x: self.b(self.a(x)), a=nn.Sequential(one), b=nn.Sequential(one))
    assert [c.module for c in run(twins, torch.ones(1, 3)).calls] == ["Custom", "a", "a.0", "b", "b.0"]
    tied = Custom(lambda self, x: self.b(self.a(x)), a=one, b=one)
    log = run(tied, torch.ones(1, 3))
    assert [c.module for c in log.calls] == ["Custom", "a=b", "a=b"]
    assert [op.module for op in log.ops if op.flop] == ["a=b", "a=b"]
    assert log.flop == 2 * 18


def test_a_module_from_elsewhere_counts_for_the_one_that_runs():
    elsewhere = nn.Linear(3, 3)
    log = run(Custom(lambda self, x: elsewhere(x)), torch.ones(1, 3))
    assert [op.module for op in log.ops if op.flop] == ["Custom"]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("attend", [every_tensor, fused])
def test_an_empty_batch_and_an_empty_sequence(shape, attend):
    log = run(Llama(Config(7, 8, 1, 2, 1, 12), attend), torch.zeros(shape, dtype=torch.int64))
    assert log.calls[0].outputs[0].shape == (*shape, 7)
    assert log.flop == 0
    assert "mm" in log.table()


def test_nothing_ran():
    log = Tracer(nn.Identity())
    with log:
        pass
    assert (log.flop, log.peak, log.ops, log.failure) == (0, 0, [], None)
    assert log.table().split() == ["module", "operation", "output", "dtype", "new", "bytes", "FLOP"]


def test_kept_copies_are_the_tensors_that_ran():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with Tracer(layer, keep=lambda t: t.detach().clone()) as log:
        y = layer(x)
    assert torch.equal(log.ops[-1].kept, y)


def test_on_the_meta_device_only_shapes_are_computed():
    with torch.device("meta"):
        model, ids = Llama(Config(128_256, 4096, 1, 32, 8, 14_336)), torch.zeros(2, 8192, dtype=torch.int64)
    log = run(model, ids)
    assert log.calls[-1].outputs[0] == Spec((2, 8192, 128_256), torch.float32, 2 * 8192 * 128_256 * 4)


# ---- failing half-way


def test_a_shape_that_does_not_match():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(5, 2))), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised, Tracer(model) as log:
        model(x)
    assert [op.name for op in log.ops if not op.view] == ["aten.addmm", "aten.relu"]
    assert (log.failure.module, log.failure.op) == ("2.0", "aten.addmm")
    assert [s.shape for s in log.failure.inputs] == [(2,), (2, 4), (5, 2)]
    assert [(c.module, bool(c.outputs)) for c in log.calls] == [
        ("Sequential", False), ("0", True), ("1", True), ("2", False), ("2.0", False),
    ]
    (note,) = raised.value.__notes__
    for words in ("failed in 2.0, aten.addmm [2] float32, [2, 4] float32, [5, 2] float32", "mat1 and mat2"):
        assert words in note
        assert words in log.table()
    assert log.table().splitlines()[-2:] == [f"✗ {log.failure.place}", f"  {log.failure.error}"]
    assert not model._forward_hooks


def test_python_code_that_raises():
    def refuse(self, x):
        raise KeyError("no such thing")

    model = nn.Sequential(nn.Linear(3, 4), Custom(refuse))
    with pytest.raises(KeyError) as raised, Tracer(model) as log:
        model(torch.ones(2, 3))
    assert (log.failure.module, log.failure.op) == ("1", None)
    assert "failed in 1, its own code, after inputs [2, 4] float32: KeyError" in raised.value.__notes__[0]
    assert log.flop == 2 * 2 * 3 * 4


def test_a_failure_that_the_model_handles_is_none():
    def careful(self, x):
        try:
            return self.bad(x)
        except RuntimeError:
            return self.good(x)

    log = run(Custom(careful, bad=nn.Linear(5, 2), good=nn.Linear(3, 2)), torch.ones(1, 3))
    assert log.failure is None
    assert [op.module for op in log.ops if op.flop] == ["good"]
    assert "✗" not in log.table()


def test_a_translated_error_still_says_where_it_began():
    model = Llama(Config(7, 8, 1, 2, 1, 12))
    with pytest.raises(ValueError, match="token id 7 is not in"), Tracer(model) as log:
        model(torch.tensor([[1, 7]]))
    assert (log.failure.module, log.failure.op) == ("model.embed_tokens", "aten.embedding")


def test_a_trace_while_another_error_is_handled():
    try:
        raise ValueError("before")
    except ValueError:
        log = run(nn.Linear(2, 2), torch.ones(1, 2))
    assert log.failure is None
    assert log.calls[0].outputs


def test_it_can_be_used_again_but_not_inside_itself():
    layer = nn.Linear(2, 2)
    log = Tracer(layer)
    for _ in range(2):
        with log:
            layer(torch.ones(1, 2))
        assert len(log.calls) == 1
    with log, pytest.raises(ValueError, match="already recording"), log:
        pass
    with Tracer(layer) as outer, Tracer(layer) as inner:
        layer(torch.ones(1, 2))
    assert outer.flop == inner.flop == 8
