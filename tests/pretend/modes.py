"""The two modes of the pretended GPU: one sees every operation, one sees what Python asks of a tensor's device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .places import CPU, GPU, Places, tensors_in

aten = torch.ops.aten
CROSSING = {"copy_", "_to_copy", "set_", "_copy_from", "_copy_from_and_resize"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
STRICT = {"cat", "stack", "equal"}  # here not even a scalar may lie elsewhere
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
    "(when checking {}; pretended)"
)


class Operations(TorchDispatchMode):
    """Every operation: inputs in one place, outputs where the inputs are."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, seconds of it, at the first operation

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places, self.called, self.functions = places, 0, None
        self.latest = CPU  # where the latest operation was: what the engine makes by itself is for the next one

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):  # FlexAttention's backward
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                out = func(*args, **kwargs)
            return self.settle(func.name(), args, kwargs, out)
        if func.namespace not in ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional"):
            body = torch._library.custom_ops.OPDEFS.get(func._schema.name)
            plain = all(type(tensor) is torch.Tensor for tensor in tensors_in((args, kwargs)))
            if body is not None and plain:  # a custom operator's body is the book's: it runs with the modes awake
                with self, self.functions:
                    return body._init_fn(*args, **kwargs)
        name, given = func._schema.name.split("::")[1], tensors_in((args, kwargs))
        alone = CPU if self.called else None
        place = self._common(name, func._schema.is_mutable, args, given) if given else alone
        out = func(*args, **kwargs)
        self._put(place, given, out)
        return out

    def settle(self, name: str, args: tuple, kwargs: dict, out: Any) -> Any:
        """Check the places of what has run unseen, and put its results."""
        given = tensors_in((args, kwargs))
        self._put(self._common(name, False, args, given), given, out)
        return out

    def _put(self, place: str | None, given: list[torch.Tensor], out: Any) -> None:
        mine, self.latest = {id(t) for t in given}, place or self.latest
        for tensor in tensors_in((out,)):
            if id(tensor) not in mine:
                self.places.put(tensor, place)

    def _common(self, name: str, mutates: bool, args: tuple, given: list[torch.Tensor]) -> str | None:
        """The place of an operation's results; a RuntimeError where CUDA would raise one."""
        where = [(tensor, self.places.of(tensor)) for tensor in given]
        seen = {place for _, place in where if place}
        if len(seen) == 1:
            for tensor, place in where:
                if place is None:
                    self.places.put(tensor, *seen)
        if len(seen) < 2 or name in CROSSING:
            return where[0][1] if name in CROSSING else next(iter(seen), None)
        if name in INDEXED:
            self._indexed(name, args)
            return self.places.of(args[0])
        scalars = name not in STRICT
        if any(place == CPU and (tensor.dim() or not scalars) for tensor, place in where):
            raise RuntimeError(MIXED.format(name))
        if mutates and where[0][1] == CPU:
            raise RuntimeError(f"output with device cpu doesn't match the desired device cuda:0 (pretended; in {name})")
        return GPU

    def _indexed(self, name: str, args: tuple) -> None:
        """Indices may come from the CPU; what is indexed and what is written into it are in one place."""
        home = self.places.of(args[0])
        if home == CPU and any(self.places.of(index) == GPU for index in tensors_in((args[1],))):
            raise RuntimeError("indices should be either on cpu or on the device of the indexed tensor (pretended)")
        if name.strip("_").endswith(("put", "impl")) and args[2].dim() and self.places.of(args[2]) != home:
            raise RuntimeError(MIXED.format(name))


