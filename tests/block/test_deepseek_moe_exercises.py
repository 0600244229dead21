"""The checkers accept their solutions and say what is wrong with plausible wrong answers; the explorers fit a page."""

import torch

from llmbook.block.deepseek_moe import exercises, figures
from llmbook.block.deepseek_moe.gate import Rule, select
from tests.checkers import checker_tests, explorer_test


def limited(scores, bias, groups, keep, k, mask=float("-inf"), best=2):
    choice = (scores + bias).view(len(scores), groups, -1)
    kept = choice.topk(best, -1).values.sum(-1).topk(keep).indices
    closed = torch.ones(choice.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
    return choice.masked_fill(closed[..., None], mask).flatten(1).topk(k).indices


def update(bias, load, gamma):
    return bias - gamma * (load - load.double().mean()).sign().float()


def tiles(loads, tile, skip=True):
    out, start = [], 0
    for e, n in enumerate(loads):
        out += [(e, start + a, start + min(a + tile, n)) for a in range(0, n if skip else max(n, 1), tile)]
        start += n
    return out


SOLUTIONS = {"group_limited": limited, "update_the_bias": update, "row_tiles": tiles}
WRONG = {
    "group_limited": [
        (lambda s, b, g, keep, k: (s + b).topk(k).indices, "first keep the best groups"),
        (lambda s, b, g, keep, k: limited(s, 0 * b, g, keep, k), "the bias takes no part"),
        (lambda s, b, g, keep, k: limited(s, b, g, keep, k, best=1), "V3 adds up the best two"),
        (lambda s, b, g, keep, k: limited(s, b, g, keep, k, mask=0.0), "mask with −inf"),
        (lambda s, b, g, keep, k: select(-s - b, Rule(s.shape[1], g, keep, k))[1], "40 tokens get other experts"),
        (lambda s, b, g, keep, k: limited(s, b, g, keep, k)[:, :1], "should be a tensor [40, 3]"),
    ],
    "update_the_bias": [
        (lambda b, n, gamma: b + gamma * (n - n.double().mean()).sign().float(), "the busy must fall"),
        (lambda b, n, gamma: (b - gamma * (n - n.double().mean())).float(), "only the sign"),
        (lambda b, n, gamma: b - gamma * (2 * (n >= n.double().mean()).float() - 1), "at the mean should stay"),
        (lambda b, n, gamma: update(b, n, gamma / 2), "by ±0.01, not -0.0050"),
        (lambda b, n, gamma: b[:1], "a tensor [4]"),
    ],
    "row_tiles": [
        (lambda n, tile: tiles(n, tile, skip=False), "an expert without rows has none"),
        (lambda n, tile: [(e, a, a + tile) for e, a, _ in tiles(n, tile)], "next expert's rows"),
        (lambda n, tile: tiles(n, tile)[::-1], "the tiles should be"),
        (lambda n, tile: [(a, b) for _, a, b in tiles(n, tile)], "each tile is"),
        (lambda n, tile: tiles(n, 1), "the tiles should be"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
test_explorers_fit = explorer_test(figures.EXPLORERS)
