"""DeepSeek's router and MoE layer against Hugging Face's, balancing, and dispatch against a loop over experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.block.deepseek_moe import balance, cost, dispatch, lab, layer, training
from llmbook.block.deepseek_moe.gate import V2, V3, Rule, check, route, score, select

from transformers import DeepseekV2Config, DeepseekV3Config  # isort: skip
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf2  # isort: skip
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf3  # isort: skip


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def config(rule, kind=DeepseekV3Config, **more):
    extra = {"norm_topk_prob": rule.normalise}
    if kind is DeepseekV2Config:
        extra = {"topk_method": "group_limited_greedy", "num_attention_heads": 1}
    return kind(
        n_routed_experts=rule.experts, n_group=rule.groups, topk_group=rule.keep, num_experts_per_tok=rule.active,
        routed_scaling_factor=rule.scale, **{"hidden_size": 16, **extra, **more},
    )


@st.composite
def rules(draw, best=2):
    groups, size = draw(st.integers(1, 8)), draw(st.integers(best, 9))
    keep = draw(st.integers(1, groups))
    active = draw(st.integers(1, min(keep * size, 8)))
    return Rule(groups * size, groups, keep, active, draw(st.sampled_from([1.0, 2.5])))


LOGITS = st.sampled_from(["normal", "few values", "all equal", "huge"])


def some_logits(kind, tokens, experts, seed):
    z = randn(tokens, experts, seed=seed)
    return {"normal": z, "few values": (2 * z).round(), "all equal": 0 * z, "huge": 200 * z}[kind]


def identity_router(module, rule):
    """A Hugging Face router whose hidden states are its logits."""
    with torch.no_grad():
        module.weight.copy_(torch.eye(rule.experts))
    return module


@given(rules(), LOGITS, st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 3.0]))
@settings(max_examples=80, deadline=None)
def test_v3_gate_bit_for_bit_hugging_faces(rule, kind, tokens, seed, spread):
    theirs = identity_router(hf3.DeepseekV3TopkRouter(config(rule, hidden_size=rule.experts)), rule)
    logits, bias = some_logits(kind, tokens, rule.experts, seed), spread * randn(rule.experts, seed=seed + 1)
    theirs.e_score_correction_bias.copy_(bias)
    _, weight, expert = theirs(logits)
    ours = route(logits, rule, bias)
    assert torch.equal(ours.expert, expert)
    assert torch.equal(ours.weight, weight.detach())


@given(LOGITS, st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_the_published_v3_sizes(kind, seed):
    full = DeepseekV3Config()
    published = (full.n_routed_experts, full.n_group, full.topk_group, full.num_experts_per_tok)
    assert V3[:5] == (*published, full.routed_scaling_factor)
    theirs = hf3.DeepseekV3TopkRouter(config(V3, hidden_size=64))
    with torch.no_grad():
        theirs.weight.copy_(randn(256, 64, seed=seed))
    theirs.e_score_correction_bias.copy_(0.05 * randn(256, seed=seed + 1))
    hidden = some_logits(kind, 200, 64, seed)
    logits, weight, expert = theirs(hidden)
    ours = route(logits.detach(), V3, theirs.e_score_correction_bias)
    assert torch.equal(ours.expert, expert)
    assert torch.equal(ours.weight, weight.detach())
    torch.testing.assert_close(ours.weight.sum(1), torch.full((200,), 2.5).where(ours.weight.sum(1) > 0, 0))


@given(rules(best=1), LOGITS, st.integers(0, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_v2_gate_is_hugging_faces(rule, kind, tokens, seed):
    rule = rule._replace(score="softmax", best=1, normalise=False)
    theirs = identity_router(hf2.DeepseekV2TopkRouter(config(rule, DeepseekV2Config, hidden_size=rule.experts)), rule)
    logits = some_logits(kind, tokens, rule.experts, seed)
    _, weight, expert = theirs(logits)
    ours = route(logits, rule)
    # Hugging Face masks with 0: an expert of a closed group may tie with one whose softmax underflowed to 0.
    real = weight > 0
    assert torch.equal(ours.weight.sort().values, weight.detach().sort().values)
    if bool(real.all()):
        assert torch.equal(ours.expert, expert)
    assert bool(ours.open.gather(1, ours.expert // (rule.experts // rule.groups)).all())
    assert bool((ours.weight.sum(1) <= rule.scale * (1 + 1e-6)).all())


def slow_choice(biased, rule):
    """The selection for one token in plain Python, without ties."""
    size = rule.experts // rule.groups
    group = [sorted(biased[g * size : (g + 1) * size])[-rule.best :] for g in range(rule.groups)]
    kept = sorted(range(rule.groups), key=lambda g: -sum(group[g]))[: rule.keep]
    inside = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return set(kept), set(sorted(inside, key=lambda e: -biased[e])[: rule.active])


@given(rules(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_selection_against_plain_python(rule, seed):
    choice = randn(5, rule.experts, seed=seed, dtype=torch.float64) - 2
    opened, expert = select(choice, rule)
    for t in range(5):
        kept, chosen = slow_choice(choice[t].tolist(), rule)
        assert set(opened[t].nonzero()[:, 0].tolist()) == kept
        assert set(expert[t].tolist()) == chosen


def test_weights_sum_to_the_scale_and_ignore_the_bias():
    logits = randn(300, 256, dtype=torch.float64).requires_grad_()
    bias = (0.01 * randn(256, seed=1)).requires_grad_()
    with_bias = route(logits, V3, bias)
    torch.testing.assert_close(with_bias.weight.sum(1), torch.full((300,), 2.5, dtype=torch.float64))
    slope = randn(300, 8, seed=2, dtype=torch.float64)
    by_logits, by_bias = torch.autograd.grad((with_bias.weight * slope).sum(), (logits, bias), allow_unused=True)
    assert by_bias is None
    by_hand = logits.sigmoid().gather(1, with_bias.expert)
    by_hand = 2.5 * by_hand / by_hand.sum(1, keepdim=True)
    assert torch.allclose(with_bias.weight, by_hand, rtol=1e-12)
    (wanted,) = torch.autograd.grad((by_hand * slope).sum(), logits)
    assert torch.allclose(by_logits, wanted, rtol=1e-10)
    # The same choice by another bias: the very same gates.
    other = route(logits, V3, bias.detach() + 0.5)
    same = (with_bias.expert.sort().values == other.expert.sort().values).all(1)
    assert bool(same.all())
    torch.testing.assert_close(with_bias.weight.sort().values, other.weight.sort().values)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_gate_gradcheck(name):
    rule = Rule(8, 4, 2, 3, 2.5, name, 2)
    logits = randn(4, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, rule).weight, logits)


def test_zero_in_place_of_minus_infinity_lets_closed_groups_in():
    rule = Rule(8, 2, 1, 2)
    choice = score(randn(50, 8), rule) - 1.5  # every biased score is negative
    _, expert = select(choice, rule)
    groups = choice.view(-1, 2, 4)
    kept = groups.topk(2, -1).values.sum(-1).topk(1).indices
    closed = torch.ones(50, 2, dtype=torch.bool).scatter_(1, kept, False)
    wrong = groups.masked_fill(closed[..., None], 0.0).flatten(1).topk(2).indices
    assert bool((expert // 4 == kept).all())
    assert bool((wrong // 4 != kept).all())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(10, 4, 1, 1), "4 groups do not divide 10 experts"), (Rule(8, 0, 1, 1), "0 groups do not divide"),
        (Rule(8, -2, 1, 1), "do not divide"), (Rule(0, 4, 1, 1), "do not divide"),
        (Rule(8, 4, 5, 2), "keep must be 1 to 4 groups, not 5"), (Rule(8, 4, 0, 2), "keep must be 1 to 4"),
        (Rule(8, 4, 2, 5), "hold 4 experts: active must be 1 to that, not 5"), (Rule(8, 4, 2, 0), "not 0"),
        (Rule(8, 8, 2, 2), "sums its best 2, but a group has 1"), (Rule(8, 4, 2, 2, best=0), "best 0"),
        (Rule(8, 4, 2, 2, score="tanh"), "sigmoid or softmax, not 'tanh'"),
    ],
)
def test_a_rule_that_cannot_choose_is_refused(rule, words):
    for use in (check, lambda r: route(torch.zeros(2, max(r.experts, 1)), r), lambda r: layer.DeepSeekMoE(4, 4, r)):
        with pytest.raises(ValueError, match=words):
            use(rule)


def test_logits_and_bias_that_are_refused():
    rule, logits = Rule(8, 4, 2, 2), randn(5, 8)
    logits[3, 1] = float("nan")
    with pytest.raises(ValueError, match="token 3 has a NaN score"):
        route(logits, rule)
    logits[3, 1] = float("inf")
    assert route(logits, rule).weight.isfinite().all()
    with pytest.raises(ValueError, match="token 3 has a NaN"):
        route(logits, rule._replace(score="softmax"))
    with pytest.raises(ValueError, match=r"logits \[T, 8\], not \[5, 7\]"):
        route(torch.zeros(5, 7), rule)
    with pytest.raises(ValueError, match=r"bias must be \[8\] and finite"):
        route(torch.zeros(5, 8), rule, torch.zeros(7))
    with pytest.raises(ValueError, match="with 1 others"):
        route(torch.zeros(5, 8), rule, torch.tensor([0.0] * 7 + [math.inf]))
    low = route(torch.full((2, 8), -math.inf), rule)
    assert not low.weight.any()
    assert route(torch.zeros(0, 8), rule).expert.shape == (0, 2)


def test_half_precision_logits_are_scored_in_float32():
    logits = randn(20, 8).bfloat16()
    assert route(logits, Rule(8, 4, 2, 2)).scores.dtype == torch.float32
    assert torch.equal(score(logits, Rule(8, 4, 2, 2)), logits.float().sigmoid())


# Balancing


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.sampled_from([0.0, 0.001, 0.5]))
def test_bias_moves_by_the_sign_alone(load, gamma):
    bias = randn(len(load), dtype=torch.float64)
    moved = balance.update_bias(bias, torch.tensor(load), gamma) - bias
    mean = sum(load) / len(load)
    for m, n in zip(moved.tolist(), load, strict=True):
        assert m == pytest.approx(gamma * ((n < mean) - (n > mean)), abs=1e-12)


def test_a_load_at_its_mean_is_left_alone():
    bias = torch.zeros(3)
    assert torch.equal(balance.update_bias(bias, torch.tensor([7, 7, 7])), bias)
    thirds = balance.update_bias(bias, torch.tensor([0.1, 0.1, 0.1]))
    assert float(thirds.abs().max()) <= 0.001
    for wrong in ((torch.zeros(4), bias, 0.1), (bias, bias, -1.0), (bias, bias, math.nan)):
        with pytest.raises(ValueError, match="the update needs"):
            balance.update_bias(*wrong)


def test_sequence_balance_loss_by_its_formula():
    scores = randn(3, 10, 6, dtype=torch.float64).sigmoid().requires_grad_()
    total = 0.0
    for s in scores.detach().tolist():
        for i in range(6):
            f = sum(i in sorted(range(6), key=lambda j: -row[j])[:2] for row in s) * 6 / (2 * 10)
            total += f * sum(row[i] / sum(row) for row in s) / 10
    loss = balance.sequence_balance_loss(scores, 2)
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: balance.sequence_balance_loss(s, 2), scores)
    assert float(balance.sequence_balance_loss(torch.full((1, 4, 8), 0.5), 2)) == pytest.approx(1)
    for empty in (torch.zeros(0, 4, 8), torch.zeros(2, 0, 8), torch.zeros(1, 2, 8)):
        assert float(balance.sequence_balance_loss(empty, 2)) == 0
    for bad, k in ((torch.zeros(4, 8), 2), (torch.zeros(1, 4, 8), 9), (torch.zeros(1, 4, 8), 0)):
        with pytest.raises(ValueError, match="the loss needs scores"):
            balance.sequence_balance_loss(bad, k)


def test_entropy_and_peak():
    loads = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert balance.entropy(loads).exp().tolist() == pytest.approx([4, 1, 1])
    assert balance.peak(loads).tolist() == pytest.approx([1, 4, 0])


# Dispatch and the layer


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_plan_sorts_stably(tokens, experts, k, seed):
    expert = torch.randint(experts, (tokens, k), generator=torch.Generator().manual_seed(seed))
    rows = dispatch.plan(expert, experts)
    wanted = sorted(range(tokens * k), key=lambda i: (int(expert.flatten()[i]), i))
    assert rows.order.tolist() == wanted
    assert rows.token.tolist() == [i // k for i in wanted]
    assert rows.ends.tolist() == [int((expert <= e).sum()) for e in range(experts)]
    assert rows.ends.dtype == torch.int32


def test_plan_refuses():
    with pytest.raises(ValueError, match="experts are 0 to 3, not 1 to 4"):
        dispatch.plan(torch.tensor([[1, 4]]), 4)
    with pytest.raises(ValueError, match=r"experts \[T, k\], not \[3\]"):
        dispatch.plan(torch.tensor([1, 2, 3]), 4)


@pytest.mark.parametrize("case", ["random", "all on one", "none", "empty experts", "one token"])
def test_grouped_equals_the_loop_forward_and_backward(case):
    tokens = {"none": 0, "one token": 1}.get(case, 40)
    expert = {
        "random": lambda: torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).topk(3).indices,
        "all on one": lambda: torch.full((40, 1), 5), "empty experts": lambda: torch.tensor([[0, 4]]).repeat(40, 1),
        "none": lambda: torch.zeros(0, 2, dtype=torch.int64), "one token": lambda: torch.tensor([[3, 1]]),
    }[case]()
    leaves = [randn(tokens, 8, dtype=torch.float64), randn(6, 8, 10, dtype=torch.float64, seed=1)]
    leaves += [randn(6, 5, 8, dtype=torch.float64, seed=2), randn(*expert.shape, dtype=torch.float64, seed=3)]
    x, gate_up, down, weight = (t.requires_grad_() for t in leaves)
    outs = [f(x, gate_up, down, expert, weight) for f in (dispatch.swiglu_experts, dispatch.loop_over_experts)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    upstream = randn(tokens, 8, dtype=torch.float64, seed=4)
    slopes = [torch.autograd.grad(o, (x, gate_up, down, weight), upstream) for o in outs]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


def copied(rule, dim=16, hidden=12, shared=2, dtype=torch.float64):
    """A Hugging Face layer and ours with the same weights."""
    torch.manual_seed(1)
    theirs = hf3.DeepseekV3MoE(config(
        rule, hidden_size=dim, moe_intermediate_size=hidden, n_shared_experts=shared
    )).to(dtype)
    ours = layer.DeepSeekMoE(dim, hidden, rule, shared).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / dim**0.5)
        theirs.gate.e_score_correction_bias.copy_(0.05 * torch.randn(rule.experts))
        ours.bias.copy_(theirs.gate.e_score_correction_bias)
        ours.router.copy_(theirs.gate.weight)
        ours.gate_up.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
        ours.down.copy_(theirs.experts.down_proj.transpose(1, 2))
        halves = [theirs.shared_experts.gate_proj.weight, theirs.shared_experts.up_proj.weight]
        ours.shared_gate_up.copy_(torch.cat(halves).T)
        ours.shared_down.copy_(theirs.shared_experts.down_proj.weight.T)
    return theirs, ours


@pytest.mark.parametrize("rule", [Rule(32, 8, 4, 8), Rule(12, 3, 2, 3, 1.0), Rule(8, 1, 1, 8, 2.5)])
def test_layer_equals_hugging_faces_forward_and_backward(rule):
    theirs, ours = copied(rule)
    x = randn(70, 16, dtype=torch.float64).requires_grad_()
    out, _ = ours(x)
    wanted = theirs(x[None])[0]
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    upstream = randn(70, 16, dtype=torch.float64, seed=5)
    mine = torch.autograd.grad(out, (x, ours.router, ours.gate_up, ours.down, ours.shared_gate_up), upstream)
    shared = theirs.shared_experts
    parts = (theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
    halves = (shared.gate_proj.weight, shared.up_proj.weight)
    dx, router, gate_up, down, *both = torch.autograd.grad(wanted, (x, *parts, *halves), upstream)
    right = (dx, router, gate_up.transpose(1, 2), down.transpose(1, 2), torch.cat(both).T)
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the router's path is float32 in both
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(mine[2:], right[2:], strict=True))


def test_layer_without_tokens_or_shared_experts_and_its_bias():
    moe = layer.DeepSeekMoE(4, 3, Rule(8, 4, 2, 2), shared=0)
    out, routing = moe(torch.zeros(0, 4))
    assert out.shape == (0, 4)
    assert moe.load(routing).tolist() == [0] * 8
    assert "bias" not in dict(moe.named_parameters())
    assert "bias" in moe.state_dict()
    x = randn(9, 4)
    out, routing = moe(x)
    alone = dispatch.loop_over_experts(x, moe.gate_up, moe.down, routing.expert, routing.weight)
    torch.testing.assert_close(out, alone)
    moe.rebalance(moe.load(routing), 0.25)
    assert set(moe.bias.tolist()) <= {-0.25, 0.0, 0.25}


# Numbers


def test_parameters_are_those_of_the_published_model():
    shape, full = cost.Shape(), DeepseekV3Config()
    with torch.device("meta"):
        model = hf3.DeepseekV3ForCausalLM(DeepseekV3Config(num_hidden_layers=4))
    four = shape._replace(layers=4)
    assert cost.model_parameters(four, 256) == sum(p.numel() for p in model.parameters())
    assert shape[:6] == (
        full.num_hidden_layers, full.first_k_dense_replace, full.hidden_size, full.moe_intermediate_size,
        full.intermediate_size, full.n_shared_experts,
    )
    assert round(cost.model_parameters(shape, 256) / 1e9) == 671
    assert 37 <= cost.model_parameters(shape, 8) / 1e9 < 38


def test_combinations_of_the_paper():
    assert cost.split(16, 2, 1) == (16, 2, 120)
    assert cost.split(16, 2, 4) == (64, 8, 4_426_165_368)


def test_v2_of_the_paper():
    assert V2[:5] == (160, 8, 3, 6, 16.0)
    check(V2)


def test_softmax_and_sigmoid_choose_the_same_experts():
    a, b = (lab.lab_route(name, 1.0) for name in ("softmax", "sigmoid"))
    assert torch.equal(a.expert.sort().values, b.expert.sort().values)
    limited = lab.lab_route("sigmoid, 3 of 8 groups", 1.0)
    assert int(lab.groups_touched(limited.expert).max()) <= 3
    biased = lab.lab_route("groups and bias", 1.0)
    peaks = [float(balance.peak(balance.load_of(r.expert, 64))) for r in (limited, biased)]
    assert peaks[1] < 0.6 * peaks[0]


def test_training_collapses_alone_and_is_even_with_the_bias():
    used = {}
    for name, knobs in (("none", {}), ("loss", {"alpha": 0.1}), ("bias", {"gamma": 0.01})):
        run = training.train(**knobs, steps=200)
        used[name] = float(balance.entropy(run.load[-50:].sum(0)).exp())
        assert bool((run.load.sum(1) == 256 * 2).all())
        assert float(run.bias.abs().max()) > 0 if name == "bias" else not run.bias.any()
        assert float(run.loss[-50:].mean()) < 0.5 * float(run.loss[:10].mean())
    assert used["none"] < 9 < used["loss"] < used["bias"]
    assert used["bias"] > 14.5
