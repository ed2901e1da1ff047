"""The index beside a shard: where each member of each sample lies in the tar, and what it must contain.

``mnist-000000.tar`` stays an ordinary WebDataset tar; ``mnist-000000.tar.idx`` is derived from it and gives random
access. Layout (little-endian; every section begins at a multiple of 8 bytes, so the file can be mapped)::

    magic     8 bytes, PSINDEX2
    length    uint32, bytes of the header
    header    JSON, padded with spaces so that the sections begin at a multiple of 64 bytes
    members   MEMBER [samples, fields]; offset 0 where a sample lacks a field
    lengths   uint32 [samples, lengths]: what batches are made by, for example tokens
    ends      uint32 [samples]: where each key ends in the text that follows
    keys      UTF-8
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from paperscale.errors import UserError, nearest

try:  # the same checksum, four times as fast as zlib's
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

MAGIC = b"PSINDEX2"
SUFFIX = ".idx"
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
_U4 = np.dtype("<u4")
_LARGEST = 2**32 - 1


@dataclass(frozen=True)
class ShardIndex:
    """The members of one shard.

    Attributes:
        tar: the shard's file name.
        fields: file extensions of a sample's members, in the order of the columns.
        members: shape [samples, fields], dtype :data:`MEMBER`.
        lengths: name to uint32 [samples].
        ends: uint32 [samples], where each sample's key ends in ``text``.
        text: the keys, one after the other, UTF-8.
        tar_bytes: size of the tar that was indexed.
        tar_sha256: hash of the tar that was indexed.
        dropped: incomplete samples that were left out.
        crc32: of the index file that this was read from.
    """

    tar: str
    fields: tuple[str, ...]
    members: NDArray[np.void]
    lengths: dict[str, NDArray[np.uint32]]
    ends: NDArray[np.uint32]
    text: bytes | memoryview
    tar_bytes: int
    tar_sha256: str
    dropped: int = 0
    crc32: int = 0

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.members)

    def key(self, row: int) -> str:
        """Return a sample's key: the name its members share."""
        start = int(self.ends[row - 1]) if row else 0
        return str(self.text[start : int(self.ends[row])], "utf-8")

    def all_keys(self) -> list[str]:
        """Return all keys, in the order of the samples."""
        return [self.key(row) for row in range(len(self))]


@dataclass
class Rules:
    """How the tars of a set are indexed.

    Attributes:
        fields: members to index; by default all that occur.
        missing: what to do with a sample that lacks a field: ``refuse`` the shard, ``drop`` the sample from the
            index, or ``keep`` it without that field.
        lengths: name of a length to the ``.npy`` field whose number of rows it is.
    """

    fields: Sequence[str] | None = None
    missing: str = "refuse"
    lengths: Mapping[str, str] = field(default_factory=dict)


