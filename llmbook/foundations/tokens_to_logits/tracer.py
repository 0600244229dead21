"""A shape tracer: what every operation of any `nn.Module` reads, writes, allocates and computes, while it runs.

Forward hooks know which module is running, a `TorchDispatchMode` sees each operation below autograd. FLOPs come from
PyTorch's own formulas, those of `torch.utils.flop_counter`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from .flop import FORMULAS, flop_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class Spec:
    """A tensor without its numbers.

    bytes: elements × bytes per element, whether or not the memory is its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def specs(found: list[Tensor]) -> tuple[Spec, ...]:
    return tuple(Spec(tuple(t.shape), t.dtype, t.numel() * t.element_size()) for t in found)


@dataclass(frozen=True)
class Op:
    """One operation that ran.

    Attributes:
        name: as PyTorch calls it, "aten.mm".
        module: path of the innermost module that was running, or "backward".
        flop: by PyTorch's formulas; matrix products, convolutions and attention
            have one, everything else (a fused LSTM too) counts 0.
        new: bytes of memory it allocated for its outputs.
        held: bytes allocated since the trace began and still alive after it.
        view: its outputs lie in memory that was there before, as they do for
            an operation in place; so `new` is 0.
        writes: it changes one of its inputs.
        kept: what `keep` made of its first output.
    """

    name: str
    module: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    flop: int
    new: int
    held: int
    view: bool
    writes: bool
    kept: Any = None


@dataclass
class Call:
    """One call of a module, from its hooks; no outputs if it did not return."""

    module: str
    kind: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Where a run stopped: no operation if the module's own Python code raised."""

    module: str
    op: str | None
    inputs: tuple[Spec, ...]
    error: str

    @property
    def place(self) -> str:
        what = f"{self.op} " if self.op else "its own code, after inputs "
        return f"failed in {self.module}, {what}{', '.join(map(str, self.inputs)) or 'none'}"

    def __str__(self) -> str:
        return f"{self.place}: {self.error}"


def _end(words: str, most: int) -> str:
    return words if len(words) <= most else "…" + words[1 - most :]


