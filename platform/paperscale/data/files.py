"""Reading parts of the files of a set: from a local or shared file system, or from a server.

On a local disk files are mapped: a sample is a view of the page cache, nothing is copied. On a network file system
they are read with ``pread``: a server that fails is an error there, and would kill the process through a mapping. So
are images everywhere: a copy costs little beside decoding it, and mapped pages count as the memory of the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Protocol

from paperscale.errors import UserError

Buffer = bytes | memoryview
_NETWORK = {0x6969, 0x0BD00BD0, 0x47504653, 0x65735546, 0x00C36400, 0xFF534D42, 0xFE534D42, 0x19830326, 0xAAD7AAEA}
"""File system types (``statfs(2)``): NFS, Lustre, GPFS, FUSE, Ceph, CIFS, SMB2, BeeGFS, PanFS."""


class ShardFile(Protocol):
    """An open shard."""

    def read(self, offset: int, size: int) -> Buffer:
        """Return ``size`` bytes at ``offset``, or fewer where the file ends before.

        Raises:
            OSError: the file cannot be read.
        """


class Folder(Protocol):
    """Where the files of a set are."""

    def read_file(self, name: str) -> Buffer:
        """Return a small file's content.

        Raises:
            OSError: it cannot be read; FileNotFoundError where it is not there.
        """

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises as :meth:`read_file` does."""

    def open(self, name: str) -> ShardFile:
        """Open a shard; raises as :meth:`read_file` does."""


class _Mapped:
    """A file on a local disk."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(self._descriptor).st_size
        self._view = memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) if size else b"")

    def read(self, offset: int, size: int) -> Buffer:
        """Return a view; a file that was cut off since it was opened gives what is left of it."""
        end = offset + size
        now = os.lseek(self._descriptor, 0, os.SEEK_END)  # to read a mapping beyond the file's end is a SIGBUS
        return self._view[offset : end if end <= now else now]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class _Read:
    """A file on a network file system."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> Buffer:
        """Return a copy."""
        content = os.pread(self._descriptor, size, offset)
        while 0 < len(content) < size:  # an interrupted read is short
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class LocalFolder:
    """A folder on this machine.

    Args:
        path: the folder.
        mapped: whether shards are mapped; by default on every file system but the network's.
    """

    def __init__(self, path: Path, mapped: bool | None = None):
        self.path = path
        self.mapped = not is_network(path) if mapped is None else mapped

    def __str__(self) -> str:
        return str(self.path)

    def read_file(self, name: str) -> bytes:
        """Return a file's content."""
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return (self.path / name).stat().st_size

    def open(self, name: str) -> ShardFile:
        """Open a shard."""
        return _Mapped(self.path / name) if self.mapped else _Read(self.path / name)


def open_folder(path: str | Path, mapped: bool = True) -> Folder:
    """Return where the files of a set are: a folder, or a URL (``https://``, ``s3://`` and whatever fsspec knows).

    Args:
        path: folder or URL.
        mapped: whether shards may be mapped, where they lie on a local disk.
    """
    if "://" in str(path):
        from paperscale.data.remote import RemoteFolder

        try:
            return RemoteFolder(str(path))
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"{path} cannot be opened: {error}; check the URL and the network") from error
    return LocalFolder(Path(path), None if mapped else False)


def is_network(path: Path) -> bool:
    """Return whether ``path`` lies on a network file system."""
    if not sys.platform.startswith("linux") or not path.exists():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 32)()  # the first word of struct statfs is the type
    if libc.statfs(os.fsencode(path), ctypes.byref(buffer)):
        return True  # unknown: read safely
    return (buffer[0] & 0xFFFFFFFF) in _NETWORK