def split_key(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: at the first dot of the base name, the field in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def build(tar: Path, rules: Rules | None = None, progress: Callable[[int], None] = lambda done: None) -> ShardIndex:
    """Index a tar by reading it once.

    Args:
        tar: the shard; any tar that WebDataset reads, uncompressed.
        rules: which members to index, and what to do with incomplete samples.
        progress: called with the bytes that have been read since the last call.

    Raises:
        UserError: the tar is compressed or damaged, a sample occurs twice, lacks a field, or holds a compressed or
            too large member.
    """
    rules = rules or Rules()
    samples, seen = _scan(tar, rules, progress)
    if not samples and seen:
        wanted = list(rules.fields or ())
        known = sorted(seen)
        raise UserError(f"{tar}: no sample has any of the fields {wanted}, only {known}{nearest(wanted[0], known)}")
    if not samples:
        raise UserError(f"{tar}: holds no sample; leave it out, or write the shard again")
    fields = tuple(rules.fields or sorted({name for found in samples.values() for name in found}))
    found_samples = len(samples)
    samples = _complete(tar, samples, fields, rules.missing)
    members = np.zeros((len(samples), len(fields)), MEMBER)
    for row, found in enumerate(samples.values()):
        for column, name in enumerate(fields):
            if name in found:
                members[row, column] = found[name]
    for name, of in rules.lengths.items():
        if of not in fields:
            raise UserError(f"{tar}: --length {name}={of}: its samples have only {list(fields)}{nearest(of, fields)}")
    lengths = {name: _lengths(tar, members[:, fields.index(of)], of) for name, of in rules.lengths.items()}
    keys = [key.encode() for key in samples]
    ends = np.cumsum([len(key) for key in keys], dtype=_U4)
    size, digest = tar.stat().st_size, sha256(tar)
    dropped = found_samples - len(samples)
    return ShardIndex(tar.name, fields, members, lengths, ends, b"".join(keys), size, digest, dropped)


_Found = dict[str, tuple[int, int, int]]


def _scan(tar: Path, rules: Rules, progress: Callable[[int], None]) -> tuple[dict[str, _Found], set[str]]:
    """Return offset, size and checksum of every member, by key and field, and all fields that occur."""
    samples: dict[str, _Found] = {}
    seen: set[str] = set()
    current = ""
    read = 0
    try:
        with tar.open("rb") as raw, _open_tar(tar) as archive:
            for info in archive:
                if not info.isreg():
                    continue
                key, name = split_key(info.name)
                seen.add(name)
                if rules.fields is not None and name not in rules.fields:
                    continue
                _refuse_member(tar, info, name)
                if key != current and key in samples:
                    raise UserError(
                        f"{tar}: the members of sample '{key}' are not side by side, or two samples have this key "
                        f"('{info.name}'); write the shard again with `tar --sort=name`, or with distinct keys"
                    )
                current = key
                found = samples.setdefault(key, {})
                if name in found:
                    raise UserError(f"{tar}: '{info.name}' occurs twice; write the shard again without the second")
                raw.seek(info.offset_data)
                content = raw.read(info.size)
                if len(content) < info.size:
                    raise tarfile.ReadError(f"'{info.name}' is cut short")
                found[name] = (info.offset_data, info.size, crc32(content))
                progress(info.offset_data + info.size - read)
                read = info.offset_data + info.size
            raw.seek(archive.offset)
            _check_end(raw)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar}: not a readable tar ({error}); write or copy the shard again") from error
    return samples, seen


def _check_end(raw: BinaryIO) -> None:
    """Check that a tar ends in zeros and nothing follows: zeros inside it would hide all that comes after them."""
    end = raw.read(512)
    if len(end) < 512:
        raise tarfile.ReadError("it has no end mark: it was cut off")
    while end:
        if any(end):
            raise tarfile.ReadError(f"zeros before byte {raw.tell()} hide what follows them")
        end = raw.read(1 << 20)


