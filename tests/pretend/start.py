"""Make torch and Triton believe in a GPU, and put the modes in force."""

import os
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .modes import Functions, Operations
from .places import CPU, GPU, Places, tensors_in

# capability: name, GB, SMs (the datasheets' figures, as in `kit.hardware`)
GPUS = {
    75: ("Tesla T4", 16, 40), 80: ("NVIDIA A100-SXM4-80GB", 80, 108), 89: ("NVIDIA L4", 24, 58),
    90: ("NVIDIA H100 80GB HBM3", 80, 132), 100: ("NVIDIA B200", 180, 148),
    120: ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, 188),
}


def start(sm: int = 90) -> None:
    """From here on this process has a GPU of that compute capability × 10, in torch's eyes and in Triton's.

    Raises:
        RuntimeError: llmbook is imported already and has chosen to do without one.
        KeyError: no such capability in `GPUS`.
    """
    import sys

    if any(name.startswith("llmbook.") for name in sys.modules):
        raise RuntimeError("the pretended GPU must start before llmbook is imported; restart the process")
    places = Places()
    operations = Operations(places)
    functions = Functions(places, operations)
    _cuda(sm, places)
    _second_device()
    _python_bodies()
    _engine(places, functions)
    _compilers(operations)
    _triton(places)
    _small()
    functions.__enter__()
    operations.__enter__()


def _cuda(sm: int, places: Places) -> None:
    """`torch.cuda` as far as the book asks it."""
    name, gigabytes, multiprocessors = GPUS[sm]
    total = int(gigabytes * 1e9)
    properties = SimpleNamespace(
        name=name, major=sm // 10, minor=sm % 10, total_memory=total, multi_processor_count=multiprocessors,
        warp_size=32,
    )

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.at = 0.0

        def record(self, *_: Any) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.at - self.at)

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True

        wait = record

    def reset_peak(*_: Any) -> None:
        places.peak = places.allocated()

    def peak(*_: Any) -> int:
        places.allocated()
        return places.peak

    def nothing() -> Any:  # a new one each: torch's compiler keeps a table of functions and takes none twice
        return lambda *_, **__: None

    class Stream:
        cuda_stream, device = 0, torch.device(GPU, 0)

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def synchronize(self) -> None: ...

        def wait_stream(self, other: "Stream") -> None: ...

    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "get_device_capability": lambda *_: (sm // 10, sm % 10), "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: name, "is_bf16_supported": lambda *_, **__: sm >= 80,
        "synchronize": nothing(), "empty_cache": nothing(), "set_device": nothing(), "init": nothing(),
        "_lazy_init": nothing(),
        "_sleep": nothing(), "manual_seed": nothing(), "manual_seed_all": nothing(), "Event": Event,
        "current_stream": lambda *_: Stream(), "Stream": Stream, "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(), "mem_get_info": lambda *_: (total - places.allocated(), total),
        "memory_allocated": lambda *_: places.allocated(), "max_memory_allocated": peak,
        "memory_reserved": lambda *_: places.allocated(),
        "is_current_stream_capturing": lambda: False,
        "reset_peak_memory_stats": reset_peak, "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for key, value in answers.items():
        setattr(torch.cuda, key, value)
    torch.version.cuda = "pretended"

    class Generator(torch._C.Generator):
        def __new__(cls, device: Any = CPU) -> "Generator":
            made = super().__new__(cls, CPU)
            made.place = torch.device(device).type
            return made

    torch.Generator = Generator


def _second_device() -> None:
    """A device besides the CPU makes autograd start its threads, as CUDA does: whoever forks after that finds out."""

    class Module(torch.utils.backend_registration._DummyBackendModule):
        def _is_in_bad_fork(self) -> bool:
            return False

        def manual_seed_all(self, seed: int) -> None: ...

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        def get_rng_state(self, *_: Any) -> torch.Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, *_: Any) -> None: ...

    torch.utils.backend_registration._setup_privateuseone_for_python_backend("npy", backend_module=Module())


