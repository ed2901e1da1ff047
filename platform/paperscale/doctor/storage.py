"""File systems of the runs, the data, temporary files and the home folder: type, room, locks, renames, speed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperscale.doctor.findings import Asked
from paperscale.findings import Finding, Level

_FACTS = Path(__file__).with_name("storage_facts.py")
_LIMIT_S = 25.0
_ANSWER_S = 3.0
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs", "apfs", "vfat", "exfat"}
_MEMORY = {"tmpfs", "ramfs"}
_ROOM, _LITTLE_ROOM = 5 << 30, 500 << 20
_INODES, _FEW_INODES = 10_000, 1000
_SLOW_MB_S, _SLOW_FILES = 30.0, 100.0
_SKEW_S = 2.0


@dataclass(frozen=True)
class FileSystem:
    """A file system that is used.

    Attributes:
        role: what for: ``runs``, ``data``, ``TMPDIR`` or ``home``.
        folder: the folder, or the nearest one above it that exists.
        others: further roles on the same file system.
    """

    role: str
    folder: Path
    others: tuple[str, ...] = ()


def file_systems(asked: Asked) -> list[FileSystem]:
    """Return the file systems to look at, each once."""
    from paperscale.jobs.run import runs_dir

    data = asked.data if asked.data and "://" not in asked.data else "data"
    wanted = {"runs": runs_dir(), "data": Path(data), "TMPDIR": Path(tempfile.gettempdir()), "home": Path.home()}
    found: dict[tuple[str, str], FileSystem] = {}
    for role, wish in wanted.items():
        folder = _existing(wish.absolute())
        mount = mount_of(folder)
        first = found.get(mount)
        if first is None:
            found[mount] = FileSystem(role, folder)
        else:
            found[mount] = FileSystem(first.role, first.folder, (*first.others, role))
    return list(found.values())


def _existing(folder: Path) -> Path:
    """Return where a folder is or would be, links resolved; itself where its file system does not answer."""
    found = [folder]

    def look() -> None:
        above = next(path for path in (folder, *folder.parents) if path.exists())
        found[0] = above.resolve()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return found[0]


def mount_of(folder: Path) -> tuple[str, str]:
    """Return where the file system of a folder is mounted, and its type."""
    found = ("/", "unknown")
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, point, kind, *_ = line.split()
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)  # a space is \040
        if folder.is_relative_to(point) and len(point) >= len(found[0]):  # the last mount covers the earlier ones
            found = point, kind
    return found


def check(system: FileSystem, asked: Asked) -> Iterator[Finding]:
    """Yield the findings on a file system, asked in a process of its own: one that hangs is left behind."""
    folder = system.folder
    point, kind = mount_of(folder)
    also = f" (also {', '.join(system.others)})" if system.others else ""
    yield _type(system, f"{kind} at {point}{also}", kind, asked)
    command = [sys.executable, "-I", "-S", str(_FACTS), str(folder), *([] if asked.quick else ["--speed"])]
    facts = _ask(command)
    if facts is None:
        found = f"{folder} does not answer within {_LIMIT_S:.0f} s"
        yield Finding("FAIL", f"{system.role}: file system", found, "wait for its server, or work elsewhere")
        return
    yield from judge(system, facts)


def _ask(command: list[str]) -> dict[str, Any] | None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        return dict(json.loads(process.communicate(timeout=_LIMIT_S)[0]))
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: the kernel ends it when the file system answers
        return None


def _type(system: FileSystem, found: str, kind: str, asked: Asked) -> Finding:
    name = f"{system.role}: type"
    if system.role != "runs":
        return Finding("OK", name, found)
    if kind in _MEMORY:
        fix = "set PAPERSCALE_RUNS to a folder on a disk"
        return Finding("WARN", name, f"{found}: runs are gone when the machine restarts", fix)
    if asked.slurm and kind in _LOCAL and not _nodes_are_here():
        fix = "set PAPERSCALE_RUNS to a folder that all nodes share"
        return Finding("WARN", name, f"{found}: local to this machine, as far as can be told", fix)
    return Finding("OK", name, found)


def _nodes_are_here() -> bool:
    """Return whether SLURM's node daemons run on this very machine, as on a development cluster."""
    return any(path.read_text().strip() == "slurmd" for path in Path("/proc").glob("[0-9]*/comm") if path.exists())


