"""Checkers for the switch_routing chapter's exercises."""

from collections.abc import Callable

import torch

from llmbook.kit.exercise import exercise, expect

from .routing import load_balance_loss, route
from .waste import waste

Tensor = torch.Tensor
LOADS = (([10, 3, 2, 1], 1.25), ([4, 4, 4, 4], 1.0), ([16, 0, 0, 0], 2.0), ([5, 5, 3, 3], 0.5))


@exercise
def dropped_and_empty(answer: Callable[[list[int], float], tuple[int, int]]) -> str:
    """answer(counts, factor) → (tokens dropped, places left empty); counts are the tokens that chose each expert."""
    for counts, factor in LOADS:
        tokens, places = sum(counts), int(factor * sum(counts) / len(counts))
        share = waste(torch.tensor(counts), places)
        wanted = (round(share.dropped * tokens), round(share.empty * places * len(counts)))
        given = tuple(answer(list(counts), factor))
        where = f"for loads {counts} and factor {factor}, so {places} places each,"
        expect(len(given) == 2, f"{where} you gave {len(given)} numbers, not two")
        lent = "an expert's free places are of no use to another's tokens"
        net = max(tokens - places * len(counts), 0)
        expect(given[0] != net or wanted[0] == net, f"{where} {wanted[0]} are dropped, not {given[0]}: {lent}")
        expect(given == wanted, f"{where} {wanted[0]} are dropped and {wanted[1]} places stay empty, not {given}")
    return f"right for {len(LOADS)} loads."


@exercise
def gradient_of_the_balance_loss(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """answer(p, f) → ∂(E Σ f_i P_i)/∂logits, [T, E], with p: [T, E] and the shares f: [E], without autograd."""
    torch.manual_seed(0)
    for tokens, experts in ((6, 4), (1, 3), (40, 8)):
        logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
        routing = route(logits, tokens)
        (wanted,) = torch.autograd.grad(load_balance_loss(routing.p, routing.expert), logits)
        f = torch.bincount(routing.expert, minlength=experts).to(wanted) / tokens
        p = routing.p.detach()
        given = answer(p, f)
        expect(isinstance(given, Tensor) and given.shape == p.shape, f"it should be a tensor {list(p.shape)}")
        by_p = experts * f.expand_as(p) / tokens
        through = "that is the gradient by p: go on through the softmax, p ∘ (g − Σ p g)"
        expect(not torch.allclose(given, by_p), through)
        expect(tokens == 1 or not torch.allclose(given, wanted * tokens), "P is a mean over the tokens: divide by T")
        off = float((given - wanted).abs().max())
        expect(off < 1e-12, f"for T = {tokens}, E = {experts} it is off by {off:.2g}")
    return "equal to autograd; experts with more than their share are pushed down, in every token."


@exercise
def best_first(answer: Callable[[Tensor], Tensor]) -> str:
    """answer(logits) → an order, [T], in which tokens with the largest gate take their places first."""
    torch.manual_seed(1)
    for tokens, experts, places in ((12, 3, 2), (9, 2, 1), (1, 4, 1)):
        logits = 2 * torch.randn(tokens, experts)
        order = answer(logits)
        expect(isinstance(order, Tensor) and order.shape == (tokens,), f"the order should be a tensor [{tokens}]")
        whole = torch.equal(order.sort().values, torch.arange(tokens))
        expect(whole, f"the order must name each of the {tokens} tokens once")
        routing = route(logits, places, order)
        for e in range(experts):
            mine = routing.expert == e
            kept, lost = routing.gate[mine & routing.kept], routing.gate[mine & ~routing.kept]
            fair = not len(lost) or kept.min() >= lost.max()
            expect(fair, f"expert {e} dropped a token of gate {lost.max() if len(lost) else 0:.2f} and kept one of "
                         f"{kept.min() if len(kept) else 0:.2f}")
    return "no expert keeps a token with a smaller gate than one it dropped."


@exercise
def second_choice(answer: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> str:
    """answer(logits, places) → experts [T, 2], kept [T, 2] of top-2 routing: first choices queue before any second."""
    torch.manual_seed(2)
    for tokens, experts, places in ((10, 4, 3), (7, 3, 2), (5, 2, 5)):
        logits = torch.randn(tokens, experts)
        expert, kept = answer(logits, places)
        wanted = logits.topk(2, dim=1).indices
        best = "each row should name the best expert, then the second best"
        expect(torch.equal(expert, wanted), best)
        queue, right = [0] * experts, torch.zeros(tokens, 2, dtype=torch.bool)
        for choice in (0, 1):
            for t in range(tokens):
                e = int(wanted[t, choice])
                right[t, choice], queue[e] = queue[e] < places, queue[e] + 1
        turn = [0] * experts
        by_token = torch.zeros_like(right)
        for t in range(tokens):
            for choice in (0, 1):
                e = int(wanted[t, choice])
                by_token[t, choice], turn[e] = turn[e] < places, turn[e] + 1
        early = "a second choice took a place before all first choices were served"
        expect(not torch.equal(kept, by_token) or torch.equal(by_token, right), early)
        wrong = int((kept != right).sum())
        expect(wrong == 0, f"with {tokens} tokens, {places} places {wrong} of {2 * tokens} entries of kept are wrong")
    return "first choices are served first, as in GShard."
