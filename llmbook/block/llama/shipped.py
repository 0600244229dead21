"""The model that comes with the book, and what there is to see in it: its training, its choices, its layers."""

import functools
import json
import re
from typing import NamedTuple

import torch
from torch import Tensor

from . import corpus
from .checkpoint import load
from .lens import lens
from .model import Llama
from .sample import distribution, generate
from .train import PROMPTS, SHIPPED, Log

WORD = r"[^\W\d_]{3,}"


@functools.cache
def model() -> Llama:
    """The shipped model; do not change it. In float64: what it writes is the same on every processor."""
    return load(SHIPPED, torch.float64).eval()


@functools.cache
def log() -> Log:
    """What its training showed, `seen` are three texts per look."""
    return Log(**json.loads((SHIPPED / "log.json").read_text(encoding="utf-8")))


@functools.cache
def vocabulary() -> frozenset[str]:
    """Words of the training text, of three letters and more."""
    data = corpus.split(corpus.read())
    return frozenset(words_in(corpus.decode(data.train)))


def words_in(text: str) -> list[str]:
    return re.findall(WORD, text.lower())


def real_words(texts: list[str]) -> float:
    """Which share of the words, of three letters and more and after the prompts, the book uses."""
    written = [text.removeprefix(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)]
    found = [word for text in written for word in words_in(text)]
    return sum(word in vocabulary() for word in found) / max(1, len(found))


class Choice(NamedTuple):
    """A place in a text, and what may follow.

    p, heated, drawn_from: [256], the model's, after temperature, after top-p.
    texts: continuations drawn from it.
    """

    p: Tensor
    heated: Tensor
    drawn_from: Tensor
    texts: list[str]


@functools.cache
def choice(prompt: str, temperature: float, top_p: float, new: int = 28) -> Choice:
    """What follows `prompt`, and three texts that begin so."""
    ids = corpus.encode("\0" + prompt).long()[None]
    with torch.no_grad():
        last = model()(ids)[0, -1]
    g = torch.Generator().manual_seed(0)
    drawn = generate(
        model(), ids.expand(3, -1), new, temperature=temperature, top_p=top_p, generator=g
    )
    texts = [corpus.decode(row) for row in drawn]
    heated = distribution(last, temperature)
    return Choice(distribution(last), heated, distribution(last, temperature, top_p), texts)


@functools.cache
def read_by_layers(text: str) -> Tensor:
    """p of the next byte after each of a text's bytes, [L + 1, bytes, 256]."""
    ids = corpus.encode("\0" + text).long()[None]
    return lens(model(), ids)[:, 0, 1:].double().softmax(-1)
