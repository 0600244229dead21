"""What stands for Triton where it cannot be had, so that kernel modules can be imported; a launch says why it fails."""

from typing import Any

SENTENCE = (
    "Triton is not installed here, so kernels cannot run: it exists for Linux; everything else in this chapter runs"
)


class Kernel:
    """In the place of a compiled kernel."""

    def __init__(self, function: Any) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(SENTENCE)

    def __call__(self, *arguments: Any) -> Any:
        raise RuntimeError(SENTENCE)


class triton:
    """The functions that launchers call before they launch, and the decorator."""

    jit = Kernel

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length() if n > 0 else 0

    @staticmethod
    def set_allocator(allocator: Any) -> None:
        """Nothing will be allocated."""


class tl:
    """`constexpr` is all that is named outside of a kernel."""

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value
