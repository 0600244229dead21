"""Under torchrun the same call joins the processes that are there, and leaves them as it found them."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

JOB = textwrap.dedent("""
    import torch
    from llmbook.kit import ranks

    def pass_round(comm, add):
        there = torch.tensor([comm.rank + add], device=comm.device)
        comm.send(there, (comm.rank + 1) % comm.size)
        return comm.recv(torch.empty_like(there), (comm.rank - 1) % comm.size).item()

    for add in (0.0, 10.0):
        run = ranks.run(pass_round, SIZE, add)
        assert run.results == [(rank - 1) % SIZE + add for rank in range(SIZE)], run
        assert run.bytes_sent() == [4] * SIZE
        assert all(0 <= message.sent and 0 <= message.received for message in run.messages)
        assert not torch.distributed.is_initialized()
""")


def torchrun(tmp_path, text, *arguments) -> subprocess.Popen:
    (tmp_path / "job.py").write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments, tmp_path / "job.py"]
    here = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=here)


def test_two_runs_in_one_job(tmp_path):
    process = torchrun(tmp_path, JOB.replace("SIZE", "2"), "--standalone")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]


REFUSED = """
try:
    ranks.run(pass_round, 3)
except ValueError as error:
    print(error)
torch.distributed.init_process_group("gloo")
try:
    ranks.run(pass_round, 2, 0.0)
except RuntimeError as error:
    print(error)
torch.distributed.destroy_process_group()

def fails(comm):
    raise ValueError(f"rank {comm.rank} is unwell")

try:
    ranks.run(fails, 2)
except ValueError as error:
    print(f"{error} {torch.distributed.is_initialized()}\\n", end="")  # one write: two ranks share the line
"""


def test_what_does_not_fit_the_job_is_refused(tmp_path):
    process = torchrun(tmp_path, JOB.replace("SIZE", "2") + REFUSED, "--standalone")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert out.count("torchrun started 2 processes, but run wants 3") == 2
    assert out.count("run makes and ends the process group itself; destroy the one that is there before") == 2
    assert sorted(line for line in out.splitlines() if "unwell" in line) == [
        "rank 0 is unwell False", "rank 1 is unwell False"
    ]


@pytest.mark.parametrize("attempt", range(2))
def test_two_agents_end_as_they_should(tmp_path, attempt):
    """Without a barrier and an end of the process group, one in four ended in SIGABRT after right results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
        f"--rdzv-id=ranks-{attempt}",
    ]
    agents = [torchrun(tmp_path, JOB.replace("SIZE", "4"), *arguments) for _ in range(2)]
    ends = [(agent.communicate(timeout=120)[1][-2000:], agent.returncode) for agent in agents]
    assert [code for _, code in ends] == [0, 0], ends
