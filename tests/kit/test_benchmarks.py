"""Every chapter's benchmark at small sizes: lazy, right, strict about what is wrong, and truthful about its memory."""

import ast
import importlib
import inspect
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmbook import bench
from llmbook.kit import kernels, measure

CHAPTERS = bench.chapters()
GB = 1e9


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Peers that `torch.compile` would make for a GPU run as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def module(chapter):
    return importlib.import_module(f"llmbook.{chapter.replace('/', '.')}.benchmark")


@cache
def small(chapter):
    return list(module(chapter).cases(**module(chapter).SMALL))


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most; those on "meta" have none."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                self.count(t.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, key, None)
            self.peak = max(self.peak, sum(self.held.values()))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cases_say_what_they_need_and_make_nothing(chapter):
    with Live() as live:
        cases = list(module(chapter).cases())
    assert live.peak == 0
    assert len(cases) >= 5
    for case in cases:
        assert case.bytes > 0
        assert case.flops > 0 or case.name == "copy"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_a_t4_is_asked_for_fits(chapter):
    """Whatever is larger is skipped there; no chapter is skipped whole, and most cases of each fit into 12 GB."""
    fits = [case.memory + measure.ROOM <= 12 * GB for case in module(chapter).cases()]
    assert sum(fits) >= len(fits) - 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_tensors_are_made_where_kernels_run(chapter):
    source = inspect.getsource(module(chapter))
    makers = {"randn", "rand", "randint", "randperm", "zeros", "ones", "full", "empty", "arange", "tensor", "eye"}
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    made = [n for n in calls if n.func.attr in makers and getattr(n.func.value, "id", "") == "torch"]
    for call in made:
        assert "device" in {word.arg for word in call.keywords}, ast.unparse(call)
    assert inspect.signature(module(chapter).cases).parameters["device"].default == kernels.DEVICE
    assert "SMALL" in vars(module(chapter))


def clock(call):
    call()
    return 1.0


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_small_cases_are_right_and_so_are_their_peers(chapter, monkeypatch):
    monkeypatch.setattr("llmbook.kit.stopwatch.ROUNDS", (2, 2))
    for case in small(chapter):
        row = measure.attempt(case, clock)
        assert "status" not in row, row
        assert row["error"] <= row["allowed"]
        for name, peer in row["peers"].items():
            assert "wrong" not in peer, (case, name, peer)
            assert "ms" in peer or name.startswith("SDPA"), (case, name, peer)  # a CPU lacks some of its backends


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def like(result, replaced):
    return replaced[0] if isinstance(result, torch.Tensor) else type(result)(replaced)


def damages(t):
    """(what is wrong, the damaged tensor): one number, the last of each dimension, a shape."""
    much = float(t.double().abs().max()) or 1.0

    def set_at(index, change):
        damaged = t.detach().clone()
        damaged[index] = change(damaged[index])
        return damaged

    first, last = (0,) * t.dim(), (-1,) * t.dim()
    yield "NaN first", set_at(first, lambda x: x * float("nan"))
    yield "NaN last", set_at(last, lambda x: x * float("nan"))
    yield "infinite", set_at(last, lambda x: x + float("inf"))
    yield "last number wrong", set_at(last, lambda x: x + much)
    for d in range(t.dim()):
        yield f"last of dimension {d} wrong", set_at((slice(None),) * d + (-1,), lambda x: x + much)
    yield "one more dimension", t.detach()[None]
    yield "the last is missing", t.detach()[:-1]
    yield "one too many", torch.cat((t.detach(), t.detach()[-1:]))
    if len(t) > 1:
        yield "would broadcast", t.detach()[:1]


def check(work, result):
    """Whether a result passes, and what was said."""
    try:
        error, allowed = work.error(result)
    except ValueError as refused:
        return "the result is [" not in str(refused), refused
    return error <= allowed, (error, allowed)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_damage_passes_the_check(chapter):
    for case in small(chapter):
        work = case.make()
        result = work.run()
        right = tensors(result)
        for i, t in enumerate(right):
            for what, damaged in damages(t):
                passed, told = check(work, like(result, [*right[:i], damaged, *right[i + 1 :]]))
                assert not passed, (case.name, i, what, told)
        assert check(work, result)[0]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_memory_is_enough_for_ours_and_its_check(chapter):
    for case in small(chapter):
        with Live() as live:
            work = case.make()
            work.error(work.run())
        assert 0 < live.peak <= case.memory, (case.name, case.sizes, live.peak, case.memory)


def test_every_benchmark_is_here():
    folder = Path(bench.__file__).parent
    assert len(CHAPTERS) == len(list(folder.glob("*/*/benchmark.py"))) >= 12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("chapter", "at"), [
    ("gpu/flash_attention_2", (40, 32, True)), ("gpu/attention_on_the_roofline", 4),
    ("block/attention_and_kv_cache", (2, 70)), ("block/mla", (2, 8, 70)),
])
def test_flex_attention_gives_what_ours_gives(chapter, at, monkeypatch):
    """It is compiled for one size of each chapter; here for a small one, and not compiled."""
    monkeypatch.setattr(module(chapter), "FLEX", at)
    monkeypatch.setattr("llmbook.kit.stopwatch.ROUNDS", (2, 2))
    rows = [measure.attempt(case, clock) for case in module(chapter).cases(**module(chapter).SMALL)]
    flex = [row["peers"]["FlexAttention"] for row in rows if "FlexAttention" in row["peers"]]
    assert flex
    assert all("ms" in found or "backward on CPU" in found["unavailable"] for found in flex), flex
