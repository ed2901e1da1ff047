"""A bounded cache of parts of remote shards on the node's own disk, shared by all processes of the node.

A shard is one sparse file: its bytes at their own offsets, then, on a page of its own, a mark for each block. A
block is written before it is marked, so a reader sees whole blocks only, a writer that is killed leaves at worst a
block that is fetched again, and two that write the same block write the same bytes: nothing is locked on the way.
The bound is held by unlinking whole files, the least recently read first; who has one open reads on from it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

from paperscale.data.transport import Version
from paperscale.errors import UserError

ABSENT, PRESENT, CLAIMED = b"\0", b"\1", b"\2"
_PAGE = 4096
_PAUSE_S = 60.0
_LOCK_S = 1.0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return ``$PAPERSCALE_CACHE``, else a folder of this user's on the node's disk for the job."""
    if chosen := os.environ.get("PAPERSCALE_CACHE"):
        return Path(chosen)
    base = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    return Path(base) / f"paperscale-cache-{os.getuid()}"


class CachedShard:
    """One version of a shard in the cache, open.

    Args:
        path: its file, made where it is missing.
        size: bytes of the shard.
        block_bytes: bytes of a block; the last one may be shorter.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, size: int, block_bytes: int):
        self.size, self.block_bytes = size, block_bytes
        self.used = True
        self._marks = -(-size // _PAGE) * _PAGE
        blocks = -(-size // block_bytes)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._file).st_size < self._marks + max(1, blocks):
            # The marks get their room now: a hole read through the mapping on a full memory file system is a SIGBUS.
            _write(self._file, bytes(max(1, blocks)), self._marks)
        os.utime(self._file)  # it is about to be read: nothing for the eviction
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def blocks(self, offset: int, size: int) -> tuple[int, int]:
        """Return the first block of a range and the one after its last."""
        return offset // self.block_bytes, -(-(offset + size) // self.block_bytes)

    def present(self, first: int, stop: int) -> bool:
        """Return whether all of these blocks are there."""
        return not self._map[self._marks + first : self._marks + stop].strip(PRESENT)

    def view(self, offset: int, size: int) -> memoryview:
        """Return bytes of blocks that are there, without a copy."""
        return self._view[offset : offset + size]

    def missing(self, first: int, stop: int, claimed: bool) -> Iterator[int]:
        """Yield the blocks that are not there; those that a prefetch is at only if ``claimed``."""
        for block, mark in enumerate(self._map[self._marks + first : self._marks + stop], first):
            if mark == ABSENT[0] or (claimed and mark == CLAIMED[0]):
                yield block

    def store(self, first: int, content: bytes | bytearray) -> None:
        """Write whole blocks, then mark them; the order is what makes readers without a lock safe.

        Raises:
            OSError: the disk is full.
        """
        offset = first * self.block_bytes
        _write(self._file, content, offset)
        self.mark(*self.blocks(offset, len(content)), PRESENT)

    def mark(self, first: int, stop: int, mark: bytes) -> None:
        """Set the marks of blocks."""
        _write(self._file, mark * (stop - first), self._marks + first)

    def unclaim(self, first: int, stop: int) -> None:
        """Take back the marks of a prefetch that came to nothing."""
        marks = self._map[self._marks + first : self._marks + stop]
        _write(self._file, marks.replace(CLAIMED, ABSENT), self._marks + first)

    def keep(self) -> bool:
        """Note for the eviction that the shard was read, if it was; return whether the cache still has it."""
        if not os.fstat(self._file).st_nlink:
            return False
        if self.used:
            self.used = False
            os.utime(self._file)
        return True


def _write(file: int, content: bytes | bytearray, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(file, rest, offset)
        offset, rest = offset + written, rest[written:]


def _lock_within(seconds: float, file: int) -> bool:
    """Take the lock on a file; return whether it could be had in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.001)


