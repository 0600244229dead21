"""What the backprop chapter measures: one training step's memory, operation by operation, by checkpoint length."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from llmbook.kit.compare import worst_error
from llmbook.kit.kernels import DEVICE
from llmbook.kit.measure import Case, Work

from .engine import Node
from .memory import watching
from .network import Problem, engine_step, timeline, torch_step

Tensor = torch.Tensor
LAYERS, ROWS, WIDTH, CLASSES = 16, 16384, 1024, 1000
EVERY = (None, 1, 2, 4, 8, 16)
SMALL: dict[str, Any] = {"size": (4, 16, 8, 5), "every": (None, 1, 2)}
MIB = 2**20


def cases(
    device: torch.device = DEVICE, size: tuple[int, int, int, int] = (LAYERS, ROWS, WIDTH, CLASSES),
    every: Sequence[int | None] = EVERY,
) -> Iterator[Case]:
    """One step of the engine per checkpoint length, PyTorch as its peer.

    A case's notes are about memory: what the graph is counted to hold at most; and on a GPU what the allocator
    reports for the engine and for PyTorch at the peak, and for the engine after each operation that ends a layer.
    """
    layers, rows, width, classes = size
    layer, head = 2 * rows * width * width, 2 * rows * width * classes
    for k in every:
        again = layers if k else 0
        # Operands and results of the products alone: one forward, two backward, and one again.
        hidden, last = 2 * rows * width + width**2, rows * (width + classes) + width * classes
        read = 4 * ((3 * layers + again) * hidden + 3 * last)
        yield Case(
            "training step",
            {"layers": layers, "rows": rows, "width": width, "dtype": "float32", "checkpoint every": k},
            partial(_make, size, k, device), 3 * (layers * layer + head) + again * layer, read,
            4 * ((5 * layers + 8) * rows * width + 8 * rows * classes + 4 * (layers * width**2 + width * classes)),
        )


def _make(size: tuple[int, int, int, int], k: int | None, device: torch.device) -> Work:
    problem = Problem(*size, dtype=torch.float32, device=device)
    reference = torch_step(problem)
    ours, theirs = partial(engine_step, problem, k), partial(torch_step, problem, k)

    def notes() -> dict[str, Any]:
        counted = {"graph MiB, counted": round(timeline(problem, k).peak / MIB)}
        return counted | (measured(ours, theirs) if device.type == "cuda" else {})

    return Work(ours, partial(_error, reference=reference), {"PyTorch": theirs}, notes=notes)


def measured(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, Any]:
    """MiB above what was allocated before a step: each one's peak, and the engine's course."""
    found: dict[str, Any] = {}
    for name, step in (("ours", ours), ("PyTorch's", theirs)):
        step()  # cuBLAS allocates its workspace once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        found[f"peak MiB, {name}"] = round((torch.cuda.max_memory_allocated() - before) / MIB)
    before = torch.cuda.memory_allocated()
    course = by_step(ours, torch.cuda.memory_allocated)
    found["MiB by layer, ours"] = [round((after - before) / MIB) for op, after in course if op == "add"]
    return found


def by_step(run: Callable[[], Any], read: Callable[[], int]) -> list[tuple[str, int]]:
    """(operation, what `read` says as it starts backward or has run forward), in the order of a run."""
    found: list[tuple[str, int]] = []

    def watcher(event: str, node: Node, tensor: Tensor) -> None:
        if event != "freed" and node.op not in ("leaf", "constant"):
            found.append((node.op, read()))

    with watching(watcher):
        run()
    return found


def _error(gradients: list[Tensor], reference: list[Tensor]) -> tuple[float, float]:
    """The worst parameter's error against PyTorch's own gradient without checkpoints."""
    return worst_error(zip(gradients, reference, strict=True)), 1e-4
