"""Real processes in a notebook cell: run a function on several ranks, and know every byte that crossed.

`run` forks one process per rank on this machine (gloo). Started by `torchrun`, the same call joins the processes that
are already there, with NCCL where there are GPUs: that is how the book's parallel code leaves one machine.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GRACE = 0.2  # seconds in which ranks that fail because another failed may report, so that the cause can be told


class RankError(RuntimeError):
    """A rank raised, died or hung. The message names it and shows where."""


class Message(NamedTuple):
    """A tensor that crossed: who sent it to whom, under which tag, how many bytes, and when (seconds since start)."""

    source: int
    target: int
    tag: int
    bytes: int
    sent: float
    received: float


class Work(NamedTuple):
    """A piece of a rank's time that its function chose to log."""

    rank: int
    name: str
    start: float
    end: float


@dataclass
class Run:
    """What a run gives back: each rank's result, every message, every logged piece of work."""

    results: list[Any]
    messages: list[Message]
    work: list[Work]

    def bytes_sent(self) -> list[int]:
        """Bytes each rank sent, by rank."""
        sent = [0] * len(self.results)
        for message in self.messages:
            sent[message.source] += message.bytes
        return sent


@dataclass
class Comm:
    """One rank's view of the others. Only point-to-point: what is built on it moves no byte that is not counted."""

    rank: int
    size: int
    device: torch.device
    began: float
    sends: list[tuple] = field(default_factory=list)
    receipts: list[tuple] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    _in_flight: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send a tensor without waiting for the receiver. The tensor must not be written to until `flush`."""
        self._check(to)
        tensor = tensor.detach().contiguous()
        self._in_flight = [(work, held) for work, held in self._in_flight if not work.is_completed()]
        self.sends.append((self.rank, to, tag, tensor.nbytes, self._now()))
        self._in_flight.append((dist.isend(tensor, to, tag=tag), tensor))

    def recv(self, into: torch.Tensor, source: int, tag: int = 0) -> torch.Tensor:
        """Wait for the message with this tag from `source`, write it into `into` (contiguous) and return it."""
        self._check(source)
        dist.recv(into, source, tag=tag)
        self.receipts.append((source, self.rank, tag, self._now()))
        return into

    def flush(self) -> None:
        """Wait until everything sent has left this rank."""
        for handle, _ in self._in_flight:
            handle.wait()
        self._in_flight.clear()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    @contextlib.contextmanager
    def log(self, name: str) -> Iterator[None]:
        """Log the time the block takes under `name`."""
        start = self._now()
        yield
        self.work.append(Work(self.rank, name, start, self._now()))

    def _now(self) -> float:
        return time.monotonic() - self.began

    def _check(self, other: int) -> None:
        if not 0 <= other < self.size:
            raise ValueError(f"rank {self.rank} named rank {other}; ranks here are 0 to {self.size - 1}")
        if other == self.rank:
            raise ValueError(f"rank {self.rank} sends to itself, which would wait forever")


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> Run:
    """Run `function(comm, *args)` on `world_size` real processes and wait for all of them.

    Args:
        function: anything callable, a notebook's own function too (processes are forked).
        timeout: seconds after which ranks that have not finished are stopped.

    Raises:
        RankError: a rank raised (its traceback is in the message), died (the signal or exit code) or hung (where
            it stood). All processes are gone when this is raised.
        ValueError: `world_size` below 1, or different from the size of the `torchrun` job this is part of.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join(function, world_size, args, timeout)
    context = multiprocessing.get_context("fork")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, waiting = [], {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(function, args, rank, world_size, folder, sender, began, timeout), daemon=True
                )
                with warnings.catch_warnings():  # Python 3.12 warns of forking with threads; the children use none
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()  # so that a child's death is an end of file here, and nobody else keeps the pipe open
                processes.append(process)
                waiting[receiver] = rank
            reports = _collect(processes, waiting, began + timeout, timeout, Path(folder))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
    return _assemble(reports)


def _child(
    function: Callable, args: tuple, rank: int, size: int, folder: str, sender: Any, began: float, timeout: float
) -> None:
    with open(Path(folder) / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                timeout=timedelta(seconds=timeout + 60),
            )
            comm = Comm(rank, size, torch.device("cpu"), began)
            result = function(comm, *args)
            comm.flush()
            report = pickle.dumps(("done", result, comm.sends, comm.receipts, comm.work))
            comm.barrier()  # a rank that leaves early would close connections the others still read from
        except BaseException:
            report = pickle.dumps(("raised", time.monotonic(), traceback.format_exc()))
        sender.send_bytes(report)
        sender.close()


def _collect(processes: list, waiting: dict, deadline: float, timeout: float, folder: Path) -> list[tuple]:
    """Every rank's report, or the error that tells which rank failed first."""
    reports: dict[int, tuple] = {}
    failures: list[tuple[float, str]] = []
    while waiting:
        limit = deadline if not failures else min(deadline, failures[0][0] + GRACE)
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, limit - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                report = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                # A death is a cause, never a consequence: it sorts before everything that raised.
                failures.insert(0, (time.monotonic(), f"rank {rank} {_death(processes[rank].exitcode)}"))
                continue
            if report[0] == "raised":
                failures.append((report[1], f"rank {rank} raised:\n{report[2]}"))
            else:
                reports[rank] = report[1:]
    if failures:
        dead = [words for _, words in failures if " raised:\n" not in words]
        raise RankError(dead[0] if dead else min(failures)[1])
    if waiting:
        raise RankError(_hung(processes, sorted(waiting.values()), timeout, folder))
    return [reports[rank] for rank in range(len(processes))]


def _death(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"left with exit code {exitcode} and no result"


def _hung(processes: list, ranks: list[int], timeout: float, folder: Path) -> str:
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR1)  # faulthandler writes where the rank stands
    time.sleep(GRACE)
    where = "\n".join(f"rank {rank}: {(folder / f'stack-{rank}').read_text()}" for rank in ranks)
    names = ", ".join(map(str, ranks))
    return f"no answer within {timeout:g} s from rank{'s' * (len(ranks) > 1)} {names}. Where they stood:\n{where}"


def _assemble(reports: list[tuple]) -> Run:
    """Match the k-th receipt of each (source, target, tag) to the k-th send."""
    received: dict[tuple, list[float]] = defaultdict(list)
    for _, _, receipts, _ in reports:
        for source, target, tag, when in receipts:
            received[source, target, tag].append(when)
    messages = []
    for _, sends, _, _ in reports:
        for source, target, tag, size, when in sends:
            arrivals = received[source, target, tag]
            messages.append(Message(source, target, tag, size, when, arrivals.pop(0) if arrivals else float("nan")))
    messages.sort(key=lambda message: message.sent)
    return Run([report[0] for report in reports], messages, [work for report in reports for work in report[3]])


def _join(function: Callable, world_size: int, args: tuple, timeout: float) -> Run:
    """The `torchrun` way: this process is one rank; results and logs are gathered on all of them."""
    if int(os.environ["WORLD_SIZE"]) != world_size:
        raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} processes, but run wants {world_size}")
    gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    comm = Comm(dist.get_rank(), world_size, device, time.monotonic())
    result = function(comm, *args)
    comm.flush()
    reports: list[Any] = [None] * world_size
    dist.all_gather_object(reports, (result, comm.sends, comm.receipts, comm.work))
    return _assemble(reports)
