"""Seven lines of routing against a dense loop, a stable sort and finite differences (the notebook adds Mixtral)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.foundations.tensor_toolbox.routing import dense_mixture, mixture, route


def setting(tokens, experts, width, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    weights = [draw(width, width) for _ in range(experts)]
    return draw(tokens, width), draw(tokens, experts), weights


sizes = st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))


@given(sizes, st.integers(1, 5))
def test_routing_equals_the_dense_loop_forward_and_backward(size, k):
    tokens, experts, width, seed = size
    k = min(k, experts)
    x, logits, weights = setting(tokens, experts, width, seed)
    functions = [lambda v, w=w: torch.tanh(v @ w) for w in weights]
    results = []
    for layer in (mixture, dense_mixture):
        y = layer(x, logits, functions, k)
        grads = torch.autograd.grad(y.square().sum(), [x, logits, *weights])
        results.append([y, *grads])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


@given(sizes, st.integers(1, 5))
def test_a_routing_is_consistent(size, k):
    tokens, experts, _, seed = size
    k = min(k, experts)
    logits = setting(tokens, experts, 1, seed)[1]
    made = route(logits, k)
    assert made.load.tolist() == made.mask.sum(0).tolist()
    assert made.mask.sum(1).tolist() == [k] * tokens
    assert made.load.sum() == tokens * k
    torch.testing.assert_close(made.gates.sum(1), torch.ones(tokens, dtype=torch.float64))
    slots = made.chosen.flatten().argsort(stable=True)
    assert torch.equal(made.token, slots // k)
    assert torch.equal(made.expert, made.chosen.flatten()[slots])
    assert torch.equal(made.chosen, logits.topk(k, 1).indices)


def test_gradcheck():
    x, logits, weights = setting(4, 3, 2)
    experts = [lambda v, w=w: torch.tanh(v @ w) for w in weights]
    assert torch.autograd.gradcheck(lambda x, l: mixture(x, l, experts, 2), (x, logits))


def test_one_expert_may_get_everything_and_another_nothing():
    x, _, weights = setting(5, 3, 2)
    logits = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.float64).expand(5, 3)
    assert route(logits, 1).load.tolist() == [5, 0, 0]
    y = mixture(x, logits, [lambda v, w=w: v @ w for w in weights], 1)
    torch.testing.assert_close(y, x @ weights[0])


@pytest.mark.parametrize(("call", "words"), [
    (lambda: route(torch.zeros(2, 3), 4), r"k = 4 experts from logits \[2, 3\]"),
    (lambda: route(torch.zeros(2, 3), 0), "k = 0"),
    (lambda: route(torch.zeros(3), 1), r"logits \[3\]"),
    (lambda: mixture(torch.zeros(2, 3), torch.zeros(2, 3), [torch.tanh], 1), "1 experts, logits for 3"),
])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
