"""Switch routing against Hugging Face's, closed forms and a queue written out in Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
    router_z_loss_func,
)

from llmbook.block.switch_routing import exercises, figures
from llmbook.block.switch_routing.layer import SwitchFFN, auxiliary, combine, dispatch
from llmbook.block.switch_routing.routing import (
    capacity,
    expert_choice,
    load_balance_loss,
    route,
    z_loss,
)
from llmbook.block.switch_routing.training import effective_experts, train
from llmbook.block.switch_routing.waste import skewed_logits, waste
from tests.checkers import checker_tests, explorer_test

sizes = st.tuples(st.integers(0, 30), st.integers(1, 6), st.integers(0, 12), st.integers(0, 99))


def logits_of(tokens, experts, seed, dtype=torch.float64):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(sizes)
def test_routing_is_a_queue_per_expert(size):
    tokens, experts, places, seed = size
    logits = logits_of(tokens, experts, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    r = route(logits, places, order)
    assert torch.equal(r.p, logits.softmax(1))
    queues = [0] * experts
    for t in order.tolist():
        e = int(logits[t].argmax())
        assert (r.expert[t], r.place[t]) == (e, queues[e])
        assert r.kept[t] == (queues[e] < places)
        assert r.gate[t] == r.p[t, e]
        queues[e] += 1
    assert int(r.kept.sum()) == sum(min(n, places) for n in queues)


def same(mine, wanted, leaves):
    """Outputs and every gradient, of a loss whose slope is different everywhere."""
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(mine)
    pairs = zip((mine, wanted), leaves, strict=True)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), those) for out, those in pairs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [None, 4.0])
@pytest.mark.parametrize("sequences", [1, 3])
def test_the_layer_equals_hugging_faces_with_its_weights(factor, sequences):
    # With places for all: transformers 5.0 to 5.17 forget the capacity. Dropping has its own test, below.
    torch.manual_seed(0)
    tokens, experts = 24, 4
    config = SwitchTransformersConfig(
        d_model=8, d_ff=12, num_experts=experts, expert_capacity=tokens, dropout_rate=0.0, router_jitter_noise=0.0,
        router_bias=False,
    )
    theirs = SwitchTransformersSparseMLP(config)
    ours = SwitchFFN(8, 12, experts, factor)
    with torch.no_grad():
        ours.router.weight.copy_(theirs.router.classifier.weight)
        for e in range(experts):
            ours.up[e] = theirs.experts[f"expert_{e}"].wi.weight.T
            ours.down[e] = theirs.experts[f"expert_{e}"].wo.weight.T
    x = torch.randn(sequences, tokens, 8, requires_grad=True)
    mine, wanted = torch.stack([ours(row)[0] for row in x]), x + theirs(x)
    same(mine, wanted, [(x, ours.router.weight), (x, theirs.router.classifier.weight)])
    grads = torch.autograd.grad(ours(x[0])[0].square().sum(), (ours.up, ours.down))
    (x[0] + theirs(x[:1])[0]).square().sum().backward()
    for e in range(experts):
        expert = theirs.experts[f"expert_{e}"]
        for grad, linear in zip(grads, (expert.wi, expert.wo), strict=True):
            reference = torch.zeros_like(grad[e]) if linear.weight.grad is None else linear.weight.grad.T
            torch.testing.assert_close(grad[e], reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("tokens", [1, 23])
def test_a_dropped_token_leaves_as_it_came_and_teaches_nothing(factor, tokens):
    torch.manual_seed(1)
    layer, x = SwitchFFN(8, 12, 4, factor).double(), torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    places, queue, wanted = capacity(tokens, 4, factor), [0] * 4, []
    for token in x:  # the rule in words: whoever finds its expert's queue full passes
        p = layer.router(token).softmax(-1)
        e = int(p.argmax())
        answer = torch.relu(token @ layer.up[e]) @ layer.down[e]
        wanted.append(token + (p[e] * answer if queue[e] < places else 0 * p[e] * answer))
        queue[e] += 1
    mine, routing, _ = layer(x)
    assert int((~routing.kept).sum()) == sum(max(0, n - places) for n in queue)
    assert torch.equal(mine[~routing.kept], x[~routing.kept])
    same(mine, torch.stack(wanted), [(x, *layer.parameters())] * 2)


@given(sizes)
def test_both_losses_equal_hugging_faces(size):
    tokens, experts, _, seed = size
    logits = logits_of(tokens, experts, seed, torch.float32)
    r = route(logits, tokens)
    if not tokens:
        assert load_balance_loss(r.p, r.expert) == z_loss(logits) == 0
        return
    theirs = load_balancing_loss_func(r.p[None], r.expert[None])
    torch.testing.assert_close(load_balance_loss(r.p, r.expert), theirs)
    torch.testing.assert_close(z_loss(logits), router_z_loss_func(logits[None]))


@pytest.mark.parametrize(("experts", "alpha"), [(1, 0.5), (4, 0.01), (64, 1.0)])
def test_the_balance_loss_is_alpha_if_uniform_and_alpha_times_experts_if_collapsed(experts, alpha):
    tokens = 4 * experts
    even = 1e-9 * torch.eye(experts, dtype=torch.float64).repeat(4, 1)  # uniform, ties broken round robin
    one = torch.zeros(tokens, experts, dtype=torch.float64)
    one[:, 0] = 1e4
    for logits, wanted in ((even, alpha), (one, alpha * experts)):
        r = route(logits, tokens)
        assert abs(auxiliary(r, logits, alpha).item() - wanted) < 1e-6


def test_a_dropped_token_and_an_expert_without_places_contribute_exactly_zero():
    torch.manual_seed(0)
    layer = SwitchFFN(8, 16, 4, factor=0.0).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    out, routing, _ = layer(x)
    assert torch.equal(out, x)
    assert not routing.kept.any()
    layer.factor = 0.5
    out, routing, _ = layer(x)
    assert torch.equal(out[~routing.kept], x[~routing.kept])
    assert (out[routing.kept] != x[routing.kept]).any(1).all()


def test_garbage_in_a_dropped_tokens_expert_does_not_reach_it():
    """An expert that answers inf or NaN spoils its own tokens only."""
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    r = route(logits, 1)
    answers = torch.tensor([[[float("nan")]], [[2.0]]])
    out = combine(answers, r)
    assert out[0].isnan()
    assert out[1] == 0
    assert out[2] == 2 * r.gate[2]


def test_gradients_reach_the_router_through_the_gate_alone():
    torch.manual_seed(0)
    layer = SwitchFFN(6, 10, 3, factor=1.0).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x)[0].sum(), layer.router.weight)
    assert got.abs().max() > 0
    _, r, _ = layer(x)
    with torch.no_grad():
        buffers = dispatch(x, r, 3, capacity(12, 3, 1.0))
        answers = torch.relu(buffers @ layer.up) @ layer.down
    w = layer.router.weight.detach().requires_grad_()
    gate = (x @ w.T).softmax(1).gather(1, r.expert[:, None])[:, 0]
    mine = answers[r.expert[r.kept], r.place[r.kept]].sum(1)
    (wanted,) = torch.autograd.grad((gate[r.kept] * mine).sum(), w)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_the_layer_passes_gradcheck():
    torch.manual_seed(1)
    layer = SwitchFFN(3, 4, 2, factor=1.0).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)


@given(sizes)
def test_every_expert_that_chooses_is_full(size):
    tokens, experts, places, seed = size
    logits = logits_of(tokens, experts, seed)
    if places > tokens:
        with pytest.raises(ValueError, match=f"can choose 0 to {tokens} tokens, not {places}"):
            expert_choice(logits, places)
        return
    token, gate = expert_choice(logits, places)
    assert token.shape == gate.shape == (experts, places)
    p = logits.softmax(1)
    for e in range(experts):
        assert len(set(token[e].tolist())) == places
        assert torch.equal(gate[e], p[:, e].sort(descending=True).values[:places])


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "places"),
    [(1024, 8, 1.25, 160), (100, 3, 1.0, 33), (4, 8, 1.0, 0), (10, 2, 99.0, 10), (0, 4, 1.0, 0), (8, 4, 0.0, 0)],
)
def test_capacity(tokens, experts, factor, places):
    assert capacity(tokens, experts, factor) == places


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 20))
def test_waste_counts_what_finds_no_place_and_what_finds_no_token(counts, places):
    lost = waste(torch.tensor(counts), places)
    total, room = sum(counts), places * len(counts)
    assert round(lost.dropped * total) == sum(max(n - places, 0) for n in counts)
    assert round(lost.empty * room) == sum(max(places - n, 0) for n in counts)


def test_without_the_loss_the_router_collapses_and_with_it_it_balances():
    alone, together = train(0.0), train(1.0)
    assert effective_experts(alone.load[-50:].mean(0)) < 2 < 7 < effective_experts(together.load[-50:].mean(0))
    assert together.loss[-50:].mean() < alone.loss[-50:].mean()
    tight = [train(alpha, factor=1.25) for alpha in (0.0, 1.0)]
    assert tight[0].dropped[-50:].mean() > 0.5 > 0.1 > tight[1].dropped[-50:].mean()
    assert torch.equal(alone.load, train(0.0).load)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity(8, 0, 1.0), "one expert or more"),
        (lambda: capacity(8, 4, -1.0), "factor -1"),
        (lambda: capacity(8, 4, float("nan")), "factor nan"),
        (lambda: route(torch.zeros(3), 1), r"logits \[T, E\].*not \[3\]"),
        (lambda: route(torch.zeros(3, 0), 1), "one expert or more"),
        (lambda: route(torch.zeros(3, 2), -1), "0 places or more"),
        (lambda: route(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), 1), "logits of token 1 contain NaN"),
    ],
)
def test_what_cannot_be_routed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_tokens_and_half_precision():
    layer = SwitchFFN(4, 8, 3)
    out, routing, logits = layer(torch.zeros(0, 4))
    assert out.shape == (0, 4)
    assert auxiliary(routing, logits, 1.0, 1.0) == 0
    half = SwitchFFN(4, 8, 3).bfloat16()
    out, routing, _ = half(torch.randn(7, 4).bfloat16())
    assert (out.dtype, routing.p.dtype) == (torch.bfloat16, torch.float32)
    infinite = route(torch.tensor([[float("-inf"), 0.0]]), 1)  # an expert that is masked out
    assert infinite.expert.item() == 1


# --- exercises and figures


def second_choice(logits, places):
    expert = logits.topk(2, dim=1).indices
    first = torch.nn.functional.one_hot(expert[:, 0], logits.shape[1])
    second = torch.nn.functional.one_hot(expert[:, 1], logits.shape[1])
    before = torch.stack([(first.cumsum(0) * first).sum(1), ((second.cumsum(0) + first.sum(0)) * second).sum(1)], 1)
    return expert, before <= places


def by_token(logits, places):
    expert = logits.topk(2, dim=1).indices
    flat = torch.nn.functional.one_hot(expert.flatten(), logits.shape[1])
    return expert, ((flat.cumsum(0) * flat).sum(1) <= places).view(-1, 2)


def dropped_and_empty(counts, factor):
    places = int(factor * sum(counts) / len(counts))
    return sum(max(n - places, 0) for n in counts), sum(max(places - n, 0) for n in counts)


SOLUTIONS = {
    "dropped_and_empty": dropped_and_empty,
    "gradient_of_the_balance_loss": lambda p, f: len(f) / len(p) * p * (f - (p * f).sum(1, keepdim=True)),
    "best_first": lambda logits: logits.softmax(1).amax(1).argsort(descending=True),
    "second_choice": second_choice,
}
WRONG = {
    "dropped_and_empty": [
        (lambda counts, factor: (max(sum(counts) - int(factor * sum(counts) / 4) * 4, 0), 0), "of no use to another"),
        (lambda counts, factor: dropped_and_empty(counts, factor)[::-1], "are dropped"),
        (lambda counts, factor: (dropped_and_empty(counts, factor)[0], 0), "places stay empty"),
        (lambda counts, factor: (1,), "not two"),
    ],
    "gradient_of_the_balance_loss": [
        (lambda p, f: len(f) * f.expand_as(p) / len(p), "go on through the softmax"),
        (lambda p, f: len(f) * p * (f - (p * f).sum(1, keepdim=True)), "divide by T"),
        (lambda p, f: len(f) / len(p) * p * f, "off by"),
        (lambda p, f: f, "should be a tensor"),
    ],
    "best_first": [
        (lambda logits: torch.arange(len(logits)), "dropped a token of gate"),
        (lambda logits: logits.softmax(1).amax(1).argsort(), "dropped a token of gate"),
        (lambda logits: torch.zeros(len(logits), dtype=torch.int64), "each of the 12 tokens once"),
        (lambda logits: logits, "should be a tensor"),
    ],
    "second_choice": [
        (by_token, "before all first choices"),
        (lambda logits, places: (logits.topk(2).indices.flip(1), second_choice(logits, places)[1]), "best expert"),
        (lambda logits, places: (logits.topk(2).indices, torch.ones(len(logits), 2, dtype=torch.bool)), "wrong"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)


test_explorers_draw_their_corners = explorer_test(figures.EXPLORERS)


def test_a_skew_makes_early_experts_popular():
    counts = torch.bincount(route(skewed_logits(4000, 8, 1.0), 4000).expert, minlength=8)
    assert counts[0] > 3 * counts[-1]
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
