"""The process that ranks are forked from: clean, warm, never in the way, and never left behind."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from llmbook.kit import rank_server, ranks
from tests.processes import gone

# A second kind of device makes autograd start threads, as a GPU does: after that a process cannot be forked.
SECOND_DEVICE = """
import sys, types, torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npy")
backend = types.ModuleType("torch.npy")
backend._is_in_bad_fork, backend.manual_seed_all = lambda: False, lambda seed: None
torch.npy = sys.modules["torch.npy"] = backend
"""


def script(tmp_path: Path, text: str) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, "-W", "error", tmp_path / "script.py"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def server() -> int:
    return rank_server._server[0].process.pid


def test_ranks_compute_gradients_where_the_caller_could_not_be_forked(tmp_path):
    process = script(tmp_path, SECOND_DEVICE + textwrap.dedent("""
        import triton
        from typing import NamedTuple
        import torch.nn.functional as F
        from torch import nn
        from llmbook.kit import ranks

        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.ones(3, requires_grad=True).sum().backward()


        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return scale * x

            @staticmethod
            def backward(ctx, g):
                return scale * g


        class Found(NamedTuple):
            loss: float
            grad: torch.Tensor


        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return Doubled.apply(self.layer(x)).square()


        scale, model, x = 2.0, Model(), torch.randn(5, 4)


        def loss():
            return F.mse_loss(model(x), torch.zeros(5, 4))


        def step(comm):
            value = loss()
            value.backward()
            comm.send(model.layer.weight.grad, 1 - comm.rank)
            there = comm.recv(torch.empty(4, 4), 1 - comm.rank)
            every = [None, None]
            torch.distributed.all_gather_object(every, Found(1.0, there))
            return Found(value.item(), there + every[0].grad)


        run = ranks.run(step, 2)
        loss().backward()
        for found in run.results:
            assert type(found) is Found and found.loss == loss().item()
            assert torch.equal(found.grad, 2 * model.layer.weight.grad), found
        assert ranks.run(lambda comm: torch.zeros(1).dtype, 2).results == [torch.float64] * 2
        print("equal")
    """))
    out, err = process.communicate(timeout=100)
    assert (out, err) == ("equal\n", "")


def test_a_forked_caller_could_not_have_done_it(tmp_path):
    """The control of the test above: the same device, a plain fork."""
    process = script(tmp_path, SECOND_DEVICE + textwrap.dedent("""
        import os
        torch.ones(3, requires_grad=True).sum().backward()
        if os.fork() == 0:
            torch.ones(3, requires_grad=True).sum().backward()
    """))
    assert "in combination with fork-based multiprocessing" in process.communicate(timeout=60)[1]


def test_ranks_see_no_gpu_and_find_what_a_first_step_needs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def look(comm):
        needed = ("torch.distributed", "llmbook.kit.ranks", "torch.fx.experimental.symbolic_shapes")
        before = set(sys.modules)
        torch.autograd.backward([torch.zeros(1, requires_grad=True) * 1], [torch.zeros(1)])
        new = set(sys.modules) - before
        gpus = os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()
        return *gpus, [name for name in needed if name not in before], new

    assert ranks.run(look, 2).results == [("", 0, [], set())] * 2


def imports(comm, name):
    had = name in sys.modules
    importlib.import_module(name)
    return had


def test_an_installed_module_is_imported_by_one_run_and_there_for_the_next():
    assert ranks.run(imports, 2, "torch.utils.show_pickle").results == [False, False]
    assert ranks.run(imports, 2, "torch.utils.show_pickle").results == [True, True]


def test_a_readers_own_module_is_imported_anew_by_each_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "readers_own.py").write_text("def value(comm):\n    return 1\n")
    own = importlib.import_module("readers_own")
    assert ranks.run(own.value, 2).results == [1, 1]
    (tmp_path / "readers_own.py").write_text("def value(comm):\n    return 'two'\n")
    assert ranks.run(importlib.reload(own).value, 2).results == ["two", "two"]


def test_another_value_of_what_is_read_once_needs_another_server(monkeypatch):
    def interpreted(comm):
        return os.environ.get("TRITON_INTERPRET")

    ranks.run(interpreted, 1)
    before = server()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert ranks.run(interpreted, 1).results == ["0"]
    assert server() != before
    assert gone(before)
    before = server()
    monkeypatch.setenv("LANG", "C")
    ranks.run(interpreted, 1)
    assert server() == before


def ident(comm):
    return comm.rank


def test_what_ranks_print_appears_here(capsys):
    def talk(comm):
        for turn in range(comm.size):
            if turn == comm.rank:
                print(f"rank {turn}: Σ = {turn}" * 3000)
                print("aside", turn, file=sys.stderr)
                os.write(1, b"from C\n")
            comm.barrier()
        print("no end of line", end="")

    ranks.run(talk, 2)
    out, err = capsys.readouterr()
    lines = "".join(f"rank {turn}: Σ = {turn}" * 3000 + "\nfrom C\n" for turn in range(2))
    assert out == lines + "no end of line" * 2
    assert err == "aside 0\naside 1\n"


def test_what_is_said_last_is_printed_too(capsys):
    relay = rank_server.Relay("stdout")
    os.write(relay.write, "the end, Σ".encode()[:-1])
    relay.close()
    assert capsys.readouterr().out == "the end, \N{REPLACEMENT CHARACTER}"


def test_runs_side_by_side_do_not_meet():
    def own(comm, thread):
        comm.send(torch.tensor([thread]), 1 - comm.rank)
        return comm.recv(torch.tensor([-1]), 1 - comm.rank).item()

    found = {}
    threads = [
        threading.Thread(target=lambda t=t: found.update({t: ranks.run(own, 2, t).results})) for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {t: [t, t] for t in range(4)}


def test_a_fork_of_the_caller_has_a_server_of_its_own(tmp_path):
    ranks.run(ident, 1)
    before = server()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            ranks.run(ident, 2)
            os.write(write, str(server()).encode())
            rank_server._close()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs = int(pipe.read())
    assert os.waitpid(pid, 0)[1] == 0
    assert theirs != before
    assert gone(theirs)
    assert ranks.run(ident, 2).results == [0, 1]
    assert server() == before


def test_a_system_without_fork_is_told(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(RuntimeError, match="this system cannot: use Linux, macOS, WSL or Colab"):
        ranks.run(ident, 2)


CELLS = [
    """
from dataclasses import dataclass
from llmbook.kit import ranks
import IPython

@dataclass
class Mine:
    rank: int
""",
    """
def go(comm):
    print("hello from", comm.rank)
    return Mine(comm.rank)

found = ranks.run(go, 1).results
print(found, type(found[0]) is Mine)
""",
    """
def fail(comm):
    raise ValueError("in a cell")

try:
    ranks.run(fail, 1)
except ranks.RankError as error:
    # IPython 7 (Colab) hides a cell's lines from everybody but itself: there the place is told without its text.
    print("in fail" in str(error) and ('raise ValueError("in a cell")' in str(error) or IPython.version_info[0] < 8))
""",
]


def test_in_a_notebook_classes_prints_and_tracebacks_are_the_notebooks_own():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=100, kernel_name="python3", coalesce_streams=True).execute()
    printed = ["".join(output["text"] for output in cell.outputs) for cell in notebook.cells]
    assert printed == ["", "hello from 0\n[Mine(rank=0)] True\n", "True\n"]