class _Move(torch.autograd.Function):
    """A copy in the other place; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, functions: "Functions", place: str) -> torch.Tensor:
        ctx.functions, ctx.origin = functions, functions.places.of(x) or CPU
        out = x.detach().clone(memory_format=torch.preserve_format)
        functions.places.put(out, place)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Move.apply(grad, ctx.functions, ctx.origin), None, None


class Functions(TorchFunctionMode):
    """What operations cannot see: `device=`, `.to`, `.device`, `.numpy`."""

    def __init__(self, places: Places, operations: Operations) -> None:
        super().__init__()
        self.places, self.operations = places, operations
        operations.functions = self
        tensor = torch.Tensor
        self.special: dict[Any, Callable] = {
            tensor.to: self._to, tensor.cuda: lambda t, *_, **__: self.move(t, GPU),
            tensor.cpu: lambda t, *_, **__: self.move(t, CPU),
            tensor.device.__get__: lambda t: torch.device(GPU, 0) if self.ask(t) == GPU else _real_device(t),
            tensor.is_cuda.__get__: lambda t: self.ask(t) == GPU,
            tensor.is_cpu.__get__: lambda t: self.ask(t) != GPU and _real_device(t).type == "cpu",
            tensor.get_device: lambda t: 0 if self.ask(t) == GPU else -1,
            tensor.numpy: self._numpy, tensor.__array__: self._numpy, tensor.pin_memory: lambda t, *_: t,
            tensor.new_tensor: self._new_tensor,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        special = self.special.get(func)
        if special is not None:
            return special(*args, **(kwargs or {}))
        if not kwargs:
            return self.call(func, *args)
        if kwargs.get("device") is not None:
            return self._placed(func, args, kwargs)
        if kwargs.get("generator") is not None:
            first = next(iter(tensors_in(args)), None)
            _need_generator(kwargs["generator"], CPU if first is None else self.places.of(first) or CPU)
        return self.call(func, *args, **kwargs)

    def ask(self, tensor: torch.Tensor) -> str | None:
        """The place of a tensor whose device somebody wants to know."""
        return self.places.settle(tensor, self.operations.latest)

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it; what it makes was asked for by Python, not by autograd's engine."""
        self.operations.called += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.operations.called -= 1

    def move(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """The tensor itself where it is there already, else a copy there."""
        if self.places.of(tensor) in (place, None):
            return tensor
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            out = tensor.clone()
            self.places.put(out, place)
            return out
        return _Move.apply(tensor, self, place)

    def _placed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A call with `device=`: made on the CPU, then said to be there."""
        device = torch.device(kwargs["device"])
        if device.type not in (GPU, CPU):
            return self.call(func, *args, **kwargs)
        _need_generator(kwargs.get("generator"), device.type)
        out = self.call(func, *args, **{**kwargs, "device": CPU})
        if not isinstance(out, torch.Tensor):
            return out
        # What shares memory with an argument (torch.as_tensor) is copied, what is new is only put there.
        old = {t.untyped_storage()._cdata for t in tensors_in((args,)) if self.places.of(t)}
        if out.device.type == CPU and self.places.of(out) != device.type:
            if out.untyped_storage()._cdata in old or _from_numpy(args):
                return self.move(out, device.type)
            self.places.put(out, device.type)
        return out

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            return self.move(self.call(torch.Tensor.to, tensor, other.dtype), self.places.of(other) or CPU)
        copy = kwargs.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type not in (GPU, CPU):
            return self.call(torch.Tensor.to, tensor, *args, **kwargs)
        options = {"memory_format": layout} if layout is not None else {}
        out = self.call(torch.Tensor.to, tensor, dtype or tensor.dtype, copy=copy, **options)
        return out if device is None else self.move(out, device.type)

    def _new_tensor(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.pop("device", None)
        out = self.call(torch.Tensor.new_tensor, tensor, *args, **kwargs)
        self.places.put(out, torch.device(device).type if device is not None else self.places.of(tensor) or CPU)
        return out

    def _numpy(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.places.of(tensor) == GPU:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first. (pretended)"
            )
        return self.call(torch.Tensor.numpy if not args else torch.Tensor.__array__, tensor, *args, **kwargs)


def _real_device(tensor: torch.Tensor) -> torch.device:
    return torch.Tensor.device.__get__(tensor)


def _from_numpy(args: tuple) -> bool:
    return bool(args) and type(args[0]).__module__ == "numpy"


def _need_generator(generator: Any, place: str) -> None:
    if generator is not None and getattr(generator, "place", CPU) != place:
        raise RuntimeError(f"Expected a '{place}' device type for generator but found '{generator.place}' (pretended)")