class BlockCache:
    """The cached files of one set, and the bound on the folder that they share with those of other sets.

    Args:
        root: the folder that is bounded.
        url: the set.
        limit: bytes that the folder may hold. One process looks at it at a time, each after every 1/256 of it
            that it has stored, and makes room from 7/8 of it on: the bound holds for up to 32 processes at work.
        block_bytes: bytes of a block.
    """

    def __init__(self, root: Path, url: str, limit: int, block_bytes: int):
        self.root, self.limit, self.block_bytes = root, limit, block_bytes
        host = quote(urlsplit(url).netloc.rpartition("@")[2], safe="")
        self.folder = root / f"{host}-{hashlib.sha256(url.encode()).hexdigest()[:12]}.shards"
        self._unseen = self._evictions = 0
        self._lock = threading.Lock()
        self._paused_until = 0.0
        self._told = False

    @property
    def paused(self) -> bool:
        """Whether the disk was found full a moment ago: nothing is cached for a minute then."""
        return self._paused_until > 0 and time.monotonic() < self._paused_until

    def open(self, name: str, version: Version) -> CachedShard | None:
        """Open a shard; ``None`` where the disk is full.

        Raises:
            UserError: the folder belongs to somebody else.
            OSError: the folder cannot be written.
        """
        identity = hashlib.sha256(f"{version.tag}\n{version.size}\n{self.block_bytes}".encode()).hexdigest()[:12]
        try:
            self._make_folder()
            return CachedShard(
                self.folder / f"{quote(name, safe='')}.{identity}.cached", version.size, self.block_bytes
            )
        except OSError as error:
            self._pause(error)
            return None

    def store(self, shard: CachedShard, first: int, content: bytes | bytearray) -> None:
        """Keep blocks of a shard, after making room where the bound is near; a full disk is told once."""
        try:
            with self._lock:  # held while making room: what threads store meanwhile would break the bound
                self._unseen += len(content)
                if self._unseen >= self.limit // 256:
                    self._unseen = 0
                    with suppress(FileNotFoundError):  # somebody has removed the folder: there is room
                        self.evict()
            shard.store(first, content)
        except OSError as error:
            self._pause(error)

    def evicted(self) -> bool:
        """Return whether any process has removed files since this was last asked."""
        try:
            last = (self.root / ".lock").stat().st_mtime_ns
        except FileNotFoundError:
            return False
        before, self._evictions = self._evictions, last
        return last != before

    def evict(self) -> None:
        """Unlink the least recently read files from 7/8 of the bound on, down to 3/4."""
        with (self.root / ".lock").open("a") as lock:
            if not _lock_within(_LOCK_S, lock.fileno()):
                return  # another process is at it
            found = []
            for path in self.root.glob("*.shards/*.cached"):  # whatever else may be in the user's folder
                with suppress(FileNotFoundError):
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, facts.st_blocks * 512, path))
            held = sum(size for _, size, _ in found)
            if held <= self.limit * 7 // 8:
                return
            for _, size, path in sorted(found):
                path.unlink(missing_ok=True)
                held -= size
                if held <= self.limit * 3 // 4:
                    break
            # Tells every process to close what was removed: only then is there room. The clock that a file system
            # stamps files by stands still for milliseconds, and would hide an eviction right after another one.
            os.utime(lock.fileno(), ns=(time.time_ns(), time.time_ns()))

    def load(self, name: str) -> tuple[str, bytes]:
        """Return the tag and the content of a small file that was saved; nothing where there is none, or damaged."""
        path = self.folder / f"{quote(name, safe='')}.file.cached"
        try:
            check, tag, content = path.read_bytes().split(b"\n", 2)
            if int(check, 16) == zlib.crc32(content, zlib.crc32(tag)):
                os.utime(path)
                return tag.decode(), content
        except (OSError, ValueError):
            pass
        return "", b""

    def save(self, name: str, tag: str, content: bytes) -> None:
        """Keep a small file under its tag."""
        path = self.folder / f"{quote(name, safe='')}.file.cached"
        try:
            self._make_folder()
            check = f"{zlib.crc32(content, zlib.crc32(tag.encode())):08x}"
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".cached", delete=False) as file:
                file.write(f"{check}\n{tag}\n".encode() + content)
            Path(file.name).replace(path)
        except FileNotFoundError:
            pass  # another process made room just now
        except OSError as error:
            self._pause(error)

    def _make_folder(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.stat().st_uid != os.getuid():
            raise UserError(f"{self.root} belongs to another user; set PAPERSCALE_CACHE to a folder of your own")
        self.folder.mkdir(exist_ok=True)

    def _pause(self, error: OSError) -> None:
        """Go on without the cache for a minute where the disk is full."""
        if error.errno not in _FULL:
            raise error
        self._paused_until = time.monotonic() + _PAUSE_S
        if not self._told:
            self._told = True
            _log.warning(
                "%s: %s; shards are read without the cache, which is slower: free space there, or set "
                "PAPERSCALE_CACHE to a folder on a larger disk",
                self.root,
                error.strerror,
            )