class Tracer:
    """Records what runs inside `with Tracer(model) as log:`, backward passes too.

    Args:
        root: the module whose submodules' names are used as paths.
        keep: called with each operation's first output; its result is stored as
            `Op.kept`. Copy what will change (`tensor.clone()`).

    Attributes:
        ops, calls: operations and module calls in the order in which they began.
        failure: where it stopped, or None. What was raised is raised on, with
            this place as a note.

    Memory is told apart by storage: a view's `bytes` are those it describes, its
    `new` is 0. Parameters, buffers and inputs existed before and are never held.
    A module with several names has all of them, joined by "=", unless the
    running parent decides. PyTorch's fused encoder fast path is switched off
    meanwhile: inside it there is no operation to see.
    """

    def __init__(
        self, root: nn.Module, keep: Callable[[Tensor], Any] | None = None
    ) -> None:
        self.root, self.keep = root, keep
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.failure: Failure | None = None
        self._stack: list[Call] = []
        self._names: dict[nn.Module, list[str]] = {}
        self._handles: list[Any] = []
        self._outside: dict[int, StorageWeakRef] = {}
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}
        self._raised: list[tuple[BaseException, Failure]] = []
        self._backward = ModuleTracker()  # never entered: only its `is_bw` is used

    def __enter__(self) -> Self:
        if self._handles:
            raise ValueError("this Tracer is already recording: make a second one for a trace inside a trace")
        self.ops, self.calls, self.failure = [], [], None
        self._raised, self._memory, self._outside = [], {}, {}
        self._names = {}
        for name, module in self.root.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name or type(module).__name__)
        for module in self._names:
            self._handles += [
                module.register_forward_pre_hook(self._enter_module, with_kwargs=True),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
        for tensor in [*self.root.parameters(), *self.root.buffers()]:
            self._see(tensor, outside=True)
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._outer = sys.exception()
        self._mode = Listener(self)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, traceback)
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack = [], []
        cause, seen = error, {id(known): failure for known, failure in self._raised}
        while error is not None and cause is not None:
            # The first cause that was seen here says where it began.
            self.failure = seen.get(id(cause), self.failure)
            cause = cause.__cause__ or cause.__context__
        if error is not None and self.failure:
            error.add_note(f"shape tracer: {self.failure} ({len(self.ops)} operations had run)")
        self._raised, self._memory, self._outside = [], {}, {}

    @property
    def flop(self) -> int:
        """FLOPs of everything recorded."""
        return sum(op.flop for op in self.ops)

    @property
    def peak(self) -> int:
        """The most bytes held after any operation."""
        return max((op.held for op in self.ops), default=0)

    def table(self, views: bool = False) -> str:
        """Everything recorded as text, a line per operation, and where it failed.

        views: also the operations that only look at memory in another way.
        Of an operation's outputs the first is shown, and how many follow.
        """
        rows = [("module", "operation", "output", "dtype", "new bytes", "FLOP")]
        for op in self.ops:
            if op.view and not op.writes and not views:
                continue
            first, *more = op.outputs or (None,)
            shape = f"{list(first.shape)}" + f" +{len(more)}" * bool(more) if first else "a number"
            dtype = str(first.dtype).removeprefix("torch.") if first else ""
            name = op.name.removeprefix("aten.")
            rows.append((_end(op.module, 28), _end(name, 24), shape, dtype, f"{op.new:,}", f"{op.flop:,}"))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [" ".join(
            word.rjust(n) if i > 3 else word.ljust(n) for i, (word, n) in enumerate(zip(row, wide, strict=True))
        ).rstrip() for row in rows]
        if self.failure:
            lines += [f"✗ {self.failure.place}", f"  {self.failure.error}"]
        return "\n".join(lines)

    def _path(self, module: nn.Module) -> str:
        names = self._names[module]
        inside = [name for name in names if self._stack and name.startswith(self._stack[-1].module + ".")]
        return "=".join(inside or names)

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(self._path(module), type(module).__name__, specs(tensors((args, kwargs))))
        self.calls.append(call)
        self._stack.append(call)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._stack.pop()
        error = sys.exception()
        if error is None or error is self._outer:
            call.outputs = specs(tensors(output))
        else:
            self._note(error, Failure(call.module, None, call.inputs, f"{type(error).__name__}: {error}"))

    def _note(self, error: BaseException, failure: Failure) -> None:
        if all(known is not error for known, _ in self._raised):  # the innermost place is noted first
            self._raised.append((error, failure))

    def _where(self) -> str:
        if self._stack:
            return self._stack[-1].module
        return "backward" if self._backward.is_bw else "(outside)"

    def _see(self, tensor: Tensor, outside: bool = False) -> int:
        """Bytes of a tensor's storage if it is seen for the first time, else −1."""
        if tensor.layout != torch.strided:
            return 0  # a sparse tensor's storage is that of its parts
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)  # while it lives, its address is not used again
        if ref.cdata in self._memory or ref.cdata in self._outside:
            return -1
        if outside:
            self._outside[ref.cdata] = ref
            return 0
        self._memory[ref.cdata] = (ref, storage.nbytes())
        return storage.nbytes()

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and write it down; called by the `Listener`."""
        packet, name = func.overloadpacket, str(func.overloadpacket)
        given = tensors((args, kwargs))
        inputs = specs(given)
        for tensor in given:
            self._see(tensor, outside=True)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._note(error, Failure(self._where(), name, inputs, f"{type(error).__name__}: {error}"))
            raise
        results = tensors(out)
        fresh = [size for size in map(self._see, results) if size >= 0]
        self._memory = {at: known for at, known in self._memory.items() if not known[0].expired()}
        held = sum(size for _, size in self._memory.values())
        self.ops.append(Op(
            name, self._where(), inputs, specs(results), flop_of(packet, args, kwargs, out), sum(fresh), held,
            not fresh, func._schema.is_mutable, self.keep(results[0]) if self.keep and results else None,
        ))
        return out


class Listener(TorchDispatchMode):
    """Hands every operation below autograd to a tracer, whole or in parts."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in FORMULAS:
            # Without autograd PyTorch hands over `linear` whole; its parts
            # (t, view, mm) are what the formulas know.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.tracer.record(func, args, kwargs)
