"""The process that ranks are forked from: clean, because it computes nothing, and warm, because it lives on.

A process that has autograd threads (any backward does that where there is a GPU) or has touched CUDA cannot be forked
and go on computing. So the first run starts a server: a fresh interpreter without a GPU that imports torch and what
earlier runs had to import. Each run is one of its forks, a job. The server ends with its caller, however that ends, and
is started again when it is gone. The standard library's forkserver would import `__main__` again, runs a child only by
its own pickle, and cannot be told to have no GPU.
"""

import atexit
import codecs
import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from .comm import RankError
from .rank_parcel import Received, installed, pack

# Read once, at import or start, by torch, Triton, OpenMP, BLAS: another value needs another server.
READ_ONCE = ("TRITON", "TORCH", "PYTORCH", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "PYTHON")

GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # the other end of a connection has ended


class Server:
    """The caller's end."""

    def __init__(self) -> None:
        self.environment = _read_once()
        self.control, theirs = socket.socketpair()
        with theirs:
            start = f"from llmbook.kit.rank_server import serve; serve({theirs.fileno()})"
            code = f"import sys; sys.path[:] = {sys.path!r}; {start}"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that an interrupt reaches the caller alone, who ends its run
                # macOS ends a forked process that uses some of its frameworks, unless told not to.
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"},
            )

    def usable(self) -> bool:
        return self.process.poll() is None and self.environment == _read_once()

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_server: list[Server] = []
_needed: dict[str, None] = {}  # installed modules that a run had to import: the server does it before the next


def _forget() -> None:
    """In a fork of the caller: the server is its parent's, and must not be kept alive by it."""
    for server in _server:
        server.control.close()
        server.process.returncode = 0  # not this process's child: nothing to wait for
    _server.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@atexit.register
def _close() -> None:
    while _server:
        _server.pop().close()


def _read_once() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(READ_ONCE)}


def fork_ranks(function: Callable, size: int, args: tuple, timeout: float) -> list[tuple]:
    """Each rank's (result, sends, receipts, work), by rank; errors as in `ranks.run`."""
    if not hasattr(os, "fork"):
        raise RuntimeError("ranks.run forks its processes, which this system cannot: use Linux, macOS, WSL or Colab")
    parcel, own, modules = pack(function, args)
    _needed.update(dict.fromkeys(filter(installed, modules)))
    kind, told = _run(pickle.dumps((size, timeout, parcel)))
    if kind == "failed":
        raise RankError(told)
    reports = []
    for rank, report in enumerate(told):
        _, result, sends, receipts, work, new = pickle.loads(report)
        _needed.update(dict.fromkeys(new))
        try:
            reports.append((Received(result, own).load(), sends, receipts, work))
        except Exception as error:
            words = f"rank {rank}'s result was sent, but cannot be unpickled: {type(error).__name__}: {error}"
            raise RankError(words) from error
    return reports


def _run(request: bytes) -> tuple[str, Any]:
    """One run by one job: what it tells at its end, `("reports", …)` or `("failed", words)`."""
    for _ in range(2):  # a server may have been killed, and nobody have seen it yet
        with _lock:
            if _server and not _server[0].usable():
                _server.pop().close()
            if not _server:
                _server.append(Server())
            server = _server[0]
        if heard := _job(server, request):
            if len(heard) == 1:
                raise RankError("the process that watches over the ranks was killed, and the ranks ended with it")
            return heard[1]
        with _lock:
            server.close()
    raise RankError("the process that ranks are forked from ended twice before it had forked them")


def _job(server: Server, request: bytes) -> list[Any]:
    """All that a job says until it is gone: nothing if it never was, "started", then how the run ended.

    Whatever happens here (an interrupt too), no process of the run is left when this returns or raises.
    """
    ours, theirs = socket.socketpair()
    relays = [Relay("stdout"), Relay("stderr")]
    caller = Connection(os.dup(ours.fileno()))
    try:
        with theirs, contextlib.suppress(*GONE):
            socket.send_fds(server.control, [b"r"], [theirs.fileno(), *(relay.write for relay in relays)])
        for relay in relays:
            relay.close_write()
        with contextlib.suppress(*GONE):
            caller.send(list(_needed))
            caller.send_bytes(request)
        return _listen(caller, relays)
    finally:
        _stop(ours)
        caller.close()
        for relay in relays:
            relay.close()


def _listen(caller: Connection, relays: list["Relay"]) -> list[Any]:
    heard: list[Any] = []
    while True:
        talking = {relay.read: relay for relay in relays if relay.open}
        for ready in wait([caller, *talking]):
            if isinstance(ready, int):
                talking[ready].pass_on()
                continue
            try:
                heard.append(caller.recv())
            except GONE:
                return heard


def _stop(ours: socket.socket) -> None:
    """Tell the job, if there still is one, that nobody waits, and wait until it is gone."""
    with contextlib.suppress(OSError), ours:  # a connection that is gone already is what is wanted
        ours.shutdown(socket.SHUT_WR)
        ours.settimeout(5)
        while ours.recv(1 << 16):
            pass


class Relay:
    """What the ranks print, printed here as it arrives, also where a notebook or a test has replaced `sys.stdout`."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, True
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_on(self) -> None:
        while self.open:
            try:
                chunk = os.read(self.read, 1 << 16)
            except BlockingIOError:
                return
            self.open = bool(chunk)
            getattr(sys, self.name).write(self.decoder.decode(chunk, final=not chunk))

    def close_write(self) -> None:
        os.close(self.write)
        self.write = -1

    def close(self) -> None:
        """Print what is still in the pipe: who may hold its other end is not waited for."""
        if self.write >= 0:
            self.close_write()
        self.pass_on()
        os.close(self.read)


def serve(control_end: int) -> None:
    """The server's whole life: at each word from the caller, import what is asked for and fork a job."""
    from .rank_job import job

    # The chapters' own import, and half a second's worth that torch's first backward would import in each rank.
    _import(["llmbook.kit.ranks", "torch.fx.experimental.symbolic_shapes"])

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # type: ignore[union-attr]
    control, jobs = socket.socket(fileno=control_end), set[int]()

    def bury(*_: object) -> None:
        jobs.difference_update([pid for pid in jobs if os.waitpid(pid, os.WNOHANG)[0]])

    signal.signal(signal.SIGCHLD, bury)
    while True:
        word, ends, *_ = socket.recv_fds(control, 1, 3)
        if not word:
            os._exit(0)
        caller = Connection(ends[0])
        with contextlib.suppress(EOFError, ConnectionResetError):  # a caller that left at once
            _import(caller.recv())
            with warnings.catch_warnings():  # Python 3.12 warns of forking with threads; numpy's may be there
                warnings.simplefilter("ignore")
                pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                for end, standard in zip(ends[1:], (1, 2), strict=True):
                    os.dup2(end, standard)
                    os.close(end)
                caller.send("started")
                job(caller)
            jobs.add(pid)
        caller.close()
        for end in ends[1:]:
            os.close(end)


def _import(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # whoever needs it imports it in its rank, and is told
                importlib.import_module(name)
