"""However a run ends, and whoever is killed, nothing is left behind and the next run works."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmbook.kit import rank_server, ranks
from tests.processes import alive, children, gone


def server() -> int:
    return rank_server._server[0].process.pid


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "not seen"])
def test_a_killed_server_is_replaced(seen, monkeypatch):
    ranks.run(ident, 1)
    before = server()
    os.kill(before, signal.SIGKILL)
    if seen:
        rank_server._server[0].process.wait()
    else:  # it seems to live until somebody has looked closer
        usable = rank_server.Server.usable
        unseen = lambda self: self.process.pid == before and self.process.returncode is None  # noqa: E731
        monkeypatch.setattr(rank_server.Server, "usable", lambda self: unseen(self) or usable(self))
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


LINGER = """
from pathlib import Path
from llmbook.kit import rank_server, ranks
import signal, time, os

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored

def linger(comm, folder):
    (folder / f"pid-{comm.rank}").write_text(str(os.getpid()))
    comm.barrier()
    (folder / "ready").touch()
    time.sleep(100)

ranks.run(lambda comm: 0, 1)
server = rank_server._server[0].process.pid
print(server, flush=True)
try:
    ranks.run(linger, 2, Path("FOLDER"))
except KeyboardInterrupt:
    run = ranks.run(lambda comm: comm.rank, 2)
    print(run.results, rank_server._server[0].process.pid == server)
"""


def lingering(tmp_path: Path) -> tuple[subprocess.Popen, list[int]]:
    """A caller whose ranks will not end by themselves, and all of its processes."""
    caller = subprocess.Popen(
        [sys.executable, "-c", LINGER.replace("FOLDER", str(tmp_path))], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    servers = int(caller.stdout.readline())
    return caller, [servers, *children(servers), *pids(tmp_path, 2)]


def test_nothing_is_left_of_a_caller_that_was_killed(tmp_path):
    caller, found = lingering(tmp_path)
    caller.kill()
    caller.communicate()
    assert gone(*found)


def test_a_fork_of_a_caller_does_not_keep_its_server(tmp_path):
    """A worker of a data loader, say, that outlives the caller for a while."""
    forks = "child = os.fork()\nif child == 0:\n    time.sleep(60)\nprint(child, flush=True)\n"
    text = LINGER.replace("FOLDER", str(tmp_path)).replace("try:\n", forks + "try:\n")
    caller = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    servers, child = int(caller.stdout.readline()), int(caller.stdout.readline())
    found = pids(tmp_path, 2)
    caller.kill()
    assert gone(servers, *found)
    assert alive(child)
    os.kill(child, signal.SIGKILL)
    caller.communicate()


def test_a_notebooks_interrupt_goes_to_its_whole_group_and_ends_the_run_alone(tmp_path):
    caller, found = lingering(tmp_path)
    os.killpg(caller.pid, signal.SIGINT)
    out, err = caller.communicate(timeout=60)
    assert (out, err) == ("[0, 1] True\n", "")
    assert gone(*found)


def test_an_interrupt_ends_the_run_and_the_next_one_works(tmp_path):
    def interrupt():
        found.extend(pids(tmp_path, 2))
        os.kill(os.getpid(), signal.SIGINT)

    found: list[int] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    with pytest.raises(KeyboardInterrupt):
        ranks.run(linger, 2, tmp_path)
    signal.signal(signal.SIGINT, handler)
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
            child = os.fork()  # who nobody watches over now, and who holds what its rank held
            if child == 0:
                time.sleep(60)
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(100)

    began = time.monotonic()
    with pytest.raises(ranks.RankError, match="watches over the ranks was killed"):
        ranks.run(betray, 3)
    assert time.monotonic() - began < 30
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert gone(*[int((tmp_path / f"pid-{rank}").read_text()) for rank in range(3)])


def test_what_a_run_leaves_running_ends_with_it(tmp_path):
    def starts(comm):
        child = subprocess.Popen(["sleep", "60"])
        return child.pid

    assert gone(*ranks.run(starts, 2).results)


def test_no_end_of_a_pipe_is_left_open():
    ranks.run(ident, 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ranks.run(ident, 2)
        with pytest.raises(ranks.RankError):
            ranks.run(lambda comm: 1 / 0, 2)
    assert len(os.listdir("/proc/self/fd")) == before
