"""Checkers for exercises: they say what is wrong with a wrong answer, and never stop the notebook."""

import functools
from collections.abc import Callable
from typing import Any


class Wrong(Exception):
    """A wrong answer; its message is the sentence the reader sees."""


def expect(condition: Any, message: str) -> None:
    """Raise `Wrong(message)` unless the condition holds. The message says what came out and what was expected."""
    if not bool(condition):
        raise Wrong(message)


class Exercise:
    """A checker that is safe to call in any state of the reader's work.

    Wraps `checker(answer)`, which raises `Wrong` (through `expect`) for a wrong answer and returns a sentence for a
    right one. An answer left as `...` is "not attempted yet", and an answer that raises is reported with what it
    raised, not with a traceback into the book.
    """

    def __init__(self, checker: Callable[[Any], str]) -> None:
        functools.update_wrapper(self, checker)
        self.checker, self.name = checker, checker.__name__.replace("_", " ")

    def verdict(self, answer: Any) -> tuple[bool, str]:
        """Whether the answer is right, and the sentence for the reader."""
        if answer is ...:
            return False, f"○ {self.name}: not attempted yet. Replace the ... and run the cell again."
        try:
            return True, f"✓ {self.name}: {self.checker(answer)}"
        except Wrong as wrong:
            return False, f"✗ {self.name}: {wrong}"
        except Exception as error:
            return False, f"✗ {self.name}: your answer raised {type(error).__name__}: {error}"

    def __call__(self, answer: Any) -> None:
        print(self.verdict(answer)[1])


exercise = Exercise
