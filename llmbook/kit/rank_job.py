"""One run's processes: a job, forked from the server, that forks the ranks, watches them and tells its caller.

Nothing here waits for an end of file to learn of a death: a rank's grandchild may hold any pipe open. Deaths are
learnt from the system (SIGCHLD), reports are files that appear whole, and all of a job's processes end with it.
"""

import faulthandler
import io
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .comm import Comm
from .rank_parcel import Results, adopt, installed, unpack

GRACE = 0.2  # seconds in which ranks that fail because another failed may report, so that the cause can be told


class Failed(Exception):
    """A rank failed; the words for `RankError`."""


def job(caller: Connection) -> NoReturn:
    """Run what the caller sends, send back `("reports", [bytes, …])` or `("failed", words)`, and be gone."""
    os.setpgid(0, 0)  # the ranks' own children are in this group too, and end with it
    known = set(sys.modules)
    try:
        size, timeout, parcel = pickle.loads(caller.recv_bytes())
        try:
            function, args, own, state = unpack(parcel)
        except BaseException as error:
            raise Failed(f"the ranks cannot unpack the function: {type(error).__name__}: {error}") from error

        def rank_main(rank: int, folder: Path, began: float) -> bytes:
            adopt(state)
            return _report(function, args, own, known, rank, size, folder, began, timeout)

        caller.send(("reports", _ranks(rank_main, size, timeout, caller)))
    except Failed as failure:
        caller.send(("failed", str(failure)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the caller is gone; so are, by now, the ranks
    except Exception as error:  # no folder, no process to be had
        caller.send(("failed", f"the ranks could not be run: {type(error).__name__}: {error}"))
    finally:
        os.killpg(0, signal.SIGKILL)
    raise AssertionError("not reached")


def _ranks(main: Callable, size: int, timeout: float, caller: Connection) -> list[bytes]:
    """Fork the ranks, wait for all their reports, and leave none behind."""
    woken, waker = os.pipe()
    lifeline, held = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # its arrival is what counts, written to `waker`
    signal.set_wakeup_fd(waker)
    pids: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            began = time.monotonic()
            for rank in range(size):
                with warnings.catch_warnings():  # Python 3.12 warns of forking with threads; numpy's may be there
                    warnings.simplefilter("ignore")
                    pid = os.fork()
                if pid == 0:
                    for end in (woken, waker, held, caller.fileno()):
                        os.close(end)
                    _rank(main, rank, Path(folder), began, lifeline)
                pids[pid] = rank
            return _collect(pids, woken, caller, began + timeout, timeout, Path(folder))
        finally:
            for pid in pids:  # those that `_collect` did not see end
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _rank(main: Callable, rank: int, folder: Path, began: float, lifeline: int) -> NoReturn:
    """A rank's whole life. It ends at once when its report is there, whatever threads its function left running."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=lambda: (os.read(lifeline, 1), os._exit(1)), daemon=True).start()
        with open(folder / f"stack-{rank}", "w") as stack:
            faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
            report = main(rank, folder, began)
            (folder / f"new-{rank}").write_bytes(report)
            (folder / f"new-{rank}").rename(folder / f"report-{rank}")
        code = 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _report(
    function: Callable, args: tuple, own: list[Any], known: set[str], rank: int, size: int, folder: Path, began: float,
    timeout: float,
) -> bytes:
    torch.set_num_threads(1)
    try:
        seconds = min(timeout + 60, 1e9)  # longer than the run's own, or the cause would be hidden
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        comm = Comm(rank, size, torch.device("cpu"), began)
        result = function(comm, *args)
        comm.flush()
        packed = _pack_result(result, own)
        new = [name for name in sys.modules if name not in known and installed(name)]
        comm.barrier()  # a rank that leaves early would close connections the others still read from
        return pickle.dumps(("done", packed, comm.sends, comm.receipts, comm.work, new))
    except BaseException:
        return pickle.dumps(("raised", time.monotonic(), traceback.format_exc()))


def _pack_result(result: Any, own: list[Any]) -> bytes:
    packed = io.BytesIO()
    try:
        Results(packed, own).dump(result)
    except Exception as error:
        raise pickle.PicklingError(f"the result, a {type(result).__name__}, cannot be sent back: {error}") from error
    return packed.getvalue()


def _collect(
    pids: dict[int, int], woken: int, caller: Connection, deadline: float, timeout: float, folder: Path
) -> list[bytes]:
    """Every rank's report, or the error that tells which rank failed first. Who ended is taken out of `pids`."""
    reports: dict[int, bytes] = {}
    raised: list[tuple[float, str]] = []
    while pids:
        limit = min(deadline, raised[0][0] + GRACE) if raised else deadline
        ready = wait([woken, caller], timeout=max(0, limit - time.monotonic()))
        if caller in ready:
            raise EOFError("the caller is gone, or has changed its mind")
        if not ready:
            break
        os.read(woken, 4096)
        for pid, rank in list(pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del pids[pid]
            if not (folder / f"report-{rank}").exists():  # a death is a cause, never a consequence
                raise Failed(f"rank {rank} {_death(os.waitstatus_to_exitcode(status))}")
            report = (folder / f"report-{rank}").read_bytes()
            kind, *rest = pickle.loads(report)
            if kind == "raised":
                raised.append((rest[0], f"rank {rank} raised:\n{rest[1]}"))
            reports[rank] = report
    if raised:
        raise Failed(min(raised)[1])
    if pids:
        raise Failed(_hung(pids, timeout, folder))
    return [reports[rank] for rank in sorted(reports)]


def _death(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"left with exit code {exitcode} and no result"


def _hung(pids: dict[int, int], timeout: float, folder: Path) -> str:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)  # faulthandler writes where the rank stands
    time.sleep(GRACE)
    ranks = sorted(pids.values())
    where = "\n".join(f"rank {rank}: {(folder / f'stack-{rank}').read_text()}" for rank in ranks)
    names = ", ".join(map(str, ranks))
    return f"no answer within {timeout:g} s from rank{'s' * (len(ranks) > 1)} {names}. Where they stood:\n{where}"
