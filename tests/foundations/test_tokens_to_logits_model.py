"""The Llama-style model and its loss against Hugging Face and PyTorch; the closed forms against the count."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llmbook.foundations.tokens_to_logits.flop import block_flop, forward_flop
from llmbook.foundations.tokens_to_logits.llama import PUBLISHED, Config, Llama, every_tensor, fused
from llmbook.foundations.tokens_to_logits.loss import cross_entropy, next_token_loss, shifted
from llmbook.foundations.tokens_to_logits.tracer import Tracer

SMALL = Config(23, 24, 2, 6, 2, 40, 500_000.0, 1e-6)


def hugging_face(c):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, rms_norm_eps=c.eps, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta},
    ))


def pair(c, attend, seed=0):
    """Ours and theirs in float64 with the same weights. Theirs normalises in float32 whatever the dtype: not here."""
    torch.manual_seed(seed)
    theirs, ours = hugging_face(c).double(), Llama(c, attend).double()
    ours.load_state_dict(theirs.state_dict())
    for module in [theirs.model, *theirs.model.layers]:
        for name, child in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(c.dim, c.eps, dtype=torch.float64)
                exact.weight = child.weight
                setattr(module, name, exact)
    return ours, theirs


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.sampled_from([every_tensor, fused]), st.integers(0, 99))
def test_logits_loss_and_gradients_equal_hugging_faces(B, S, attend, seed):
    ours, theirs = pair(SMALL, attend, seed)
    ids = torch.randint(SMALL.vocab, (B, S + 1))
    logits, wanted = ours(ids), theirs(ids).logits
    torch.testing.assert_close(logits, wanted, atol=1e-12, rtol=0)
    loss = next_token_loss(logits, ids)
    # Theirs, given labels, computes the loss in float32: so its own shift is checked to float32.
    torch.testing.assert_close(loss, theirs(ids, labels=ids).loss.double(), atol=1e-6, rtol=1e-6)
    wanted_loss = F.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted_loss, atol=1e-12, rtol=0)
    loss.backward()
    wanted_loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-10, msg=name)


def test_an_untouched_hugging_face_model_agrees_in_its_own_precision():
    torch.manual_seed(0)
    theirs, ours = hugging_face(SMALL), Llama(SMALL)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(SMALL.vocab, (2, 9))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("attend", "theirs_is"), [(every_tensor, "eager"), (fused, "sdpa")])
@pytest.mark.parametrize("kv", [1, 2, 6])
def test_the_log_equals_that_of_hugging_faces_model(attend, theirs_is, kv):
    c = Config(23, 24, 2, 6, kv, 40)
    ours, theirs = pair(c, attend)
    theirs.set_attn_implementation(theirs_is)
    ids, logs = torch.zeros(2, 5, dtype=torch.int64), []
    for model in (ours, theirs):
        with Tracer(model) as log:
            model(ids)
        logs.append(log)
    one, other = ({(call.module, call.outputs) for call in log.calls if call.module.endswith(
        ("proj", "embed_tokens", "lm_head", "layernorm", "norm", "act_fn", "mlp", "0", "1")
    )} for log in logs)
    assert one == other
    assert len(one) == 2 * 12 + 3
    # Some versions of transformers turn RoPE's angles by a product, which is not the model's work.
    theirs_flop = sum(op.flop for op in logs[1].ops if "rotary" not in op.module)
    assert logs[0].flop == theirs_flop == sum(forward_flop(c, 2, 5).values())


def test_padding_on_the_right_changes_no_real_token():
    ours, _ = pair(SMALL, every_tensor)
    ids = torch.randint(SMALL.vocab, (1, 7))
    padded = F.pad(ids, (0, 4), value=0)
    torch.testing.assert_close(ours(padded)[:, :7], ours(ids), atol=1e-12, rtol=0)
    labels = F.pad(ids, (0, 4), value=-100)
    torch.testing.assert_close(next_token_loss(ours(padded), labels), next_token_loss(ours(ids), ids))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99), st.sampled_from([-100, 3, -1]))
def test_cross_entropy_equals_pytorchs_with_its_gradient(N, V, share, seed, ignore):
    chosen = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(N, V, generator=chosen, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(V, (N,), generator=chosen)
    targets[torch.rand(N, generator=chosen) < share] = ignore
    ours, wanted = cross_entropy(logits, targets, ignore), F.cross_entropy(logits, targets, ignore_index=ignore)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12, equal_nan=True)
    if not wanted.isnan():
        both = [torch.autograd.grad(loss, logits)[0] for loss in (ours, wanted)]
        torch.testing.assert_close(*both, atol=1e-12, rtol=1e-12)


def test_cross_entropy_by_finite_differences_and_with_huge_logits():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), logits)
    assert cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1])) == 2e4


def test_labels_move_by_one():
    assert shifted(torch.tensor([[5, 6, 7], [8, 9, -100]])).tolist() == [[6, 7, -100], [9, -100, -100]]
    assert shifted(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert next_token_loss(torch.zeros(2, 1, 9), torch.zeros(2, 1, dtype=torch.int64)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_keeps_its_dtype(dtype):
    model = Llama(SMALL).to(dtype)
    with Tracer(model) as log:
        logits = model(torch.zeros(1, 4, dtype=torch.int64))
    assert logits.dtype == dtype
    assert {call.outputs[0].dtype for call in log.calls} == {dtype}


# ---- what it costs


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (3, 3)]))
def test_the_closed_forms_equal_the_count(B, S, layers, heads):
    c = Config(11, 24, layers, *heads, 17)
    model = Llama(c)
    with Tracer(model) as log:
        model(torch.zeros(B, S, dtype=torch.int64))
    assert log.flop == sum(forward_flop(c, B, S).values())
    first = sum(op.flop for op in log.ops if op.module.startswith("model.layers.0"))
    assert first == sum(block_flop(c, B, S).values())


def test_training_costs_three_times_the_forward_pass():
    model, ids = Llama(SMALL), torch.zeros(2, 7, dtype=torch.int64)
    with Tracer(model) as log:
        next_token_loss(model(ids), ids).backward()
    assert log.flop == 3 * sum(forward_flop(SMALL, 2, 7).values())


@pytest.mark.parametrize(("name", "billions"), [
    ("Llama-2-7B", 6.738415616), ("Llama-3-8B", 8.030261248), ("Llama-3-70B", 70.553706496),
    ("Llama-3.1-405B", 405.853388800),
])
def test_published_sizes_give_the_published_parameter_counts(name, billions):
    with torch.device("meta"):
        model = Llama(PUBLISHED[name])
    assert sum(p.numel() for p in model.parameters()) == round(billions * 1e9)


# ---- bad input


@pytest.mark.parametrize(("ids", "words"), [
    (torch.tensor([[0, 23]]), r"token id 23 is not in \[0, 23\)"),
    (torch.tensor([[0, -1]]), r"token id -1 is not in \[0, 23\)"),
    (torch.tensor([0, 1]), r"shape \[B, S\], but these are torch.int64 of shape \[2\]"),
    (torch.tensor([[0.0, 1.0]]), "whole numbers .* these are torch.float32"),
])
def test_bad_ids(ids, words):
    with pytest.raises(ValueError, match=words):
        Llama(SMALL)(ids)


@pytest.mark.parametrize(("logits", "labels", "words"), [
    ((2, 3, 5), (2, 4), r"need labels \[B, S\], but these are \[2, 3, 5\] and \[2, 4\]"),
    ((6, 5), (6,), r"logits \[B, S, V\] need labels"),
])
def test_shapes_that_do_not_match(logits, labels, words):
    with pytest.raises(ValueError, match=words):
        next_token_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need targets \[N\], but these are \[3, 5\] and \[4\]"):
        cross_entropy(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("label", [5, -1, 10**9])
def test_a_label_out_of_range(label):
    labels = torch.tensor([[0, 1, label, 2]])
    with pytest.raises(ValueError, match=rf"label {label} is neither in \[0, 5\) nor the ignored -100"):
        next_token_loss(torch.zeros(1, 4, 5), labels)


def test_another_reason_to_fail_is_not_called_a_label_out_of_range():
    with pytest.raises(RuntimeError, match="int64"):
        cross_entropy(torch.zeros(3, 5), torch.zeros(3))


@pytest.mark.parametrize(("sizes", "words"), [
    ((9, 12, 1, 4, 2, 8), "4 heads share a width of 12: .* multiple of 8"),
    ((9, 16, 1, 4, 3, 8), "4 query heads cannot share 3 key and value heads"),
])
def test_sizes_that_do_not_divide(sizes, words):
    with pytest.raises(ValueError, match=words):
        Config(*sizes)