def _open_tar(tar: Path) -> tarfile.TarFile:
    with tar.open("rb") as file:
        head = file.read(6)
    if head[:2] == b"\x1f\x8b" or head[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9") or head == b"\xfd7zXZ\0":
        raise UserError(
            f"{tar}: is compressed, so that no sample in it can be read without unpacking all before it; "
            f"unpack it (`gunzip {tar.name}`): its images are compressed already"
        )
    return tarfile.open(tar, "r:")


def _refuse_member(tar: Path, info: tarfile.TarInfo, name: str) -> None:
    if name.endswith((".gz", ".bz2", ".xz", ".zst")) or name in ("gz", "bz2", "xz", "zst"):
        raise UserError(
            f"{tar}: member '{info.name}' is compressed: its decoded size is not known to the index and every read "
            f"would unpack it; store it unpacked, or leave it out with `--fields` naming the others"
        )
    if info.size > _LARGEST:
        raise UserError(f"{tar}: member '{info.name}' has {info.size} bytes, at most {_LARGEST} fit; split it")


def _complete(tar: Path, samples: dict[str, _Found], fields: tuple[str, ...], missing: str) -> dict[str, _Found]:
    """Apply the rule for samples that lack a field."""
    short = {key: [name for name in fields if name not in found] for key, found in samples.items()}
    short = {key: names for key, names in short.items() if names}
    if short and missing == "refuse":
        key, names = next(iter(short.items()))
        more = f", and {len(short) - 1} more samples" if len(short) > 1 else ""
        raise UserError(
            f"{tar}: sample '{key}' has no '{names[0]}'{more}; write the shard again, or choose `--missing drop` to "
            "leave such samples out, `--missing keep` to keep them, or `--fields` to name the fields you need"
        )
    if missing == "drop":
        samples = {key: found for key, found in samples.items() if key not in short}
        if not samples:
            raise UserError(f"{tar}: no sample has all of {list(fields)}; name the fields you need with `--fields`")
    return samples


def _lengths(tar: Path, members: NDArray[np.void], name: str) -> NDArray[np.uint32]:
    """Return the number of rows of a ``.npy`` member of each sample."""
    counts = []
    with tar.open("rb") as file:
        for offset, size, _ in members.tolist():
            file.seek(offset)
            try:
                counts.append(npy_header(file.read(min(size, 256)))[1][0])
            except (ValueError, IndexError) as error:
                raise UserError(f"{tar}: member at byte {offset} ('{name}') is no .npy array ({error})") from error
    return np.array(counts, _U4)


def npy_header(content: bytes | memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype, shape and the offset of the data of a ``.npy`` file.

    Raises:
        ValueError: it is no such file.
    """
    file = BytesIO(content[:4096])
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return dtype, shape, file.tell()


def _body(index: ShardIndex) -> bytes:
    members = np.ascontiguousarray(index.members).tobytes()
    columns = [np.asarray(column, _U4) for column in index.lengths.values()]
    lengths = np.stack(columns, 1).tobytes() if columns else b""
    lengths += b"\0" * (-len(lengths) % 8)
    return members + lengths + np.asarray(index.ends, _U4).tobytes() + bytes(index.text)


def checksum(index: ShardIndex) -> int:
    """Return the CRC-32 of what an index says of its samples, which the manifest keeps."""
    return crc32(_body(index))


def to_bytes(index: ShardIndex) -> bytes:
    """Return the index file's content."""
    body = _body(index)
    header = json.dumps(
        {
            "tar": index.tar,
            "tar_bytes": index.tar_bytes,
            "tar_sha256": index.tar_sha256,
            "samples": len(index),
            "fields": index.fields,
            "lengths": list(index.lengths),
            "body_crc32": crc32(body),
        }
    ).encode()
    header += b" " * (-(len(MAGIC) + 4 + len(header)) % 64)
    return MAGIC + struct.pack("<I", len(header)) + header + body


def from_bytes(path: str | Path, content: bytes | memoryview) -> ShardIndex:
    """Return the index that an index file holds; its arrays are views of ``content``.

    Raises:
        UserError: it is damaged.
    """
    start = len(MAGIC) + 4
    try:
        if content[: len(MAGIC)] != MAGIC:
            old = re.match(rb"PSINDEX\d", content[: len(MAGIC)])
            raise ValueError("written by another release" if old else "not an index file")
        begin = start + struct.unpack("<I", content[len(MAGIC) : start])[0]
        header = json.loads(bytes(content[start:begin]))
        body = memoryview(content)[begin:]
        if crc32(body) != header["body_crc32"]:
            raise ValueError("its checksum is wrong")
        return _from_body(header, body)
    except (ValueError, KeyError, struct.error) as error:
        folder = str(path).rpartition("/")[0] or "."
        raise UserError(
            f"{path}: damaged index ({error}); make it anew with `paperscale data index {folder}`"
        ) from error


def _from_body(header: dict[str, Any], body: memoryview) -> ShardIndex:
    samples, fields, names = header["samples"], tuple(header["fields"]), header["lengths"]
    members_end = samples * len(fields) * MEMBER.itemsize
    lengths_end = members_end + samples * len(names) * 4
    ends_start = lengths_end + -lengths_end % 8
    members = np.frombuffer(body[:members_end], MEMBER).reshape(samples, len(fields))
    lengths = np.frombuffer(body[members_end:lengths_end], _U4).reshape(samples, len(names))
    ends = np.frombuffer(body[ends_start : ends_start + 4 * samples], _U4)
    columns = {name: lengths[:, column] for column, name in enumerate(names)}
    text = body[ends_start + 4 * samples :]
    facts = header["tar_bytes"], header["tar_sha256"]
    return ShardIndex(header["tar"], fields, members, columns, ends, text, *facts, crc32=header["body_crc32"])


def load(tar: Path) -> ShardIndex:
    """Read the index beside ``tar`` and check it against itself and against the tar's size.

    Raises:
        UserError: the tar or its index is missing, damaged, or they do not belong together.
    """
    path = tar.with_name(tar.name + SUFFIX)
    try:
        content = path.read_bytes()
        size = tar.stat().st_size
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing; copy the set again, or prepare it again with `paperscale data prepare`"
        ) from error
    index = from_bytes(path, content)
    if size != index.tar_bytes:
        raise UserError(
            f"{path}: made for a tar of {index.tar_bytes} bytes, {tar.name} has {size}; copy the shard again, "
            f"or prepare the set again with `paperscale data prepare`"
        )
    return index


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
