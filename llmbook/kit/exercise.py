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


def exercise(checker: Callable[[Any], str]) -> Callable[[Any], bool]:
    """Make `checker(answer)` safe to run in any state of the reader's work.

    The checker raises `Wrong` (through `expect`) for a wrong answer and returns a sentence for a right one. The
    decorated checker prints one line and returns whether the answer is right: an answer left as `...` is "not
    attempted yet", and an answer that raises is reported with what it raised, not with a traceback into the book.
    """

    @functools.wraps(checker)
    def check(answer: Any) -> bool:
        name = checker.__name__.replace("_", " ")
        if answer is ...:
            print(f"○ {name}: not attempted yet. Replace the ... and run the cell again.")
            return False
        try:
            praise = checker(answer)
        except Wrong as wrong:
            print(f"✗ {name}: {wrong}")
            return False
        except Exception as error:
            print(f"✗ {name}: your answer raised {type(error).__name__}: {error}")
            return False
        print(f"✓ {name}: {praise}")
        return True

    return check