def _python_bodies() -> None:
    """Functions of torch written in Python switch a function mode off for their bodies; here they keep it on.

    They ask `has_torch_function`, which says yes while a mode is in force; for plain tensors the answer becomes no.
    """
    import torch._tensor
    import torch.autograd
    import torch.functional
    import torch.nn.functional
    import torch.nn.init

    plain = (torch.Tensor, torch.nn.Parameter)

    def many(asked: Any) -> Any:
        return lambda values: asked(values) if any(type(v) not in plain for v in values if _tensor_like(v)) else False

    def one(asked: Any) -> Any:
        return lambda value: False if type(value) in plain else asked(value)

    def several(asked: Any) -> Any:
        return lambda *values: asked(*values) if any(type(v) not in plain for v in values if _tensor_like(v)) else False

    wraps = {"has_torch_function": many, "has_torch_function_unary": one, "has_torch_function_variadic": several}
    for module in (torch._tensor, torch.autograd, torch.functional, torch.nn.functional, torch.nn.init):
        for key, wrap in wraps.items():
            if hasattr(module, key):
                setattr(module, key, wrap(getattr(module, key)))


def _tensor_like(value: Any) -> bool:
    return hasattr(type(value), "__torch_function__")


def _engine(places: Places, functions: Functions) -> None:
    """Where autograd leaves the modes asleep, or checks places by itself."""
    from torch.autograd import graph

    backward = graph._engine_run_backward

    def checked(outputs: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
        for output, grad in zip(outputs, grads, strict=True):
            if isinstance(output, torch.Tensor) and isinstance(grad, torch.Tensor):
                here, there = places.of(output), places.of(grad)
                if here and there and here != there:
                    raise RuntimeError(f"invalid gradient: expected device {here} but got {there} (pretended)")
                if there is None:
                    places.put(grad, here)
        return backward(outputs, grads, *args, **kwargs)

    torch.autograd._engine_run_backward = graph._engine_run_backward = checked

    hooks = graph.saved_tensors_hooks.__init__

    def awake(self: Any, pack: Any, unpack: Any) -> None:
        def wake(hook: Any) -> Any:
            def run(*args: Any) -> Any:
                with functions:
                    return hook(*args)

            return run

        hooks(self, wake(pack), wake(unpack))

    graph.saved_tensors_hooks.__init__ = awake

    copy = torch.Tensor.__deepcopy__

    def deepcopy(tensor: torch.Tensor, memo: dict) -> torch.Tensor:
        out = copy(tensor, memo)
        places.put(out, places.of(tensor))
        return out

    torch.Tensor.__deepcopy__ = deepcopy


def _compilers(operations: Operations) -> None:
    """FlexAttention is one operation, seen from outside; what would be compiled runs as it is written."""
    from torch.nn.attention import flex_attention as flex

    attend = flex.flex_attention

    def whole(*args: Any, **kwargs: Any) -> Any:
        with _modes_off():
            out = attend(*args, **kwargs)
        return operations.settle("flex_attention", args, kwargs, out)

    flex.flex_attention = whole
    torch.compile = lambda function=None, **_: function if function else lambda given: given


def _triton(places: Places) -> None:
    """Kernels are interpreted, and the book does not know it: it takes the ways that it takes on a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions look while they are imported
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    del os.environ["TRITON_INTERPRET"]
    type(triton.knobs.runtime).interpret = True
    execute = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        for name, value in names.items():
            if any(places.of(tensor) == CPU for tensor in tensors_in((value,))):
                raise ValueError(f"Pointer argument {name} cannot be accessed from Triton (cpu tensor?) (pretended)")
        with _modes_off():
            execute(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # The interpreter multiplies the bit patterns of bf16 as integers.
        return dot(self, *(cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        # It cuts float32 off where a GPU rounds it to bf16.
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            nearest = np.where(np.isnan(src.data), bits, bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
            src = interpreter.TensorHandle(nearest.astype(np.uint32).view(np.float32), tl.float32)
        return cast(self, src, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


@contextmanager
def _modes_off() -> Any:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _small() -> None:
    """Benchmarks at the sizes kept for the interpreter, each call timed twice; a case that is not timed raises."""
    import sys

    from llmbook.kit import measure, stopwatch

    report, run, stopwatch.ROUNDS = measure.report, measure.run, (2, 2)

    def once(call: Any) -> float:
        call()
        return 1.0

    def small(chapter: str, cases: Any, **options: Any) -> None:
        sizes = sys.modules[cases.__module__].SMALL
        report(chapter, lambda: cases(**sizes), **options, timer=once)

    def checked(*args: Any, **kwargs: Any) -> Any:
        timed, without = run(*args, **kwargs)
        wrong = [(row["name"], name) for row in timed for name, peer in row["peers"].items() if "wrong" in peer]
        if without or wrong or not timed:
            raise AssertionError(f"not measured: {without}; wrong peers: {wrong}; {len(timed)} cases were timed")
        return timed, without

    measure.report, measure.run = small, checked
