"""The official files that a user names with ``--source``."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from paperscale.errors import UserError


class Originals:
    """The official files a user named: files, folders and archives (tar, zip), found by their names.

    Args:
        paths: what the user named.
        scratch: where members of archives are unpacked to.
        wanted: what to say is needed, in errors.
    """

    def __init__(self, paths: Sequence[Path], scratch: Path, wanted: str):
        self.paths, self.scratch, self.wanted = paths, scratch, wanted
        self.used: list[Path] = []
        self._files: dict[str, list[Path]] = {}
        for path in self._walk():
            self._files.setdefault(path.name, []).append(path)
        self._members: dict[str, tuple[Path, str]] | None = None

    def _walk(self) -> Iterator[Path]:
        for path in self.paths:
            yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]

    def get(self, *names: str) -> Path | None:
        """Return the first of the named files that is there; an archive's member is unpacked.

        Raises:
            UserError: several files have the name.
        """
        for name in names:
            if name in self._files:
                return self._use(self._only(name))
        for name in names:
            if name in self._archived():
                return self._use(*self._archived()[name])
        return None

    def find(self, *names: str) -> Path:
        """Return the first of the named files that is there.

        Raises:
            UserError: none is.
        """
        if (path := self.get(*names)) is None:
            where = ", ".join(map(str, self.paths))
            raise UserError(f"{' or '.join(names)} is not in {where}; download {self.wanted} and name it with --source")
        return path

    def _only(self, name: str) -> Path:
        first, *others = self._files[name]
        if others:
            raise UserError(
                f"'{name}' is there twice, {first} and {others[0]}; name the folder of one set with --source"
            )
        return first

    def matching(self, pattern: str) -> list[Path]:
        """Return the files whose names end in ``pattern``, sorted by path; archives are not looked into."""
        return [self._use(path) for path in self._walk() if re.search(rf"(?:{pattern})$", path.name)]

    def contents(self, pattern: str) -> Iterator[tuple[str, bytes]]:
        """Yield path and content of each file, in folders and in tar archives, whose path ends in ``pattern``.

        Of these, :attr:`used` names the archives only.

        Raises:
            UserError: an archive is damaged.
        """
        ending = re.compile(rf"(?:^|/)(?:{pattern})$")
        for path in self._walk():
            if ending.search(str(path)):
                yield path.as_posix(), path.read_bytes()
            elif is_tar(path):
                try:
                    with tarfile.open(self._use(path)) as tar:
                        for member in tar:
                            if ending.search(member.name) and (file := tar.extractfile(member)):
                                yield member.name, file.read()
                except (OSError, EOFError, tarfile.TarError) as error:
                    raise UserError(f"{path}: damaged archive ({error}); download it again") from error

    def _use(self, path: Path, member: str = "") -> Path:
        if path not in self.used:
            self.used.append(path)
        return _unpack_member(path, member, self.scratch) if member else path

    def _archived(self) -> dict[str, tuple[Path, str]]:
        """Return the members of all archives, by base name: the archive, and the full name in it."""
        if self._members is None:
            self._members = {}
            for path in self._walk():
                for name in _member_names(path):
                    self._members.setdefault(name.rpartition("/")[2], (path, name))
        return self._members


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar archive by its name."""
    return path.name.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2"))


def _member_names(archive: Path) -> list[str]:
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as packed:
                return [info.filename for info in packed.infolist() if not info.is_dir()]
        if is_tar(archive):
            with tarfile.open(archive) as tar:
                return [member.name for member in tar if member.isfile()]
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{archive}: cannot be read as an archive ({error}); download it again") from error
    return []


def _unpack_member(archive: Path, inside: str, scratch: Path) -> Path:
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / inside.rpartition("/")[2]
    partial = target.with_name(target.name + ".partial")
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as packed, packed.open(inside) as file, partial.open("wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
        else:
            with tarfile.open(archive) as tar, partial.open("wb") as out:
                shutil.copyfileobj(tar.extractfile(inside) or io.BytesIO(), out, 1 << 20)
    except (EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{archive}: '{inside}' cannot be unpacked ({error}); download the archive again") from error
    partial.replace(target)
    return target


def open_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file, gzipped or not, without their ends; only ``\n`` ends a line.

    Raises:
        UserError: a line is not UTF-8; names it.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); download the file again"
                ) from error
