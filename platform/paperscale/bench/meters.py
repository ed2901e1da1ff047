"""What a tree of processes costs: CPU seconds and memory, from Linux's own accounts."""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_INTERVAL_S = 0.05


def tree(pid: int) -> list[int]:
    """Return a process and all its living descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in (_PROC / str(parent) / "task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found


def cpu_seconds(pid: int) -> float:
    """Return the user and system time that a living process has used on all its threads, to the microsecond."""
    return time.clock_gettime((~pid << 3) | 2)  # the process's CPU clock: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)


class TreeClock:
    """CPU seconds of this process, its living descendants and the children it has waited for.

    Read at the same number of living workers at both ends of a measurement, it loses nothing.
    """

    def __init__(self, pid: int):
        self._pid = pid

    def read(self) -> float:
        """Return the CPU seconds so far."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = ended.ru_utime + ended.ru_stime
        for pid in tree(self._pid):
            try:
                total += cpu_seconds(pid)
            except OSError:  # it has just ended
                continue
        return total


class Growth:
    """By how many bytes this process has grown since, at the most: a mark that the kernel keeps."""

    def __init__(self) -> None:
        (_PROC / "self/clear_refs").write_text("5")  # sets the mark, VmHWM, to what the process holds now
        self._before = _status_bytes("VmRSS")

    def read(self) -> int:
        """Return the growth, in bytes."""
        return _status_bytes("VmHWM") - self._before


def _status_bytes(name: str) -> int:
    text = (_PROC / "self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")) << 10


@dataclass(frozen=True)
class Memory:
    """The proportional set size of a tree of processes: pages that several of them share count once.

    Attributes:
        total: in bytes.
        own: of it, what is not a file's pages: the file's can be given back at any time, and are in the page cache
            whether or not they are mapped.
    """

    total: int
    own: int


def memory_of(pid: int) -> Memory:
    """Return the memory of a process and its descendants."""
    sums = {"Pss:": 0, "Pss_File:": 0}
    for process in tree(pid):
        try:
            text = (_PROC / str(process) / "smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        for line in text.splitlines():
            name, *values = line.split()
            if name in sums:
                sums[name] += int(values[0]) << 10
    return Memory(sums["Pss:"], sums["Pss:"] - sums["Pss_File:"])


class PeakMemory:
    """Samples the memory of a tree of processes, twenty times a second, and keeps the largest.

    Args:
        pid: root of the tree.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self.total, self.own = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.is_set():
            now = memory_of(self._pid)
            self.total, self.own = max(self.total, now.total), max(self.own, now.own)
            self._over.wait(_INTERVAL_S)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
