"""Which tensor is held from when to when: the engine's own events, and PyTorch's saved_tensors_hooks, as byte counts.

Both count storages, each once however many operations saved it, and neither counts the parameters: those are
held anyway.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import engine
from .engine import Node

Tensor = torch.Tensor


class Step(NamedTuple):
    """One operation that ran.

    kind: "forward", "again" (a checkpoint's second forward) or "backward".
    where: the label that was set when its forward ran. held: bytes saved while
    it runs, its own included.
    """

    kind: str
    op: str
    where: str
    held: int


@dataclass
class Holding:
    """A storage that is held while steps `start` to `end` run, both included.

    name: (where, op) of the operation that made it.
    """

    name: tuple[str, str]
    bytes: int
    start: int
    again: bool
    end: int = -1
    users: int = 0


def storage(tensor: Tensor) -> int:
    """The address of a tensor's memory: views of one tensor share it."""
    return tensor.untyped_storage().data_ptr()


@dataclass
class Timeline:
    """A watcher of the engine that keeps accounts of what the graph holds.

    without: tensors not to count, such as parameters.
    named: what to call tensors that no operation of the engine made.
    where: a label for the operations to come; set it as you go.
    """

    without: Iterable[Tensor]
    named: dict[str, Tensor] = field(default_factory=dict)
    where: str = ""
    steps: list[Step] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._skip = {storage(tensor) for tensor in self.without}
        self._open: dict[int, Holding] = {}
        # With a weak reference each: the address of a freed tensor goes to another one, its name must not.
        self._made: dict[int, tuple[StorageWeakRef, tuple[str, str]]] = {}
        for name, tensor in self.named.items():
            self._name(tensor, "", name)
        self._labels: dict[int, str] = {}
        self._depth = 0

    def __call__(self, event: str, node: Node, tensor: Tensor) -> None:
        if node.op in ("leaf", "constant"):
            return
        # In the order of saving, so that two runs keep their accounts in one order.
        sizes = {storage(t): t.untyped_storage().nbytes() for edge in node.edges or () for t in edge.saved}
        saved = {place: size for place, size in sizes.items() if place not in self._skip}
        if event == "forward":
            self._save(node, saved)
            if storage(tensor) not in self._open:
                self._name(tensor, self.where, node.op)
            self._step("again" if self._depth else "forward", node, self.where)
        elif event == "backward":
            self._step("backward", node, self._labels[node.number])
            self._depth += node.op == "checkpoint"
        else:
            self._depth -= node.op == "checkpoint"
            for place in saved:
                self._open[place].users -= 1
                if not self._open[place].users:
                    self._open.pop(place).end = len(self.steps) - 1

    def _name(self, tensor: Tensor, where: str, op: str) -> None:
        self._made[storage(tensor)] = StorageWeakRef(tensor.untyped_storage()), (where, op)

    def _save(self, node: Node, saved: dict[int, int]) -> None:
        self._labels[node.number] = self.where
        for place, size in saved.items():
            if place not in self._open:
                maker, name = self._made.get(place, (None, (self.where, node.op)))
                if maker is None or maker.expired():  # made inside this operation
                    name = self.where, node.op
                self._open[place] = Holding(name, size, len(self.steps), self._depth > 0)
                self.holdings.append(self._open[place])
            self._open[place].users += 1

    def _step(self, kind: str, node: Node, where: str) -> None:
        held = sum(holding.bytes for holding in self._open.values())
        self.steps.append(Step(kind, node.op, where, held))

    def held_since_forward(self) -> list[int]:
        """Of each step's held bytes, those that were saved before backward began."""
        first = [h for h in self.holdings if not h.again]
        return [sum(h.bytes for h in first if h.start <= i <= h.end) for i in range(len(self.steps))]

    @property
    def peak(self) -> int:
        """The most bytes held while any one step ran."""
        return max(step.held for step in self.steps)


@contextmanager
def watching(watcher: Callable[[str, Node, Tensor], None]) -> Iterator[None]:
    """Inside, the engine tells `watcher` every event."""
    engine.watch.append(watcher)
    try:
        yield
    finally:
        engine.watch.remove(watcher)


class HookCount(torch.autograd.graph.saved_tensors_hooks):
    """PyTorch's own account: bytes of the storages its graph holds, and every change.

    without: tensors not to count, such as parameters.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        skip = {storage(tensor) for tensor in without}
        users: dict[int, int] = {}
        self.held, self.changes = 0, [0]

        def change(place: int, users_more: int, size: int) -> None:
            before = users.get(place, 0)
            users[place] = before + users_more
            if (before == 0) != (users[place] == 0):
                self.held += size if users_more > 0 else -size
                self.changes.append(self.held)

        def pack(tensor: Tensor) -> Any:
            place, size = storage(tensor), tensor.untyped_storage().nbytes()
            kept = _Kept(tensor)
            if place not in skip:
                change(place, 1, size)
                weakref.finalize(kept, change, place, -1, size)
            return kept

        super().__init__(pack, lambda kept: kept.tensor)


@dataclass(eq=False)
class _Kept:
    """What stands in the graph for a saved tensor; PyTorch drops it when it frees the graph's node."""

    tensor: Tensor
