"""Real processes: right results, counted bytes, and every way to fail is told and leaves nothing behind."""

import math
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.kit import rank_server, ranks
from tests.processes import children, gone


def pass_round(comm, length):
    """Every rank sends to the next and returns what came."""
    if comm.size == 1:
        return torch.full((length,), 0.0)
    comm.send(torch.full((length,), float(comm.rank)), (comm.rank + 1) % comm.size)
    return comm.recv(torch.empty(length), (comm.rank - 1) % comm.size)


@settings(max_examples=6)
@given(st.integers(1, 5), st.integers(0, 9))
def test_results_messages_and_bytes(size, length):
    run = ranks.run(pass_round, size, length)
    assert [r.tolist() for r in run.results] == [[float((i - 1) % size)] * length for i in range(size)]
    assert run.bytes_sent() == [4 * length if size > 1 else 0] * size
    for message in run.messages:
        assert message.target == (message.source + 1) % size
        assert 0 <= message.sent <= message.received


def test_messages_are_told_apart_by_tag():
    def out_of_order(comm):
        if comm.rank == 0:
            comm.send(torch.tensor([1.0]), 1, tag=1)
            comm.send(torch.tensor([2.0]), 1, tag=2)
            return None
        return [comm.recv(torch.empty(1), 0, tag=tag).item() for tag in (2, 1)]

    run = ranks.run(out_of_order, 2)
    assert run.results[1] == [2.0, 1.0]
    received = {message.tag: message.received for message in run.messages}
    assert received[2] <= received[1]  # each message has its own receipt


def test_work_is_logged_on_a_common_clock():
    def wait(comm):
        with comm.log("nap"):
            time.sleep(0.05)

    run = ranks.run(wait, 2)
    assert [(work.rank, work.name) for work in run.work] == [(0, "nap"), (1, "nap")]
    assert all(work.end - work.start >= 0.05 for work in run.work)


def test_results_larger_than_a_pipe_arrive():
    run = ranks.run(lambda comm: torch.full((3_000_000,), comm.rank, dtype=torch.int32), 2)
    assert [int(r.sum()) for r in run.results] == [0, 3_000_000]


def failing(comm, how):
    if comm.rank == 1:
        if how == "raise":
            raise ValueError("the weights are bad")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
    return comm.recv(torch.empty(1), 1)  # rank 0 and 2 wait for rank 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)rank 1 raised:.*in failing.*ValueError: the weights are bad"),
        ("kill", "rank 1 was killed by SIGKILL"),
        ("exit", "rank 1 left with exit code 3"),
        ("hang", r"(?s)no answer within 1 s from ranks 0, 1, 2.*rank 1: .*in failing"),
    ],
)
def test_a_failure_names_its_rank_and_leaves_no_process(how, message):
    began = time.monotonic()
    with pytest.raises(ranks.RankError, match=message):
        ranks.run(failing, 3, how, timeout=1 if how == "hang" else 30)
    assert time.monotonic() - began < 10
    assert not children(rank_server._server[0].process.pid)


def test_an_unpicklable_result_is_told():
    with pytest.raises(ranks.RankError, match=r"(?s)rank 0 raised.*the result, a function, cannot be sent back"):
        ranks.run(lambda comm: (lambda: 1), 1)


def test_a_message_to_nobody_or_to_oneself_is_refused():
    with pytest.raises(ranks.RankError, match="named rank 5; ranks here are 0 to 1"):
        ranks.run(lambda comm: comm.send(torch.ones(1), 5), 2)
    with pytest.raises(ranks.RankError, match="sends to itself"):
        ranks.run(lambda comm: comm.send(torch.ones(1), comm.rank), 2)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_a_number_of_ranks_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=f"whole number and at least 1, not {size!r}"):
        ranks.run(pass_round, size, 1)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, "5", True])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match=f"number of seconds above 0, not {timeout!r}"):
        ranks.run(pass_round, 1, 1, timeout=timeout)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128, torch.bool,
          torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (2, 3, 4)]


def swap(comm, tensors):
    """Everything to the other rank, and everything from it."""
    for tag, tensor in enumerate(tensors):
        comm.send(tensor, 1 - comm.rank, tag)
    return [comm.recv(torch.empty(t.shape, dtype=t.dtype), 1 - comm.rank, tag) for tag, t in enumerate(tensors)]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.reshape(-1).view(torch.uint8)) == bytes(
        b.reshape(-1).view(torch.uint8))


