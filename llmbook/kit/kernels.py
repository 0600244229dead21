"""Triton, importable anywhere: compiled where there is a GPU, interpreted on a CPU where there is none.

Kernel modules import `triton` and `tl` from here, because the interpreter has to be chosen before Triton is first
imported. A process that interprets cannot compile; `llmbook.kit.ahead` therefore compiles in one of its own. Where
Triton cannot be had, AVAILABLE is false, kernel modules can be imported, and a launch says why it cannot run.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from .generations import generation

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.10 will stop fusing multiply and add unless asked to; the book's kernels are written for fusion.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # it exists for Linux; the rest of the book runs without it
    from .without_triton import tl, triton

    AVAILABLE = False

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


if INTERPRETED:

    @triton.jit
    def dot(a, b):
        # The interpreter multiplies the bit patterns of bf16 as integers (Triton 3.9 and before).
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")

else:

    @triton.jit
    def dot(a, b):
        """a @ b accumulated in fp32; fp32 operands are not rounded to tf32."""
        return tl.dot(a, b, input_precision="ieee")


__all__ = [
    "AVAILABLE", "DEVICE", "INTERPRETED", "Build", "capability", "dot", "need_dtype", "need_same_device", "sized",
    "tl", "triton",
]


class Build:
    """A kernel with everything needed to compile it without a GPU.

    Args:
        kernel: the `@triton.jit` function.
        signature: argument name → Triton type ("*fp16", "i32", "fp32", a tuple of them); constants are left out.
        constants: `tl.constexpr` name → value, for the compute capability it is given (75, 80, …), as launchers do.
        num_warps, num_stages: launch options, as the launcher chooses them.
        options: launch options that depend on the compute capability, instead of those two.
        targets: compute capabilities × 10 that the kernel is for; None for every generation.
    """

    def __init__(
        self, kernel: Any, signature: dict[str, Any], constants: Callable[[int], dict[str, Any]], *,
        num_warps: int = 4, num_stages: int = 2, options: Callable[[int], dict[str, int]] | None = None,
        targets: tuple[int, ...] | None = None,
    ) -> None:
        self.kernel, self.signature, self.constants, self.targets = kernel, signature, constants, targets
        self.options = options or (lambda sm: {"num_warps": num_warps, "num_stages": num_stages})


def capability() -> int:
    """Compute capability × 10 of the GPU that kernels run on; 80 stands for the interpreter, which has none."""
    if DEVICE.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def need_same_device(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors that the kernels cannot reach, in one sentence; None is an argument that was not given.

    Raises:
        ValueError: tensors on different devices, or not where kernels run here.
    """
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1 or any(place.type != DEVICE.type for place in places.values()):
        listed = ", ".join(f"{name} is on {place}" for name, place in places.items())
        raise ValueError(f"kernels run on {DEVICE.type} here, but {listed}: move them with .to(DEVICE)")


def need_dtype(*allowed: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """Refuse dtypes that a kernel does not take, and bf16 where the GPU has none, in one sentence.

    Args:
        allowed: what the tensors may be, all of them the same.
        tensors: by name; None is an argument that was not given.

    Raises:
        ValueError: another dtype, several, or bf16 before sm_80.
    """
    found = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    names = ", ".join(found)
    if len(set(found.values())) > 1 or not set(found.values()) <= set(allowed):
        wanted, given = (", ".join(str(dtype)[6:] for dtype in some) for some in (allowed, found.values()))
        verb = "be" if len(allowed) == 1 else "share one of" if len(found) > 1 else "be one of"
        raise ValueError(f"{names} must {verb} {wanted}, not {given}")
    if torch.bfloat16 in found.values() and not generation(capability()).bf16:
        raise ValueError(f"sm_{capability()} has no bf16: convert {names} to float16")


def sized(interpreted: int, compiled: int) -> int:
    """A size for each way kernels run: the interpreter is a thousand times slower, and on few a GPU is idle."""
    return compiled if AVAILABLE and not triton.knobs.runtime.interpret else interpreted
