"""The process that ranks are forked from: clean, warm, never in the way, and never left behind."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from llmbook.kit import rank_server, ranks
from tests.processes import alive, children, gone

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


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "not seen"])
def test_a_killed_server_is_replaced(seen, monkeypatch):
    ranks.run(ident, 1)
    before = server()
    os.kill(before, signal.SIGKILL)
    if seen:
        rank_server._server[0].process.wait()
    else:  # it dies when its death has just been looked for
        found_alive = iter([True])
        usable = rank_server.Server.usable
        monkeypatch.setattr(rank_server.Server, "usable", lambda self: next(found_alive, None) or usable(self))
    assert ranks.run(ident, 3).results == [0, 1, 2]
    assert server() != before


def ident(comm):
    return comm.rank


def test_a_server_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # so that a new one is needed
    with pytest.raises(ranks.RankError, match="ended twice before it had forked"):
        ranks.run(ident, 2)


def linger(comm, folder):
    (folder / f"pid-{comm.rank}").write_text(str(os.getpid()))
    comm.barrier()
    (folder / "ready").touch()
    time.sleep(100)


def pids(folder: Path, size: int) -> list[int]:
    end = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    found = [int((folder / f"pid-{rank}").read_text()) for rank in range(size)]
    assert all(map(alive, found))
    return found


def test_nothing_is_left_of_a_caller_that_was_killed(tmp_path):
    process = script(tmp_path, textwrap.dedent(f"""
        from pathlib import Path
        from llmbook.kit import rank_server, ranks
        import time, os

        def linger(comm, folder):
            (folder / f"pid-{{comm.rank}}").write_text(str(os.getpid()))
            comm.barrier()
            (folder / "ready").touch()
            time.sleep(100)

        ranks.run(lambda comm: 0, 1)
        print(rank_server._server[0].process.pid, flush=True)
        ranks.run(linger, 2, Path({str(tmp_path)!r}))
    """))
    servers = int(process.stdout.readline())
    found = [servers, *children(servers), *pids(tmp_path, 2)]
    process.kill()
    process.communicate()
    assert gone(*found)


def test_an_interrupt_ends_the_run_and_the_next_one_works(tmp_path):
    def interrupt():
        found.extend(pids(tmp_path, 2))
        os.kill(os.getpid(), signal.SIGINT)

    found: list[int] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ranks.run(linger, 2, tmp_path)
    thread.join()
    assert not any(map(alive, found))  # at once: run waits for it
    before = server()
    assert ranks.run(ident, 2).results == [0, 1]
    assert server() == before


def test_ranks_end_with_the_process_that_watches_over_them(tmp_path):
    def betray(comm):
        (tmp_path / f"pid-{comm.rank}").write_text(str(os.getpid()))
        comm.barrier()
        (tmp_path / "ready").touch()
        if comm.rank == 0:
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(100)

    with pytest.raises(ranks.RankError, match="watches over the ranks was killed"):
        ranks.run(betray, 3)
    assert gone(*[int((tmp_path / f"pid-{rank}").read_text()) for rank in range(3)])


def test_what_a_run_leaves_running_ends_with_it(tmp_path):
    def starts(comm):
        child = subprocess.Popen(["sleep", "60"])
        return child.pid

    assert gone(*ranks.run(starts, 2).results)


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


def test_no_end_of_a_pipe_is_left_open():
    ranks.run(ident, 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ranks.run(ident, 2)
        with pytest.raises(ranks.RankError):
            ranks.run(lambda comm: 1 / 0, 2)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_system_without_fork_is_told(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(RuntimeError, match="this system cannot: use Linux, macOS, WSL or Colab"):
        ranks.run(ident, 2)


CELLS = [
    """
from dataclasses import dataclass
from llmbook.kit import ranks

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
    print('raise ValueError("in a cell")' in str(error))
""",
]


def test_in_a_notebook_classes_prints_and_tracebacks_are_the_notebooks_own():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=100, kernel_name="python3", coalesce_streams=True).execute()
    printed = ["".join(output["text"] for output in cell.outputs) for cell in notebook.cells]
    assert printed == ["", "hello from 0\n[Mine(rank=0)] True\n", "True\n"]
