"""How far a result is from a reference: piece by piece, so that no reference has to fit beside what it checks."""

from collections.abc import Iterable, Iterator

import torch

Tensor = torch.Tensor
PIECE = 2**24  # numbers of a reference at a time: 134 MB in float64

# Compute capabilities × 10 whose float64 runs at half of float32's rate, or on tensor cores; elsewhere it has 1/32 or
# 1/64 of it (CUDA C++ Programming Guide, "Arithmetic Instructions").
FAST_DOUBLE = {60, 70, 80, 90, 100}


def sm(device: torch.device) -> int:
    """Compute capability × 10 of a GPU; 80 stands for a CPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def half(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it, else fp16: Turing (sm_75) and before have no bf16."""
    return torch.bfloat16 if sm(device) >= 80 else torch.float16


def reference_dtype(device: torch.device) -> torch.dtype:
    """float64 where it is quick; float32 on GPUs where a large product would take minutes in float64."""
    return torch.float64 if sm(device) in FAST_DOUBLE else exact_float32()


def exact_float32() -> torch.dtype:
    """float32, for references beside half precision: its products are off by about 1e-6, fp16's rounding is 5e-4.

    Raises:
        ValueError: float32 products are set to be rounded to tf32, so they are no reference.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            "a float32 reference would be rounded to tf32: call torch.set_float32_matmul_precision('highest')"
        )
    return torch.float32


def wide(tensor: Tensor) -> Tensor:
    """A tensor in its device's `reference_dtype`, without its graph."""
    return tensor.detach().to(reference_dtype(tensor.device))


def blocks(rows: int, each: int) -> Iterator[slice]:
    """Slices of `rows` rows of `each` numbers: `PIECE` numbers at a time, one row at least."""
    step = max(1, PIECE // max(1, each))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def need_same_shape(out: Tensor, reference: Tensor) -> None:
    """Refuse what broadcasting would compare.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != reference.shape:
        raise ValueError(f"the result is {list(out.shape)}, but the reference is {list(reference.shape)}")


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; NaN stays NaN, and so fails every bound.

    Raises:
        ValueError: the shapes differ.
    """
    need_same_shape(out, reference)
    out, reference = out.detach().double(), reference.detach().double()
    difference = out - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-300))


def piece_error(out: Tensor, reference: Tensor) -> float:
    """The larger of two relative errors: of the norm, and of the largest element.

    max|out − reference| / max|reference| sees one wrong number among millions, which the norm does not.
    """
    norm = relative_error(out, reference)
    if not out.numel():
        return norm
    most = (out.detach().double() - reference.detach().double()).abs().max()
    largest = float(most / reference.detach().double().abs().max().clamp_min(1e-300))
    return largest if largest != largest else max(norm, largest)


def worst(errors: Iterable[float]) -> float:
    """The largest of some errors; NaN if one is NaN, or if there is none: nothing was compared.

    Takes one at a time and ends at the first NaN, so that errors may come from pieces made one after the other.
    """
    most = float("nan")
    for error in errors:
        if error != error:
            return error
        most = error if most != most else max(most, error)
    return most


def worst_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The worst `piece_error` of (result, reference) pieces, made one after the other."""
    return worst(piece_error(out, reference) for out, reference in pairs)
