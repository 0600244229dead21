"""Sampling, its distributions and its cost; the corpus; training."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from llmbook.block.attention_and_kv_cache.cache import PagedCache
from llmbook.block.llama import baselines, corpus
from llmbook.block.llama.config import Config
from llmbook.block.llama.counts import forward_flop
from llmbook.block.llama.lens import lens
from llmbook.block.llama.model import Llama
from llmbook.block.llama.sample import distribution, generate, nucleus
from llmbook.block.llama.train import Recipe, batches, bits_per_byte, loss_of, rate_at, train
from llmbook.foundations.tokens_to_logits.tracer import Tracer
from tests.block.test_llama import SMALL, ids_for, pair

logits = st.lists(st.floats(-20, 20), min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))
shares = st.floats(0.01, 1.0)


@given(logits, shares)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(x, top_p):
    p = x.softmax(-1)
    kept = nucleus(p, top_p)
    assert kept.any()
    assert p[kept].sum() >= top_p - 1e-12
    least = p[kept].min()
    assert p[kept].sum() - least < top_p + 1e-12  # without its least likely token it falls short
    assert (p[~kept] <= least).all()


@given(logits, shares, st.floats(0.1, 5))
def test_the_distribution_is_hugging_faces(x, top_p, temperature):
    wanted = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, x[None]))[0].softmax(-1)
    mine = distribution(x, temperature, top_p)
    assert float(mine.sum()) == pytest.approx(1)
    edges = (x / temperature).softmax(-1).sort().values.cumsum(0)
    if ((edges - (1 - top_p)).abs() > 1e-9).all() and len(set(x.tolist())) == len(x):  # no tie, no token on the edge
        torch.testing.assert_close(mine, wanted)


@given(logits)
def test_temperature_to_zero_is_greedy(x):
    greedy = distribution(x, 0)
    assert greedy[x.argmax()] == 1
    assert greedy.sum() == 1
    top = x.sort(descending=True).values
    if len(x) == 1 or top[0] - top[1] > 1e-3:
        torch.testing.assert_close(distribution(x, 1e-6), greedy)
        torch.testing.assert_close(distribution(x, 1e-300), greedy)


def test_frequencies_are_the_distribution_chi_square():
    x = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    p = distribution(x, 1.3, 0.9)
    n, g = 50_000, torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.multinomial(p, n, replacement=True, generator=g), minlength=6)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    chi = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    assert chi < 18.5  # 4 degrees of freedom: 99.9 %


def test_generated_tokens_have_the_models_distribution():
    model = Llama(SMALL)
    with torch.no_grad():
        p = distribution(8 * model(torch.tensor([[3, 1]]))[0, -1], 1.0, 0.8)
        model.lm_head.weight *= 8
    prompts = torch.tensor([[3, 1]]).expand(4000, 2)
    first = generate(model, prompts, 1, temperature=1.0, top_p=0.8, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(first[:, 0], minlength=40)
    assert (counts[p == 0] == 0).all()
    expected = 4000 * p[p > 0]
    chi = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("bad", "words"), [
    ([0.0, math.nan], "row 0 have nan"), ([0.0, math.inf], "have inf as their largest"),
    ([-math.inf, -math.inf], "have -inf"),
])
def test_logits_that_mean_nothing_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        distribution(torch.tensor([bad]), 1.0)
    with pytest.raises(ValueError, match="the logits of row 1"):
        distribution(torch.tensor([[0.0, 1.0], bad]), 0.0)


def test_forbidden_tokens_are_never_drawn():
    p = distribution(torch.tensor([-math.inf, 0.0, 1.0]), 1.0, 1.0)
    assert p[0] == 0
    assert p.sum() == 1


def test_arguments_out_of_range_are_refused():
    x = torch.zeros(3)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be 0 or more"):
            distribution(x, temperature)
    for top_p in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="top_p must be above 0 and at most 1"):
            distribution(x, 1.0, top_p)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_with_and_without_a_cache(temperature):
    ours, _ = pair(SMALL)
    prompt = ids_for(SMALL, 2, 5)
    g = torch.Generator().manual_seed(3)
    cached = generate(ours, prompt, 12, temperature=temperature, top_p=0.9, generator=g)
    g, ids = torch.Generator().manual_seed(3), prompt
    for _ in range(12):
        with torch.no_grad():
            p = distribution(ours(ids)[:, -1], temperature, 0.9)
        ids = torch.cat((ids, torch.multinomial(p, 1, generator=g)), 1)
    assert torch.equal(cached, ids[:, 5:])

    pages = PagedCache(2, 2, 20, 4, 8, layers=3, dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    assert torch.equal(generate(ours, prompt, 12, temperature=temperature, top_p=0.9, generator=g, cache=pages), cached)


def test_greedy_tokens_equal_hugging_faces_generate():
    ours, theirs = pair(SMALL)
    prompt = ids_for(SMALL, 2, 5)
    wanted = theirs.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt),
                             pad_token_id=0)
    assert torch.equal(generate(ours, prompt, 12), wanted[:, 5:])


def test_prompts_of_different_lengths_write_as_if_alone():
    ours, _ = pair(SMALL)
    prompt, counts = ids_for(SMALL, 3, 6), torch.tensor([2, 6, 1])
    together = generate(ours, prompt, 8, counts=counts)
    for b, n in enumerate(counts):
        assert torch.equal(together[b : b + 1], generate(ours, prompt[b : b + 1, :n], 8))


def test_a_cached_step_costs_one_token_and_its_attention_only():
    ours, cache = Llama(SMALL), Llama(SMALL).cache()
    flop = []
    with torch.no_grad():
        for token in ids_for(SMALL, 1, 12)[0]:
            with Tracer(ours) as log:
                ours(token.view(1, 1), cache)
            flop.append(log.flop)
    assert flop == [forward_flop(SMALL, 1, 1, past) for past in range(12)]
    grows = {b - a for a, b in pairwise(flop)}
    assert grows == {4 * SMALL.layers * SMALL.heads * SMALL.head_dim}  # one more key: two products


def test_prompts_that_cannot_be_continued_are_refused():
    ours = Llama(SMALL)
    with pytest.raises(ValueError, match="at least one token, not \\[1, 0\\]: begin with BOS"):
        generate(ours, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        generate(ours, torch.zeros(2, 3, dtype=torch.int64), 3, counts=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="70 tokens and 1 new ones do not fit a context of 64"):
        generate(ours, torch.zeros(1, 70, dtype=torch.int64), 1)
    assert generate(ours, torch.zeros(1, 60, dtype=torch.int64), 5).shape == (1, 5)
    with pytest.raises(ValueError, match="60 tokens and 6 new ones"):
        generate(ours, torch.zeros(1, 60, dtype=torch.int64), 6)
    with torch.no_grad():
        ours.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="nan as their largest"):
        generate(ours, torch.zeros(1, 2, dtype=torch.int64), 2)


def test_the_snapshot_splits_into_whole_chapters():
    chapters = corpus.read()
    data = corpus.split(chapters)
    assert set(data.train_chapters) | set(data.held_out_chapters) == set(chapters)
    assert not set(data.train_chapters) & set(data.held_out_chapters)
    assert len(data.train) + len(data.held_out) == sum(len(t.encode()) + 1 for t in chapters.values())
    assert len(data.held_out) > 10_000
    for name in data.held_out_chapters:
        assert chapters[name] in corpus.decode(data.held_out)
        assert chapters[name][:200] not in corpus.decode(data.train)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text_there_and_back(text):
    assert corpus.decode(corpus.encode(text)) == text


def test_chapters_are_gathered_in_order_and_written_as_read(tmp_path):
    (tmp_path / "notebooks/a").mkdir(parents=True)
    for name, words in (("one", "first ∑"), ("two", "second"), ("llama", "itself")):
        cells = [{"cell_type": "markdown", "source": [words, "\nmore"]}, {"cell_type": "code", "source": ["x = 1"]}]
        (tmp_path / f"notebooks/a/{name}.ipynb").write_text(json.dumps({"cells": cells}))
    listed = ("notebooks/a/two", "notebooks/a/one", "notebooks/a/llama", "book/glossary")
    lines = [f"  - file: {name}" for name in listed]
    (tmp_path / "_toc.yml").write_text("\n".join(lines))
    found = corpus.gather(tmp_path)
    assert list(found.items()) == [("a/two", "second\nmore"), ("a/one", "first ∑\nmore")]
    corpus.write(found, tmp_path / "corpus.txt")
    assert corpus.read(tmp_path / "corpus.txt") == found
    with pytest.raises(ValueError, match="a/one contains a form feed"):
        corpus.write({"a/one": "x\fy"}, tmp_path / "corpus.txt")


def test_the_loss_is_hugging_faces_in_bits():
    ours, theirs = pair(SMALL, torch.float32)
    ids = ids_for(SMALL)
    with torch.no_grad():
        assert loss_of(ours, ids).item() == pytest.approx(theirs(ids, labels=ids).loss.item() / math.log(2), rel=1e-4)


def test_untrained_loss_is_that_of_a_uniform_guess_and_windows_see_each_byte_once():
    model = Llama(Config(256, 16, 1, 2, 1, 16, context=64))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    data = torch.randint(256, (200,), dtype=torch.uint8)
    assert bits_per_byte(model, data, 16) == pytest.approx(8)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    rows = torch.stack([data[i : i + 17] for i in range(0, 192 - 15, 16)])
    assert bits_per_byte(model, data, 16) == pytest.approx(loss_of(model, rows).item(), rel=1e-5)


def test_a_model_learns_a_rule_and_the_run_repeats():
    data = torch.arange(64, dtype=torch.uint8).repeat(20)
    split = corpus.Split(data, data[:300], [], [])
    recipe, logs = Recipe(60, 8, 32, 1e-2, 5), []
    for _ in range(2):
        torch.manual_seed(0)
        logs.append(train(Llama(Config(64, 32, 1, 2, 1, 32, context=64)), split, recipe, (0, 30), lambda m, bits: bits))
    log = logs[0]
    assert log == logs[1]
    assert log.at == [0, 30, 60]
    assert log.seen == log.held_out
    assert len(log.train) == 60
    assert log.held_out[0] > 5
    assert log.held_out[-1] < 0.5


def test_the_rate_rises_and_falls_to_a_tenth():
    r = Recipe(100, rate=1.0, warmup=10)
    rates = [rate_at(i, r) for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[100] == pytest.approx(0.1)
    assert all(b <= a for a, b in pairwise(rates[10:]))


def test_excerpts_lie_in_the_data_and_repeat():
    data = torch.arange(100, dtype=torch.uint8)
    r = Recipe(5, 3, 10)
    first, second = list(batches(data, r)), list(batches(data, r))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((part.int().diff() == 1).all() and part.shape == (3, 11) for part in first)
    with pytest.raises(ValueError, match="10 tokens are too few for excerpts of 11"):
        next(batches(data[:10], r))


def test_ngrams_are_distributions_and_orders_zero_and_one_are_their_formulas():
    data = corpus.encode("abracadabra")
    g = baselines.counts(data, 2)
    for context in (b"", b"a", b"ab", b"zz"):
        assert sum(baselines.probability(g, context, byte) for byte in range(256)) == pytest.approx(1)
    # Of 11 bytes 5 are a, of 5 kinds; a new kind has the weight of 5.
    assert baselines.probability(g, b"", ord("a")) == pytest.approx((5 + 5 / 256) / 16)
    # After a: b twice, c, d; 3 kinds.
    after_a = (2 + 3 * baselines.probability(g, b"", ord("b"))) / 7
    assert baselines.probability(g, b"a", ord("b")) == pytest.approx(after_a)
    assert baselines.ngram_bits(data, corpus.encode("b"), 0) == pytest.approx(-math.log2((2 + 5 / 256) / 16))


def test_compression_given_a_text_is_nearly_free_for_the_same_text():
    data = corpus.encode("".join(map(str, range(3000))))
    assert baselines.compressed_bits(data, data) < 0.5
    noise = torch.randint(256, (5000,), dtype=torch.uint8)
    assert baselines.compressed_bits(data, noise) > 7.9


def test_the_lens_ends_at_the_models_own_logits_and_begins_at_the_embedding():
    ours, _ = pair(SMALL)
    ids = ids_for(SMALL)
    seen = lens(ours, ids)
    assert seen.shape == (4, 2, 19, 40)
    with torch.no_grad():
        torch.testing.assert_close(seen[-1], ours(ids))
        first = ours.lm_head(ours.model.norm(ours.model.embed_tokens(ids)))
    torch.testing.assert_close(seen[0], first)
