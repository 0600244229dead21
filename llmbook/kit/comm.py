"""One rank's view of the others: tensors sent and received, all counted, and none written where it does not fit."""

import contextlib
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

HEADER = struct.Struct("<q24s")  # ahead of each payload: elements, and the dtype's name


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
        """Bytes of tensors each rank sent, by rank."""
        sent = [0] * len(self.results)
        for message in self.messages:
            sent[message.source] += message.bytes
        return sent


@dataclass
class Comm:
    """One rank's view of the others. Only point-to-point: what is built on it moves no tensor that is not counted.

    A header of 32 bytes goes ahead of each tensor, so that one that does not fit is refused before it is written
    (gloo would call a shorter one a success, and end the process on a longer one). Headers are not in the counts.
    """

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
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        header = bytearray(HEADER.pack(tensor.numel(), _name(tensor.dtype).encode()))
        self.sends.append((self.rank, to, tag, tensor.nbytes, self._now()))
        for part in (torch.frombuffer(header, dtype=torch.uint8).to(self.device), _as_bytes(tensor)):
            if part.numel():
                self._in_flight.append((dist.isend(part, to, tag=tag), part))

    def recv(self, into: torch.Tensor, source: int, tag: int = 0) -> torch.Tensor:
        """Wait for the message with this tag from `source`, write it into `into` and return it.

        Raises:
            ValueError: `into` is not contiguous, or the message has another dtype or number of elements (a shape
                does not cross); nothing was written.
        """
        self._check(source)
        if not into.is_contiguous() or into.is_conj() or into.is_neg():
            raise ValueError(
                f"rank {self.rank} cannot receive from rank {source}, tag {tag}, into a tensor that is not contiguous "
                f"(shape {tuple(into.shape)}, strides {into.stride()}): receive into a new one and copy_ it"
            )
        header = torch.empty(HEADER.size, dtype=torch.uint8, device=self.device)
        dist.recv(header, source, tag=tag)
        count, padded = HEADER.unpack(bytes(header.tolist()))
        sent, here = (count, padded.rstrip(b"\0").decode()), (into.numel(), _name(into.dtype))
        fits = sent == here
        room = _as_bytes(into if fits else torch.empty(count, dtype=getattr(torch, sent[1]), device=self.device))
        if count:  # one that does not fit is taken out of the way, or its sender would wait for ever
            dist.recv(room, source, tag=tag)
        if not fits:
            raise ValueError(
                f"rank {source} sent {_amount(*sent)} to rank {self.rank}, tag {tag}, "
                f"which receives into {_amount(*here)}"
            )
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, as [bytes] of uint8: all dtypes cross alike, also those a backend does not know."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _amount(count: int, name: str) -> str:
    size = count * getattr(torch, name).itemsize
    return f"{count} element{'s' * (count != 1)} of {name} ({size} byte{'s' * (size != 1)})"


def assemble(reports: list[tuple]) -> Run:
    """What the ranks report, each (result, sends, receipts, work), in one: k-th receipts matched to k-th sends."""
    received: dict[tuple, list[float]] = defaultdict(list)
    for _, _, receipts, _ in reports:
        for source, target, tag, when in receipts:
            received[source, target, tag].append(when)
    arrivals = {key: iter(times) for key, times in received.items()}
    messages = []
    for _, sends, _, _ in reports:
        for source, target, tag, size, when in sends:
            arrived = next(arrivals.get((source, target, tag), iter(())), float("nan"))
            messages.append(Message(source, target, tag, size, when, arrived))
    messages.sort(key=lambda message: message.sent)
    return Run([report[0] for report in reports], messages, [work for report in reports for work in report[3]])
