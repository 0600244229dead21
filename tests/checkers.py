"""Tests that several chapters share: of their exercises' checkers, and of their explorers."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from llmbook.kit.exercise import Exercise
from llmbook.kit.explore import MAX_BYTES, picture


def checker_tests(
    exercises: ModuleType, solutions: dict[str, Any], wrong: dict[str, list[tuple[Any, str]]]
) -> tuple[Callable, Callable]:
    """Tests to bind to names that begin with `test_`: solutions are accepted, wrong answers are told why.

    Args:
        exercises: a chapter's `exercises` module.
        solutions: checker's name → the right answer, for every checker of the module.
        wrong: checker's name → three or more pairs (a plausible wrong answer, words of what the reader is told).
    """
    checkers = {name: thing for name, thing in vars(exercises).items() if isinstance(thing, Exercise)}
    assert set(solutions) == set(wrong) == set(checkers), "every checker needs a solution and wrong answers"
    assert all(len(answers) >= 3 for answers in wrong.values()), "three plausible wrong answers or more"

    @pytest.mark.parametrize("name", solutions)
    def accepted(name: str) -> None:
        right, words = checkers[name].verdict(solutions[name])
        assert right, words
        assert checkers[name].verdict(...)[1].startswith("○")

    @pytest.mark.parametrize(("name", "answer", "words"), [(n, a, w) for n, pairs in wrong.items() for a, w in pairs])
    def told_why(name: str, answer: Any, words: str) -> None:
        right, told = checkers[name].verdict(answer)
        assert not right
        assert words in told, told

    return accepted, told_why


def explorer_test(explorers: dict[str, tuple[Callable, Callable, dict[str, Any]]]) -> Callable:
    """A test to bind to a name that begins with `test_`: every explorer's first and last picture fit a page.

    Args:
        explorers: a chapter's `figures.EXPLORERS`: name → (draw, caption, choices).
    """

    @pytest.mark.parametrize("name", explorers)
    def corners(name: str) -> None:
        draw, caption, choices = explorers[name]
        total = math.prod(len(values) for values in choices.values())
        for end in (0, -1):
            chosen = {key: values[end] for key, values in choices.items()}
            assert len(picture(draw, caption, chosen)) * total < MAX_BYTES

    return corners