def judge(system: FileSystem, facts: dict[str, Any]) -> Iterator[Finding]:
    """Yield the findings on what ``storage_facts.py`` has printed."""
    role, folder = system.role, system.folder
    if facts["error"]:
        yield _unwritable(system, facts["error"])
        return
    yield from _room(system)
    problems = [facts[key] for key in ("renames", "exclusive") if facts[key]]
    if problems:
        fix = "move the runs to another file system: a checkpoint could be half there" if role == "runs" else ""
        yield Finding("FAIL" if role == "runs" else "WARN", f"{role}: writes", "; ".join(problems), fix or _ELSEWHERE)
    else:
        yield Finding("OK", f"{role}: writes", f"{folder}: durable, renamed at once, created once")
    yield _locks(role, facts)
    yield _clock(role, facts)
    if "write_mb_s" in facts:
        yield _speed(role, facts)


_ELSEWHERE = "use another file system for it"


def _unwritable(system: FileSystem, reason: str) -> Finding:
    name, found = f"{system.role}: writes", f"{system.folder}: {reason}"
    if system.role == "data":
        return Finding("OK", name, f"{found}: read only, which is enough to train")
    fix = "work in a folder that you can write to, or set PAPERSCALE_RUNS" if system.role == "runs" else _ELSEWHERE
    return Finding("FAIL" if system.role == "runs" else "WARN", name, found, fix)


def _room(system: FileSystem) -> Iterator[Finding]:
    facts = os.statvfs(system.folder)
    free, inodes = facts.f_bavail * facts.f_frsize, facts.f_favail
    limited = facts.f_files > 0  # some file systems make inodes as they are needed
    found = f"{free / 2**30:.1f} GiB free" + (f", {inodes:,} inodes" if limited else "")
    too_little = free < _LITTLE_ROOM or (limited and inodes < _FEW_INODES)
    little = free < _ROOM or (limited and inodes < _INODES)
    if system.role != "runs":
        level: Level = "WARN" if too_little else "OK"
    else:
        level = "FAIL" if too_little else "WARN" if little else "OK"
    yield Finding(level, f"{system.role}: room", found, "" if level == "OK" else f"free some of {system.folder}")


def _locks(role: str, facts: dict[str, Any]) -> Finding:
    problems = [f"{kind}: {facts[kind]}" for kind in ("flock", "fcntl") if facts[kind]]
    if not problems:
        return Finding("OK", f"{role}: locks", "flock and fcntl hold between processes")
    fix = "mount it with locks (Lustre: -o flock; NFS: not -o nolock), or set PAPERSCALE_CACHE to a local disk"
    return Finding("WARN", f"{role}: locks", "; ".join(problems), fix)


def _clock(role: str, facts: dict[str, Any]) -> Finding:
    skew, steps = facts["skew_s"], f"in steps of {facts['resolution_s']:g} s"
    if abs(skew) <= _SKEW_S:
        found = f"times of files agree with this machine's clock within {max(0.1, abs(skew)):.1f} s, {steps}"
        return Finding("OK", f"{role}: clock", found)
    found = f"times of files are {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's clock, {steps}"
    return Finding("WARN", f"{role}: clock", found, "let NTP set the clocks of this machine and of the file server")


def _speed(role: str, facts: dict[str, Any]) -> Finding:
    write, read, files = facts["write_mb_s"], facts["read_mb_s"], facts["files_per_s"]
    if not write:
        return Finding("OK", f"{role}: speed", f"{files:,.0f} small files/s; too little room to write 64 MB")
    found = f"written {write:,.0f} MB/s, read {read:,.0f} MB/s, {files:,.0f} small files/s"
    slow = {"runs": write, "data": read}.get(role, _SLOW_MB_S) < _SLOW_MB_S or (role == "runs" and files < _SLOW_FILES)
    if not slow:
        return Finding("OK", f"{role}: speed", found)
    fix = (
        "checkpoints wait for it: use a faster file system"
        if role == "runs"
        else "shards wait for it: copy them to scratch"
    )
    return Finding("WARN", f"{role}: speed", found, fix)


def quota(asked: Asked) -> Iterator[Finding]:
    """Is the user over a quota?  `quota` says so by its exit code, where a system has it."""
    if shutil.which("quota") is None:
        return
    result = subprocess.run(["quota", "-q"], capture_output=True, text=True, timeout=8)
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if result.returncode and lines:
        yield Finding(
            "WARN", "quota", " ".join(lines), "free space: writing stops at the limit, or when the grace is over"
        )
    else:
        yield Finding("OK", "quota", "within its limits")