def test_every_dtype_and_shape_crosses_bit_for_bit():
    bits = torch.randint(2, (500,), dtype=torch.uint8)
    tensors = [
        bits[: math.prod(shape) * dtype.itemsize].clone().view(dtype).reshape(shape)
        for dtype in DTYPES for shape in SHAPES
    ]
    run = ranks.run(swap, 2, tensors)
    for result in run.results:
        assert all(same(have, want) for have, want in zip(result, tensors, strict=True))
    assert run.bytes_sent() == [sum(t.nbytes for t in tensors)] * 2  # payloads; headers are not counted


def test_what_is_sent_is_what_the_tensor_says_not_what_lies_in_memory():
    z = torch.randn(4, 3, dtype=torch.complex64)
    tensors = [z.T, z.conj(), z.conj().imag, torch.arange(10)[::3]]  # strided, conjugated and negated lazily

    def go(comm):
        for tag, tensor in enumerate(tensors):
            comm.send(tensor, 1 - comm.rank, tag)
        return [comm.recv(tensor.clone().contiguous() * 0, 1 - comm.rank, tag) for tag, tensor in enumerate(tensors)]

    for have, want in zip(ranks.run(go, 2).results[0], tensors, strict=True):
        assert torch.equal(have, want.resolve_conj().resolve_neg())


def four_into(comm, count, dtype):
    """Rank 0 sends 4 elements of float32; rank 1 gives back what it then has."""
    if comm.rank == 0:
        comm.send(torch.ones(4), 1, tag=7)
        return None
    into = torch.zeros(count, dtype=dtype)
    try:
        comm.recv(into, 0, tag=7)
    except ValueError as error:
        return str(error), into
    return into


@pytest.mark.parametrize(
    ("count", "dtype", "words"),
    [
        (8, torch.float32, "8 elements of float32 (32 bytes)"),
        (1, torch.float32, "1 element of float32 (4 bytes)"),
        (0, torch.float32, "0 elements of float32 (0 bytes)"),
        (3, torch.float32, "3 elements of float32 (12 bytes)"),
        (4, torch.float64, "4 elements of float64 (32 bytes)"),
        (4, torch.int32, "4 elements of int32 (16 bytes)"),
        (2, torch.float64, "2 elements of float64 (16 bytes)"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_before_it_is_written(count, dtype, words):
    told, into = ranks.run(four_into, 2, count, dtype, timeout=20).results[1]
    assert told == f"rank 0 sent 4 elements of float32 (16 bytes) to rank 1, tag 7, which receives into {words}"
    assert not into.any()


def test_a_message_into_gaps_is_refused():
    def go(comm):
        if comm.rank == 0:
            return comm.send(torch.ones(4), 1)
        return comm.recv(torch.zeros(8)[::2], 0)

    with pytest.raises(ranks.RankError, match="rank 1 cannot receive from rank 0, tag 0, into a tensor that"):
        ranks.run(go, 2)


def test_sends_that_nobody_flushed_are_not_looked_through_again():
    def go(comm, count):
        if comm.rank == 1:
            return [comm.recv(torch.empty(1), 0).item() for _ in range(count)][-1]
        looked = 0

        class Counted(list):
            def __iter__(self):
                nonlocal looked
                looked += len(self)
                return super().__iter__()

        comm._in_flight = Counted()
        for number in range(count):
            comm.send(torch.tensor([float(number)]), 1)
        comm.flush()
        return looked

    assert ranks.run(go, 2, 50).results == [100, 49.0]  # once, by flush: a header and a payload each


def broken():
    raise ValueError("no way back")


class OneWay:
    def __reduce__(self):
        return broken, ()


def test_a_result_that_cannot_be_unpickled_is_told():
    with pytest.raises(ranks.RankError, match="rank 1's result was sent, but cannot be unpickled: ValueError: no way"):
        ranks.run(lambda comm: OneWay() if comm.rank else pickle.HIGHEST_PROTOCOL, 2)


def test_a_rank_that_dies_is_told_though_its_child_holds_everything_open(tmp_path):
    def go(comm):
        if comm.rank == 1:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        comm.recv(torch.empty(1), 1)

    began = time.monotonic()
    with pytest.raises(ranks.RankError, match="rank 1 was killed by SIGKILL"):
        ranks.run(go, 2, timeout=50)
    assert time.monotonic() - began < 10
    assert gone(int((tmp_path / "child").read_text()))


def test_a_thread_left_running_does_not_hold_a_rank():
    def go(comm):
        threading.Thread(target=time.sleep, args=(30,)).start()
        return comm.rank

    began = time.monotonic()
    assert ranks.run(go, 2, timeout=20).results == [0, 1]
    assert time.monotonic() - began < 10
