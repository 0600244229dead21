"""A GPU that is not there: torch believes in one, tensors remember where they are, and kernels run in the interpreter.

`start(sm)` has to run before torch's first user, `llmbook` above all; it is for the tests, and no part of the library.
It sees tensors in the wrong place. It sees no compile error, no race and no limit of memory.
"""

from .start import GPUS, start

__all__ = ["GPUS", "start"]
