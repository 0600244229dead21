"""What the system says of processes."""

import time
from pathlib import Path


def _stat(pid: int) -> list[str]:
    """State, parent, … of a process; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def children(pid: int) -> list[int]:
    """The living children of a process, once those that are ending have had a second to."""
    return _within(lambda: _children(pid), 1)


def gone(*pids: int) -> bool:
    """Whether none of the processes runs, five seconds from now at the latest."""
    return not _within(lambda: [pid for pid in pids if alive(pid)], 5)


def _children(pid: int) -> list[int]:
    every = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [other for other in every if _stat(other)[1:2] == [str(pid)] and alive(other)]


def _within(find, seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while (found := find()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
