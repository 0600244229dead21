"""What every chapter would launch on a GPU, compiled for it: `python tests/launches.py 75` prints JSON rows for sm_75.

The launchers run as they are, on meta tensors, and believe that a GPU of that generation is here; each kernel that they
start is noted with its tile, its options and its arguments' types instead. Needs a process of its own, that compiles.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.update(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")

import torch
import triton

from llmbook.kit import ahead, compare, kernels

SM = int(sys.argv[1])
kernels.DEVICE = torch.device("meta")
kernels.capability = lambda: SM
compare.sm = lambda device: SM
sources: dict[str, set[str]] = {}
builds: dict[str, kernels.Build] = {}
source = ""


def note(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In the place of a launch: keep what the compiler needs."""
    options = {key: named.pop(key) for key in ("num_warps", "num_stages") if key in named}
    values = dict(zip(self.arg_names, args, strict=False)) | named
    signature = {name: kind(value) for name, value in values.items() if name not in named}
    key = repr((self.__name__, signature, named, options))
    builds[key] = kernels.Build(self, signature, lambda sm: named, options=lambda sm: options)
    sources.setdefault(key, set()).add(source)


def kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    if isinstance(value, torch.Tensor):
        short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int32": "i32"}
        return "*" + short[str(value.dtype)[6:]]
    return "fp32" if isinstance(value, float) else "i32"


triton.runtime.JITFunction.run = note


class Seedless:
    """In the place of a generator, of which meta has none."""

    def __init__(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        return None


torch.Generator = Seedless
half = torch.bfloat16 if SM >= 80 else torch.float16


def random(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def benchmarks() -> Iterator[str]:
    """All that `benchmark.cases` times, in the chapters that have a kernel."""
    for chapter in sorted({name.rsplit(".", 1)[0] for name in ahead.kernel_modules()}):
        module = importlib.import_module(chapter + ".benchmark")
        if hasattr(module, "_layer"):  # a cache asks for values, which meta has not; and starts no kernel
            module._layer = lambda *_: None
        yield chapter.rsplit(".", 1)[1]
        for case in module.cases(torch.device("meta")):
            if (work := case.make()) is not None:
                work.run()


def notebooks() -> Iterator[str]:
    """What notebooks launch beside, and other shapes that the launchers accept."""
    from llmbook.block.attention_and_kv_cache.decode import flash_decode
    from llmbook.block.deepseek_moe.grouped import grouped_product
    from llmbook.block.mla.decode import latent_decode
    from llmbook.block.norms import kernel as norms
    from llmbook.block.rope.kernel import rope
    from llmbook.gpu.attention_on_the_roofline.decode import decode
    from llmbook.gpu.flash_attention.kernel import flash_attention_1
    from llmbook.gpu.flash_attention_2 import attention
    from llmbook.gpu.flash_attention_2.tiles import Tiles
    from llmbook.gpu.online_softmax.kernel import softmax

    single, fp16, i32 = torch.float32, torch.float16, torch.int32
    yield "attention_and_kv_cache"
    for d, group in ((64, 4), (128, 64), (256, 4), (256, 32)):
        q, k = random(3, 2 * group, d, dtype=fp16), random(3, 2, 160, d, dtype=fp16)
        flash_decode(q, k, k, random(3, dtype=i32), parts=3)
    pool = random(20, 2, 16, 64, dtype=fp16)
    flash_decode(random(3, 8, 64, dtype=fp16), pool, pool, random(3, dtype=i32), table=random(3, 10, dtype=i32))
    for dtype in (fp16, half, single):
        yield "mla"
        for heads in (1, 20, 128):
            q, rows = random(3, heads, 576, dtype=dtype), random(3, 96, 576, dtype=dtype)
            latent_decode(q, rows, random(3, dtype=i32), 0.1)
        yield "deepseek_moe"
        for rows, k, n in ((111, 40, 24), (4096, 256, 512)):
            product = grouped_product(random(rows, k, dtype=dtype), random(5, k, n, dtype=dtype), random(5, dtype=i32))
            product.backward(random(rows, n, dtype=dtype))
        yield "norms"
        for width in (64, 1000):
            x, weight = random(64, width, dtype=dtype), random(width, dtype=dtype)
            norms.rms_norm(x, weight).backward(x)
            torch.autograd.backward(norms.add_rms_norm(x, x, weight), (x, x))
        yield "flash_attention"
        for d in (32, 128, 256):
            flash_attention_1(*[random(1, 2, 70, d, dtype=dtype)] * 3, causal=True)
        yield "online_softmax"
        for n in (100, 16_384, 16_385):
            softmax(random(16, n, dtype=dtype))
    yield "rope"
    for d in (48, 2048):
        tables = (torch.empty(3, d // 2, device="meta"),) * 2
        q, k = random(2, 3, 6, d, dtype=fp16), random(2, 3, 2, d, dtype=fp16)
        for layout in ("half_split", "interleaved"):
            torch.autograd.backward(rope(q, k, *tables, layout), (q, k))
    yield "attention_on_the_roofline"
    for d in (64, 128):
        for group in (3, 64):
            q, k = random(3, 2 * group, 1, d, dtype=fp16), random(3, 2, 77, d, dtype=fp16)
            for kernel in ("per head", "packed"):
                decode(q, k, k, kernel=kernel, lengths=random(3, dtype=i32), splits=2)
    for heads in (1, 20, 128):
        decode(random(1, heads, 1, 576, dtype=fp16), random(1, 1, 50, 576, dtype=fp16), None)
    yield "flash_attention_2"
    for d in (16, 32, 64, 96, 256):
        q, k = random(1, 4, 70, d, dtype=fp16), random(1, 2, 100, d, dtype=fp16)
        attention.flash_attention_2(q, k, k, causal=True)[0].backward(q)
        attention.forward(q, k, k, True, 0.1, kind="forward")
    q, k = random(1, 4, 70, 64, dtype=fp16), random(1, 2, 100, 64, dtype=fp16)
    for way in ("forward", "tma"):
        attention.forward(q, k, k, True, 0.125, kind=way, tiles=Tiles(BM=32, BN=16, warps=4, stages=1))


def compiled() -> Iterator[dict[str, Any]]:
    """A row per kernel that was started, with who started it: (walk, chapter)."""
    global source
    from llmbook.gpu.flash_attention_2 import attention

    attention.attend, attention.attend_backward = attention.forward, attention.backward  # not the registered fakes
    for walk in (benchmarks, notebooks):
        for chapter in walk():
            source = f"{chapter}'s {walk.__name__}"
    for key, build in builds.items():
        yield ahead._compile(build, SM) | {"sources": sorted(sources[key])}


if __name__ == "__main__":
    print(json.dumps(list(compiled())))
