"""What the backprop chapter measures: one training step's memory, operation by operation, by checkpoint length."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from llmbook.kit.measure import Case, relative_error

from .engine import Node
from .memory import watching
from .network import Problem, engine_step, timeline, torch_step

Tensor = torch.Tensor
LAYERS, ROWS, WIDTH, CLASSES = 16, 16384, 1024, 1000
EVERY = (None, 1, 2, 4, 8, 16)
MIB = 2**20


def cases(
    device: torch.device | None = None, size: tuple[int, int, int, int] = (LAYERS, ROWS, WIDTH, CLASSES),
    every: Sequence[int | None] = EVERY,
) -> Iterator[Case]:
    """One step of the engine per checkpoint length, PyTorch as its peer.

    A case's sizes carry the memory: what the graph is counted to hold at most; and on a GPU what the allocator
    reports for the engine and for PyTorch at the peak, and for the engine after each operation that ends a layer.
    """
    device = device or torch.device("cuda")
    problem = Problem(*size, dtype=torch.float32, device=device)
    reference = torch_step(problem)
    layers, rows, width, classes = size
    forward = 2 * rows * width * (layers * width + classes)
    for k in every:
        ours, theirs = partial(engine_step, problem, k), partial(torch_step, problem, k)
        counted = timeline(problem, k).peak
        sizes: dict[str, Any] = {
            "layers": layers, "rows": rows, "width": width, "dtype": "float32", "checkpoint every": k,
            "graph MiB, counted": round(counted / MIB),
        }
        if device.type == "cuda":
            sizes |= measured(ours, theirs)
        again = 2 * rows * width * width * layers if k else 0
        yield Case(
            "training step", sizes, ours, partial(_error, reference=reference), 3 * forward + again, counted,
            {"PyTorch": theirs},
        )


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
    """The worst parameter's relative error against PyTorch's own gradient without checkpoints."""
    return max(relative_error(ours, theirs) for ours, theirs in zip(gradients, reference, strict=True)), 1e-4
