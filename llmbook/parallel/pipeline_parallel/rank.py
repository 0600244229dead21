"""A rank of a pipeline, operations aside: its messages in order, and an account of what it holds."""

import contextlib
import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmbook.kit.ranks import Comm

from .schedules import Op, Schedule, crossings
from .simulate import Key, simulate

Loss = Callable[[Tensor, Tensor], Tensor]
ORDER = {"F": 1.0, "B": 2.0, "R": 1.0, "I": 1.0, "W": 1.0}


@dataclass
class Kept:
    """What a stage keeps of a micro-batch from its forward to its backward."""

    input: Tensor
    root: Any = None  # where the backward starts; the output itself need not stay
    random: Any = None  # the state of the random streams before the forward, so that dropout repeats itself
    storages: dict[int, int] = field(default_factory=dict)  # address → bytes

    def __post_init__(self) -> None:
        self.storages[self.input.untyped_storage().data_ptr()] = self.input.nbytes


class Rank:
    """One rank during one step: its stages, its messages, and the account of what it holds."""

    def __init__(
        self, comm: Comm, schedule: Schedule, modules: Mapping[int, nn.Module] | Sequence[nn.Module],
        inputs: Tensor, targets: Tensor, loss: Loss, hidden: Sequence[int] | None, pace: Mapping[str, float],
    ) -> None:
        if comm.size != schedule.ranks:
            raise ValueError(f"{schedule.name} is for {schedule.ranks} ranks, but {comm.size} run")
        if len(inputs) != len(targets) or len(inputs) < schedule.micros:
            raise ValueError(
                f"{schedule.micros} micro-batches need as many inputs as targets and one each at least; "
                f"there are {len(inputs)} inputs and {len(targets)} targets"
            )
        self.comm, self.schedule, self.loss, self.pace = comm, schedule, loss, pace
        self.last, self.batch = schedule.stages - 1, len(inputs)
        mine = [stage for stage, rank in enumerate(schedule.placement) if rank == comm.rank]
        self.modules = {stage: modules[stage].to(comm.device) for stage in mine}
        self.inputs = inputs.to(comm.device).tensor_split(schedule.micros)
        self.targets = targets.to(comm.device).tensor_split(schedule.micros)
        self.hidden = tuple(inputs.shape[1:] if hidden is None else hidden)
        weights = [w for module in self.modules.values() for w in (*module.parameters(), *module.buffers())]
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), inputs.dtype)
        self.kept: dict[tuple[int, int], Kept] = {}
        self.booked: dict[tuple[int, int], tuple[bool, int]] = {}  # of each of them: all activations there? bytes
        self.full, self.held = 0, 0  # the sums of what is booked
        self.inbox: dict[Key, Tensor] = {}
        self.lost: Tensor | float = 0.0
        self.peak_bytes, self.peak_full, self.peak_inputs = 0, 0.0, 0
        self.wire = wire_order(schedule, comm.rank)

    def run(self) -> None:
        """Do the rank's operations in order, each by the method named after its kind."""
        for op in self.schedule.ops[self.comm.rank]:
            act = getattr(self, op.kind, None)
            if act is None:
                raise ValueError(f"{type(self).__name__} cannot do {op}: it has no method {op.kind}")
            act(op)
        self.comm.flush()

    def stage_input(self, op: Op) -> Tensor:
        """The micro-batch itself on stage 0, else what the stage before gave."""
        return self.inputs[op.micro] if op.stage == 0 else self.receive(("F", op.stage - 1, op.micro))

    def output(self, op: Op, y: Tensor) -> None:
        """To the next stage; from the last stage, its share of the loss."""
        if op.stage == self.last:
            self.lost = self.lost + y.detach()
        else:
            self.pass_on(op, y, op.stage + 1)

    def output_gradient(self, op: Op) -> Tensor | None:
        """What the stage after gave; None on the last stage, whose output is the loss."""
        return None if op.stage == self.last else self.receive(("I", op.stage + 1, op.micro))

    def input_gradient(self, op: Op, gradient: Tensor | None) -> None:
        """To the stage before, if there is one."""
        if op.stage:
            if gradient is None:
                raise ValueError(f"stage {op.stage} detaches: no gradient of its output reaches its input")
            self.pass_on(op, gradient, op.stage - 1)

    def build(self, op: Op, kept: Kept) -> Tensor:
        """Apply the stage with autograd on, counting the bytes it saves, each storage once, weights aside.

        Only a first stage without a weight to learn may give an output without a graph; its root stays None.
        """
        if op.stage:
            kept.input.requires_grad_()

        def note(tensor: Tensor) -> tuple[Tensor, int]:
            where = tensor.untyped_storage()
            if where.data_ptr() not in self.weights:
                kept.storages.setdefault(where.data_ptr(), where.nbytes())
            return tensor, tensor._version

        def unchanged(saved: tuple[Tensor, int]) -> Tensor:  # with hooks, autograd itself does not check
            if saved[0]._version != saved[1]:
                raise RuntimeError(f"{op} saved a tensor that was modified in place before its backward")
            return saved[0]

        with torch.autograd.graph.saved_tensors_hooks(note, unchanged):
            y = self.apply(op, kept.input)
        if y.requires_grad:
            kept.root = torch.autograd.graph.get_gradient_edge(y)
        elif op.stage or any(weight.requires_grad for weight in self.modules[op.stage].parameters()):
            raise ValueError(f"stage {op.stage} detaches: its output has no graph to learn by")
        return y.detach()

    def apply(self, op: Op, x: Tensor) -> Tensor:
        """The stage's output [micro, *hidden]; the last stage's is the micro-batch's share of the loss."""
        y: Tensor = self.modules[op.stage](x)
        if op.stage == self.last:
            return self.loss(y, self.targets[op.micro]) * (len(x) / self.batch)
        if y.shape != (len(x), *self.hidden):
            wanted = (len(x), *self.hidden)
            raise ValueError(f"stage {op.stage} gave {tuple(y.shape)}, but {wanted} was to cross")
        return y

    def pass_on(self, op: Op, tensor: Tensor, stage: int) -> None:
        """Give an output (or an input's gradient) to the stage that waits for it, here or on another rank."""
        key, to = (_gives(op), op.stage, op.micro), self.schedule.placement[stage]
        if to == self.comm.rank:
            self.inbox[key] = tensor.detach()
        else:
            self.keep_order(to, key)
            self.comm.send(tensor, to, self.tag(key))

    def receive(self, key: Key) -> Tensor:
        """The result of `key`, an F or an I (a B's result is I's), by whatever rank it was computed."""
        if (source := self.schedule.placement[key[1]]) != self.comm.rank and key not in self.inbox:
            self.keep_order(source, key)
        return self.inbox.pop(key)

    def keep_order(self, peer: int, until: Key) -> None:
        """Receive from `peer` all that comes before the message `until`, and it too if it comes in.

        NCCL matches messages by order, not by tag; so two ranks must agree on the order of all that passes
        between them. They take the simulator's.
        """
        key = None
        while key != until:
            key = self.wire[peer].popleft()
            if self.schedule.placement[key[1]] == peer:
                into = torch.empty(
                    len(self.inputs[key[2]]), *self.hidden, dtype=self.dtype, device=self.comm.device
                )
                self.inbox[key] = self.comm.recv(into, peer, self.tag(key))

    def tag(self, key: Key) -> int:
        kind, stage, micro = key
        return 2 * (stage * self.schedule.micros + micro) + (kind == "I")

    @contextlib.contextmanager
    def logged(self, op: Op) -> Iterator[None]:
        """Log the operation's time (stretched to its `pace`, if it has one), then count what is held."""
        with self.comm.log(f"{op.kind} {op.stage} {op.micro}"):
            began = time.monotonic()  # after the log's own start, or a pause between the two is missing from its span
            yield
            rest = began + self.pace.get(op.kind, 0.0) / self.schedule.chunks - time.monotonic()
            time.sleep(max(0.0, rest))
        self.book((op.stage, op.micro))

    def book(self, key: tuple[int, int]) -> None:
        """Count what is held of one micro-batch on one stage; the others have not changed since they were counted."""
        was_full, was_held = self.booked.pop(key, (False, 0))
        if kept := self.kept.get(key):
            self.booked[key] = kept.root is not None, sum(kept.storages.values())
        full, held = self.booked.get(key, (False, 0))
        self.full, self.held = self.full + full - was_full, self.held + held - was_held
        self.peak_full = max(self.peak_full, self.full / self.schedule.chunks)
        self.peak_inputs = max(self.peak_inputs, len(self.kept) if self.schedule.recompute else 0)
        self.peak_bytes = max(self.peak_bytes, self.held)


def wire_order(schedule: Schedule, rank: int) -> dict[int, deque[Key]]:
    """For each other rank, all messages between it and `rank` in the order in which the simulator sends them.

    Raises:
        ScheduleError: the schedule would wait forever.
    """
    return {peer: deque(keys) for peer, keys in _orders(schedule)[rank].items()}


@functools.lru_cache(maxsize=4)  # a step is simulated once, however many are done
def _orders(schedule: Schedule) -> list[dict[int, list[Key]]]:
    """For each rank, what `wire_order` says of it."""
    ends = {span.op: span.end for mine in simulate(schedule, ORDER).spans for span in mine}
    orders: list[dict[int, list[Key]]] = [defaultdict(list) for _ in schedule.ops]
    for op, to in sorted(crossings(schedule), key=lambda crossing: (ends[crossing[0]], crossing[0])):
        source, key = schedule.placement[op.stage], (_gives(op), op.stage, op.micro)
        orders[source][to].append(key)
        orders[to][source].append(key)
    return orders


def _gives(op: Op) -> str:
    return "F" if op.kind == "F" else "I"


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
