"""Prints how a folder's file system behaves, as a line of JSON; run as a program of its own, which may hang.

python storage_facts.py FOLDER [--speed]
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_BLOCKS = 64
_LONGEST_S = 2.0  # of a measurement: a slow disk is found out before
_FILES = 300


def main(folder: str, speed: bool) -> None:
    """Print the facts."""
    facts: dict[str, Any] = {"error": None}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".paperscale-doctor-") as name:
            probe = Path(name)
            facts["renames"] = _reason(lambda: _rename(probe))
            facts["exclusive"] = _reason(lambda: _exclusive(probe))
            facts["flock"] = _reason(lambda: _lock(probe / "flock", _flock))
            facts["fcntl"] = _reason(lambda: _lock(probe / "fcntl", fcntl.lockf))
            facts["skew_s"], facts["resolution_s"] = _clock(probe)
            if speed:
                facts["write_mb_s"], facts["read_mb_s"] = _throughput(probe / "large")
                facts["files_per_s"] = _files(probe)
    except OSError as error:
        facts["error"] = error.strerror or str(error)
    print(json.dumps(facts))


def _reason(try_it: Callable[[], str]) -> str:
    """Return what went wrong, or an empty string."""
    try:
        return try_it()
    except OSError as error:
        return error.strerror or str(error)


def _rename(folder: Path) -> str:
    """Write a file, make it durable, put it in the place of another, make that durable: how checkpoints appear."""
    new, place = folder / "new", folder / "place"
    place.write_text("old")
    with new.open("w") as file:
        file.write("new")
        file.flush()
        os.fsync(file.fileno())
    new.replace(place)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return "" if place.read_text() == "new" and not new.exists() else "a renamed file has its old content"


def _exclusive(folder: Path) -> str:
    """Create a file that must not exist, twice."""
    for second in (False, True):
        try:
            os.close(os.open(folder / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return "" if second else "a new file is said to exist"
    return "O_EXCL creates a file that exists"


def _flock(file: int, operation: int) -> None:
    fcntl.flock(file, operation)


def _lock(path: Path, lock: Callable[[int, int], None]) -> str:
    """Hold a lock that another process must not get, then give it up."""
    path.touch()
    file = os.open(path, os.O_RDWR)
    try:
        lock(file, fcntl.LOCK_EX)
        while_held = _other_process_gets(path, lock)
        lock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)
    if while_held:
        return "two processes hold the same lock"
    return "" if _other_process_gets(path, lock) else "a lock that was given up is still held"


def _other_process_gets(path: Path, lock: Callable[[int, int], None]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            lock(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _clock(folder: Path) -> tuple[float, float]:
    """Return by how much the times of files are ahead of this machine's clock, and how fine they are, in seconds."""
    times = []
    for number in range(5):
        path = folder / f"time-{number}"
        before = time.time()
        path.write_text("x")
        times.append((path.stat().st_mtime_ns, before))
        time.sleep(0.003)
    skew = sorted(written / 1e9 - before for written, before in times)[2]
    fine = next((digits for digits in range(9) if all(t % 10 ** (9 - digits) == 0 for t, _ in times)), 9)
    return skew, 10.0**-fine


def _throughput(path: Path) -> tuple[float, float]:
    """Return MB/s of writing a large file durably, and of reading it, from the disk or the server."""
    block = os.urandom(_BLOCK)
    if shutil.disk_usage(path.parent).free < 4 * _BLOCK * _BLOCKS:
        return 0.0, 0.0
    began, written = time.monotonic(), 0
    with path.open("wb", buffering=0) as file:
        while written < _BLOCKS and time.monotonic() < began + _LONGEST_S:
            file.write(block)
            written += 1
        os.fsync(file.fileno())
        write = written * _BLOCK / 1e6 / (time.monotonic() - began)
        with contextlib.suppress(AttributeError, OSError):  # Linux
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began, read = time.monotonic(), 0
    with path.open("rb", buffering=0) as file:
        while time.monotonic() < began + _LONGEST_S and (got := len(file.read(_BLOCK))):
            read += got
    return write, read / 1e6 / (time.monotonic() - began)


def _files(folder: Path) -> float:
    """Return how many small files a second are created, looked at and removed."""
    began, done = time.monotonic(), 0
    while done < _FILES and time.monotonic() < began + _LONGEST_S / 2:
        path = folder / f"small-{done}"
        path.write_bytes(b"x")
        path.stat()
        path.unlink()
        done += 1
    return done / (time.monotonic() - began)


if __name__ == "__main__":
    main(sys.argv[1], "--speed" in sys.argv)
