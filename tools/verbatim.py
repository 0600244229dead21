"""Cells that show the library's own source: `# llmbook.part.chapter.module: name, name` and what stands there."""

import importlib
import inspect
import re

HEADER = re.compile(r"^# (llmbook(?:\.\w+)+): (\w+(?:, \w+)*)$")


def verbatim(source: str) -> str | None:
    """What a cell that begins with a header must read; None if it has no header.

    Raises:
        ValueError: the header names a module or an object that does not exist.
    """
    first = source.split("\n", 1)[0]
    found = HEADER.match(first)
    if found is None:
        return None
    module_name, names = found.group(1), found.group(2).split(", ")
    try:
        module = importlib.import_module(module_name)
        objects = [getattr(module, name) for name in names]
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the cell header {first!r} names what is not there: {error}") from error
    # Only what has a `def` or `class` has a source to show.
    if bare := [name for name, thing in zip(names, objects, strict=True) if not hasattr(thing, "__name__")]:
        raise ValueError(f"the cell header {first!r} names {bare[0]}, which is neither a function nor a class")
    # A Triton kernel is a wrapper; its source is that of the function inside, decorator included.
    parts = [inspect.getsource(getattr(thing, "fn", thing)).rstrip() for thing in objects]
    return first + "\n" + "\n\n\n".join(parts)
