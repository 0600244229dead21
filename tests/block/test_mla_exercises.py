"""The checkers tell right from wrong, the explorers fit a page, and the ladder's panel counts what the forms cost."""

import pytest
import torch

from llmbook.block.mla import exercises, figures
from llmbook.block.mla.cost import flop, rungs
from llmbook.block.mla.sizes import V2_LITE, V3
from tests.checkers import checker_tests, explorer_test


def solution(q, c, up_k, up_v):
    down = torch.einsum("hd,hdc->hc", q, up_k)
    p = (down @ c.T * q.shape[1] ** -0.5).softmax(-1)
    return torch.einsum("hc,hvc->hv", p @ c, up_v)


def rebuilds(q, c, up_k, up_v):
    p = ((q[:, None] @ (c @ up_k.mT).mT)[:, 0] * q.shape[1] ** -0.5).softmax(-1)
    return (p[:, None] @ (c @ up_v.mT))[:, 0]


def divides_by_the_latent(q, c, up_k, up_v):
    down = torch.einsum("hd,hdc->hc", q, up_k)
    return torch.einsum("hc,hvc->hv", (down @ c.T * c.shape[1] ** -0.5).softmax(-1) @ c, up_v)


def forgets_the_divisor(q, c, up_k, up_v):
    down = torch.einsum("hd,hdc->hc", q, up_k)
    return torch.einsum("hc,hvc->hv", (down @ c.T).softmax(-1) @ c, up_v)


def stays_in_the_latent(q, c, up_k, up_v):
    return (torch.einsum("hd,hdc->hc", q, up_k) @ c.T * q.shape[1] ** -0.5).softmax(-1) @ c


SOLUTIONS = {"bytes_of_a_token": 31_104, "attend_without_rebuilding": solution, "crossover": 146}
WRONG = {
    "bytes_of_a_token": [
        (62_208, "once, not twice"), (15_552, "2 bytes"), (27_648, "rotary key is kept"), (1_152, "one layer"),
        (16 * 31_104, "nothing is kept per head"), (2 * 27 * (512 + 16 * 64), "serves all heads"), (1, "is not L"),
    ],
    "attend_without_rebuilding": [
        (rebuilds, "rebuilding one"), (divides_by_the_latent, "divided by √d"), (forgets_the_divisor, "off by"),
        (stays_in_the_latent, "one output per head"), (lambda *a: None, "return a tensor"),
    ],
    "crossover": [
        (171, "endless"), (145, "still has fewer"), (145.8, "whole number"), (137, "cancel"), (1000, "compare"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
test_explorers_draw_their_corners = explorer_test(figures.EXPLORERS)


@pytest.mark.parametrize("s", [V3, V2_LITE])
def test_the_last_rungs_panel_is_the_absorbed_form(s):
    every = rungs(s, 4096)
    assert every["decoupled RoPE"].flop == sum(flop(s, "absorbed", 1, 4096).values())
    assert [r.cached for r in every.values()] == [2 * s.heads * s.nope, 512, 512, 576]
    assert every["MHA"].moved == 4096 * every["MHA"].cached
    # Low-rank: what absorbing costs, made for every token, and MHA's attention on top.
    assert every["low-rank KV"].flop == every["MHA"].flop + 4096 * flop(s, "absorbed", 1, 4096)["up-projections"]


def test_the_quiz_of_the_picture():
    every = rungs(V3, 4096)
    assert every["MHA"].cached == 64 * every["absorbed"].cached
