"""A rank finds what a fork of the caller would have found, and its results are the caller's own."""

import enum
import functools
import os
import random
import subprocess
import sys
import threading
import types
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from llmbook.kit import rank_parcel, ranks


@pytest.fixture
def restored():
    """What the tests below change for the whole process."""
    dtype, rng, precision = torch.get_default_dtype(), torch.get_rng_state(), torch.get_float32_matmul_precision()
    depth, folder, numpys, pythons = sys.getrecursionlimit(), os.getcwd(), np.random.get_state(), random.getstate()
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(rng)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    sys.setrecursionlimit(depth)
    os.chdir(folder)
    np.random.set_state(numpys)
    random.setstate(pythons)


def everything(*_):
    """Whatever of the process a function's outcome may depend on."""
    return (
        torch.zeros(1).dtype, torch.rand(3).tolist(), random.random(), np.random.rand(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), sys.getrecursionlimit(),
        os.getcwd(), os.environ.get("RANKS_TEST"), "/nowhere/at/all" in sys.path, sys.argv, warnings.filters,
    )


@pytest.mark.parametrize("grad", [True, False])
def test_a_rank_is_in_the_callers_state(grad, restored, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    sys.setrecursionlimit(2345)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKS_TEST", "set")
    monkeypatch.setattr(sys, "path", [*sys.path, "/nowhere/at/all"])
    monkeypatch.setattr(sys, "argv", ["some", "arguments"])
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    torch.rand(2), random.random(), np.random.rand()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("once", "nobody says this", UserWarning)
        found = ranks.run(everything, 2).results
        here = everything()
    assert found == [here, here]


def test_the_defaults_are_inherited_too(monkeypatch):
    monkeypatch.delenv("RANKS_TEST", raising=False)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = ranks.run(everything, 2).results
    torch.set_rng_state(state[0]), random.setstate(state[1]), np.random.set_state(state[2])
    assert found == [everything()] * 2


def test_a_warning_that_is_an_error_here_is_one_there():
    def warn(comm):
        warnings.warn("careful", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ranks.RankError, match="UserWarning: careful"):
            ranks.run(warn, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ranks.run(warn, 1).results == [None]


def test_tensors_that_share_memory_still_do():
    x = torch.arange(6.0)
    row, turned = x[2:4], x.view(2, 3).T

    def write(comm):
        row.fill_(comm.rank + 10.0)
        return x, turned

    for rank, (whole, view) in enumerate(ranks.run(write, 2).results):
        assert whole.tolist() == [0, 1, 10 + rank, 10 + rank, 4, 5]
        assert torch.equal(view, whole.view(2, 3).T)
        assert view.stride() == (1, 3)
        whole[0] = -1
        assert view[0, 0] == -1  # in results too
    assert x.tolist() == [0, 1, 2, 3, 4, 5]


DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64, torch.uint16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_kind_arrive_and_come_back(dtype):
    bits = torch.arange(48, dtype=torch.uint8).remainder(2)
    tensors = [bits.clone().view(dtype), bits.clone().view(dtype)[1:3], bits[:0].clone().view(dtype),
               torch.empty(2, 3, dtype=dtype, device="meta")]
    for have, want in zip(ranks.run(lambda comm: tensors, 1).results[0], tensors, strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        assert have.device == want.device
        if want.device.type == "cpu":
            assert have.view(torch.uint8).tolist() == want.view(torch.uint8).tolist()


def test_gradients_parameters_and_ties_arrive():
    model = nn.Linear(2, 2, bias=False)
    tied = nn.ModuleList([model, nn.Linear(2, 2, bias=False)])
    tied[1].weight = model.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.ones(2, 2)
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def step(comm):
        model(torch.ones(1, 2)).sum().backward()  # adds up
        optimizer.step()
        assert tied[1].weight is model.weight
        return model.weight.detach(), model.weight.grad, type(frozen), frozen.requires_grad, model

    weight, grad, kind, needs, back = ranks.run(step, 1).results[0]
    assert grad.tolist() == [[2.0, 2.0]] * 2
    assert torch.equal(weight, model.weight.detach() - 2)
    assert (kind, needs) == (nn.Parameter, False)
    assert torch.equal(back.weight.grad, grad)
    assert model.weight.grad.tolist() == [[1.0, 1.0]] * 2


def test_results_are_instances_of_the_callers_own_classes():
    offset = torch.tensor(7.0)

    class Pair(NamedTuple):
        a: int
        b: torch.Tensor

    @dataclass
    class Data:
        pair: Pair

        def total(self):
            return self.pair.b + offset

        @functools.cached_property
        def doubled(self):
            return 2 * self.pair.a

    class Colour(enum.Enum):
        RED = 1

    class Outer:
        class Inner:
            pass

    def helper():
        return 5

    methods = dict(vars(Data))

    def build(comm):
        data = Data(Pair(comm.rank, torch.tensor(1.0)))
        assert "doubled" not in vars(data)
        assert (data.doubled, data.doubled, vars(data)["doubled"]) == (2 * comm.rank,) * 3
        return data, Colour.RED, Outer.Inner(), Data, helper, Outer

    data, colour, inner, cls, function, outer = ranks.run(build, 2).results[1]
    assert type(data) is Data
    assert type(data.pair) is Pair
    assert data.pair.a == 1
    assert colour is Colour.RED
    assert type(inner) is Outer.Inner
    assert cls is Data
    assert function is helper
    assert outer is Outer
    assert dict(vars(Data)) == methods  # and they are what they were
    offset += 1
    assert data.total() == 9  # with the caller's surroundings


def test_a_class_that_only_a_rank_knows_cannot_come_back():
    def local(comm):
        class Local:
            pass

        return Local()

    with pytest.raises(ranks.RankError, match="the result, a Local, cannot be sent back"):
        ranks.run(local, 1)


def test_autograd_functions_closures_lambdas_and_recursion_arrive():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return power(x, 3)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 3 * square(x)

    def power(x, n):
        return x * power(x, n - 1) if n else torch.ones_like(x)

    square = lambda x: power(x, 2)  # noqa: E731

    def go(comm):
        x = torch.arange(3.0, requires_grad=True)
        Cube.apply(x).sum().backward()
        return x.grad

    assert ranks.run(go, 2).results[1].tolist() == [0, 3, 12]


def test_a_graph_is_refused_not_cut():
    hanging = torch.ones(2, 3, requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"tensor of shape \(2, 3\) hangs on the graph that made it.*detach\(\) it"):
        ranks.run(lambda comm: hanging.sum(), 1)
    kept = hanging.detach()
    assert ranks.run(lambda comm: kept.sum().item(), 1).results == [12.0]


def test_another_devices_tensor_is_refused():
    there = types.SimpleNamespace(shape=(4,), device=torch.device("cuda:1"), grad_fn=None)
    with pytest.raises(ValueError, match=r"tensor of shape \(4,\) is on cuda:1, and ranks compute on the CPU: send"):
        rank_parcel._refuse(there)


def test_what_cannot_be_sent_is_told_before_anything_runs(tmp_path):
    lock = threading.Lock()

    def go(comm):
        (tmp_path / "ran").touch()
        return lock

    with pytest.raises(ValueError, match="must send the function, its arguments and all that it refers to, but cannot"):
        ranks.run(go, 1)
    assert not (tmp_path / "ran").exists()


def missing():
    raise ModuleNotFoundError("no module named elsewhere")


class OnlyHere:
    def __reduce__(self):
        return missing, ()


def test_what_cannot_be_unpacked_there_is_told():
    with pytest.raises(ranks.RankError, match="ranks cannot unpack the function: ModuleNotFoundError: no module named"):
        ranks.run(lambda comm, x: x, 2, OnlyHere())


BARE = """
import sys
sys.modules["cloudpickle"] = None
from llmbook.kit import ranks
try:
    ranks.run(print, 1)
except RuntimeError as error:
    print(error)
"""


def test_without_cloudpickle_the_kit_is_imported_and_run_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True)
    assert done.stdout == "ranks.run sends functions to its processes by cloudpickle; pip install cloudpickle\n"
