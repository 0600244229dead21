"""What a forked process would have found in this one, packed for a process that was not forked from it.

cloudpickle sends notebook code (functions, closures, classes) by value and modules by name. Added here: what pickle
drops without a word (gradients, storages that several tensors share) or would change (a graph, a device); the state of
the process; and results' classes, which come back as the sender's own.
"""

import functools
import io
import linecache
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

try:
    import cloudpickle
except ImportError:  # a bare GPU machine, where torchrun starts the ranks and nothing is packed
    cloudpickle = None

Base = cloudpickle.Pickler if cloudpickle else pickle.Pickler


class Outgoing(Base):  # type: ignore[misc, valid-type]
    """A pickler of several parts, which notes what it sends by value (`own`) and which modules by name."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5)
        self.own: list[Any] = []
        self.modules: dict[str, None] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            _refuse(obj)
        if (reduced := _reduce(obj)) is not NotImplemented:
            return reduced
        if isinstance(obj, CodeType):  # cloudpickle drops the cell's name, and with it a traceback's lines
            return _named, (obj.co_filename, *self.dispatch_table[CodeType](obj))
        if isinstance(obj, functools.cached_property):  # holds a lock before Python 3.12
            return _cached, (obj.func, obj.attrname)
        reduced = super().reducer_override(obj)
        if isinstance(obj, ModuleType):
            self.modules[obj.__name__] = None
        elif isinstance(obj, type | FunctionType):
            if reduced is NotImplemented:
                self.modules[obj.__module__] = None
            else:
                self.own.append(obj)
        return reduced

    def sources(self) -> dict[str, Any]:
        """The text of notebook cells that own functions stand in, so that a rank's traceback can show their lines."""
        files = {function.__code__.co_filename for function in self.own if isinstance(function, FunctionType)}
        cached = {file: linecache.cache[file] for file in files if file in linecache.cache}
        return {file: entry for file, entry in cached.items() if len(entry) == 4 and entry[1] is None}


def _refuse(tensor: torch.Tensor) -> None:
    if tensor.device.type not in ("cpu", "meta"):
        where = f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}"
        raise ValueError(f"{where}, and ranks compute on the CPU: send .cpu()")
    if tensor.grad_fn is not None:
        where = f"a tensor of shape {tuple(tensor.shape)} hangs on the graph that made it"
        raise ValueError(f"{where}, and a graph stays in its process: detach() it")


def _reduce(obj: Any) -> Any:
    """How tensors and their storages are pickled here; NotImplemented for everything else."""
    if isinstance(obj, torch.Tensor):
        rebuild, arguments, *rest = obj.__reduce_ex__(5)
        if isinstance(arguments[0], torch.UntypedStorage):  # of a new dtype (float8, uint16): rebuilt from a typed one
            arguments = _typed(arguments[0], torch.uint8), *arguments[1:]
        return _tensor, (rebuild, arguments, obj.grad if obj.is_leaf else None), *rest
    if isinstance(obj, torch.storage.TypedStorage):  # made anew for each tensor; what they share is inside
        return _typed, (obj._untyped_storage, obj.dtype)
    if isinstance(obj, torch.UntypedStorage):
        return _storage, (torch.empty(0, dtype=torch.uint8, device="cpu").set_(obj).numpy(),)
    return NotImplemented


def _tensor(rebuild: Callable, arguments: tuple, grad: torch.Tensor | None) -> torch.Tensor:
    tensor = rebuild(*arguments)
    if grad is not None:
        tensor.grad = grad
    return tensor


def _typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _storage(array: np.ndarray) -> torch.UntypedStorage:
    return torch.from_numpy(array).clone().untyped_storage()  # cloned, to be aligned as torch's own


def _named(file: str, make: Callable, arguments: tuple) -> CodeType:
    return make(*arguments).replace(co_filename=file)


def _cached(function: Callable, name: str) -> functools.cached_property:
    made = functools.cached_property(function)
    made.__set_name__(object, name)
    return made


def installed(name: str) -> bool:
    """Whether it is a package's module: those do not change while a notebook is open, the reader's own files may."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def pack(function: Callable, args: tuple) -> tuple[bytes, list[Any], list[str]]:
    """The parcel for `unpack`; what in it went by value; the modules that it names.

    Raises:
        RuntimeError: cloudpickle is not there.
        ValueError: something cannot be sent.
    """
    if cloudpickle is None:
        raise RuntimeError("ranks.run sends functions to its processes by cloudpickle; pip install cloudpickle")
    outgoing = Outgoing()
    outgoing.dump((list(sys.path), sys.argv, os.getcwd(), dict(os.environ)))
    try:
        outgoing.dump((function, args))
        outgoing.dump((outgoing.own, outgoing.sources(), _state()))
    except Exception as error:
        raise ValueError(
            f"ranks.run must send the function, its arguments and all that it refers to, but cannot: {error}"
        ) from error
    return outgoing.file.getvalue(), outgoing.own, list(outgoing.modules)


def unpack(parcel: bytes) -> tuple[Callable, tuple, list[Any], dict[str, Any]]:
    """The function, its arguments, what came by value, and the state for `adopt`; `sys.path` and folder are set."""
    incoming = pickle.Unpickler(io.BytesIO(parcel))
    sys.path[:], sys.argv, folder, environment = incoming.load()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    function, args = incoming.load()
    own, sources, state = incoming.load()
    linecache.cache.update(sources)
    for thing in own:  # where a rank's own pickling (all_gather_object, torch.save) looks for them
        if thing.__module__ == "__main__" and thing.__qualname__.isidentifier():
            setattr(sys.modules["__main__"], thing.__name__, thing)
    return function, args, own, state


def _state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(), "torch": torch.get_rng_state(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(), "numpy": np.random.get_state(), "random": random.getstate(),
        "depth": sys.getrecursionlimit(), "warnings": list(warnings.filters),
    }


def adopt(state: dict[str, Any]) -> None:
    """Be in the sender's state: what a function's outcome may depend on besides its arguments."""
    torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(state["grad"])
    if state["deterministic"]:  # asked for only then: it imports torch's compiler, five seconds' worth
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision(state["precision"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["random"])
    sys.setrecursionlimit(state["depth"])
    warnings.resetwarnings()
    warnings.filters.extend(state["warnings"])  # type: ignore[attr-defined]


class Results(pickle.Pickler):
    """A rank's results: what came from the caller by value goes back as its number there."""

    def __init__(self, file: io.BytesIO, own: list[Any]) -> None:
        super().__init__(file, protocol=5)
        self.numbers = {id(thing): number for number, thing in enumerate(own)}

    def persistent_id(self, obj: Any) -> int | None:
        return self.numbers.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        return _reduce(obj)


class Received(pickle.Unpickler):
    """The caller's end of `Results`."""

    def __init__(self, results: bytes, own: list[Any]) -> None:
        super().__init__(io.BytesIO(results))
        self.own = own

    def persistent_load(self, number: int) -> Any:
        return self.own[number]
