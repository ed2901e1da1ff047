"""The machine: cores, memory that processes share, limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from paperscale.doctor.findings import Asked
from paperscale.findings import Finding

_CGROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FEW_FILES, _TOO_FEW_FILES = 1024, 256
_SMALL_SHM = 1 << 30


def cpus(asked: Asked) -> Iterator[Finding]:
    """May this process use the cores that it sees?"""
    present = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    found = f"{usable} of {present} cores may be used" if usable < present else f"{present} cores"
    quota = cpu_quota()
    if quota is not None and quota < usable:
        fix = f"ask for more CPUs, or export OMP_NUM_THREADS={max(1, round(quota))}"
        yield Finding("WARN", "CPUs", f"{found}, but a quota allows {quota:.1f}: threads are held back", fix)
    else:
        yield Finding("OK", "CPUs", found)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable:
        fix = "unset OMP_NUM_THREADS; jobs set it to the CPUs of a process"
        yield Finding(
            "WARN", "threads", f"OMP_NUM_THREADS is {threads} on {usable} cores: threads wait for each other", fix
        )


def cpu_quota() -> float | None:
    """Return the CPU time that this process's control groups allow, in cores; ``None`` for no limit."""
    found = []
    for line in _read(_MINE).splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2: every group up to the root may have a limit
            path = _CGROUPS / name.lstrip("/")
            for folder in (path, *path.parents):
                quota, period = (_read(folder / "cpu.max") or "max 1").split()
                found += [] if quota == "max" else [int(quota) / int(period)]
        elif "cpu" in controllers.split(","):
            folder = _CGROUPS / "cpu" / name.lstrip("/")
            quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "1"
            found += [int(quota) / int(period)] if int(quota) > 0 else []
    return min(found, default=None)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def memory(asked: Asked) -> Iterator[Finding]:
    """Is there room for the batches that worker processes hand over?"""
    shm = Path("/dev/shm")  # noqa: S108  where Linux has it
    if not shm.is_dir():
        return
    total, _, free = shutil.disk_usage(shm)
    found = f"{_gib(total)} of shared memory, {_gib(free)} free"
    if free < _SMALL_SHM:
        fix = "give the container more (--shm-size=16g), or remove what lies in /dev/shm"
        yield Finding("WARN", "shared memory", f"{found}: worker processes pass batches through it", fix)
    else:
        yield Finding("OK", "shared memory", found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def limits(asked: Asked) -> Iterator[Finding]:
    """May a process open enough files, and lock memory where the network needs it?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name, found = "open files", f"{_limit(soft)} of at most {_limit(hard)}"
    if 0 <= soft < _FEW_FILES:
        fix = "ulimit -n 4096" if hard < 0 or hard >= 4096 else "ask an administrator for a higher limit (limits.conf)"
        yield Finding("FAIL" if soft < _TOO_FEW_FILES else "WARN", name, f"{found}: shards and sockets need more", fix)
    else:
        yield Finding("OK", name, found)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rdma = Path("/sys/class/infiniband")
    if rdma.is_dir() and any(rdma.iterdir()) and locked >= 0 and locked < 1 << 30:
        fix = "ask an administrator for `ulimit -l unlimited` (limits.conf, and slurmd's LimitMEMLOCK)"
        yield Finding("WARN", "locked memory", f"{locked >> 10} KiB: NCCL cannot use this machine's InfiniBand", fix)
    else:
        yield Finding("OK", "locked memory", _limit(locked, 10, " KiB"))


def _limit(value: int, shift: int = 0, unit: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value >> shift:,}{unit}"
