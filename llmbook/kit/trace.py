"""Record a function while it runs, line by line, so that a picture can show what really happened."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One executed line: its index in the recording's `source`, and what was kept right after it ran."""

    line: int
    state: Any


@dataclass(frozen=True)
class Recording:
    """A run of a function: its source lines, one `Step` per executed line, and its result."""

    source: list[str]
    steps: list[Step]
    result: Any


def trace(
    function: Callable[..., Any], *args: Any, keep: Callable[[dict[str, Any]], Any], max_steps: int = 10_000,
    **kwargs: Any,
) -> Recording:
    """Call `function(*args, **kwargs)` and keep what the chapter asks for after every line of it.

    Args:
        keep: given the function's local variables, returns the state to remember. Copy what will change
            (`tensor.clone()`): the recording must not alias what the function goes on writing to.
        max_steps: more lines than this is an error, so that a long loop cannot fill the memory.

    Only the function's own frame is recorded, not what it calls. What `function` or `keep` raises is raised here.

    Raises:
        ValueError: more than `max_steps` lines ran.
    """
    lines, first = inspect.getsourcelines(function)
    code = inspect.unwrap(function).__code__
    steps: list[Step] = []
    pending: int | None = None

    def finish(frame: FrameType) -> None:
        if pending is None:
            return
        if len(steps) >= max_steps:
            raise ValueError(f"{function.__name__} ran more than {max_steps} lines; record a smaller input")
        steps.append(Step(pending - first, keep(dict(frame.f_locals))))

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal pending
        if event in ("line", "return"):
            finish(frame)
            pending = frame.f_lineno if event == "line" else None
        elif event == "exception":
            pending = None
        return local

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code is code else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        result = function(*args, **kwargs)
    finally:
        sys.settrace(before)
    return Recording(textwrap.dedent("".join(lines)).splitlines(), steps, result)
