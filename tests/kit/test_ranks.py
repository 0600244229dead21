"""Real processes: right results, counted bytes, and every way to fail is told and leaves nothing behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.kit import ranks


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
    assert not multiprocessing.active_children()


def test_an_unpicklable_result_is_told():
    with pytest.raises(ranks.RankError, match=r"(?s)rank 0 raised.*[Pp]ickle"):
        ranks.run(lambda comm: (lambda: 1), 1)


def test_a_message_to_nobody_or_to_oneself_is_refused():
    with pytest.raises(ranks.RankError, match="named rank 5; ranks here are 0 to 1"):
        ranks.run(lambda comm: comm.send(torch.ones(1), 5), 2)
    with pytest.raises(ranks.RankError, match="sends to itself"):
        ranks.run(lambda comm: comm.send(torch.ones(1), comm.rank), 2)


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ranks.run(pass_round, 0, 1)


def test_under_torchrun_the_same_call_joins_the_processes_there(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent("""
        import sys, torch
        from llmbook.kit import ranks

        def pass_round(comm):
            comm.send(torch.tensor([comm.rank * 1.0], device=comm.device), (comm.rank + 1) % comm.size)
            return comm.recv(torch.empty(1, device=comm.device), (comm.rank - 1) % comm.size).item()

        run = ranks.run(pass_round, 2)
        assert run.results == [1.0, 0.0] and run.bytes_sent() == [4, 4], run
        try:
            ranks.run(pass_round, 3)
        except ValueError as error:
            print(error)
        torch.distributed.destroy_process_group()
    """))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torchrun started 2 processes, but run wants 3" in done.stdout
