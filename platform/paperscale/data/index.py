"""The index beside a shard: where each member of each sample lies in the tar, and what it must contain.

``mnist-000000.tar`` stays an ordinary WebDataset tar; ``mnist-000000.tar.idx`` is derived from it and gives random
access. Layout: 8 bytes of magic, the header's length (uint32, little-endian), the header (JSON, padded with spaces
to a multiple of 64 bytes from the file's start), then one :data:`MEMBER` per sample and field, row by row.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paperscale.errors import UserError

MAGIC = b"PSINDEX1"
SUFFIX = ".idx"
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class ShardIndex:
    """The members of one shard.

    Attributes:
        tar: the shard.
        fields: file extensions of a sample's members, in the order of the columns.
        members: shape [samples, fields], dtype :data:`MEMBER`.
        tar_bytes: size of the tar that was indexed.
        tar_sha256: hash of the tar that was indexed.
    """

    tar: Path
    fields: tuple[str, ...]
    members: NDArray[np.void]
    tar_bytes: int
    tar_sha256: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.members)


def split_key(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, field


def build(tar: Path) -> ShardIndex:
    """Index a tar by reading it once.

    Raises:
        UserError: the tar is damaged, or its samples do not all have the same fields.
    """
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as raw:
            for info in archive:
                if not info.isreg():
                    continue
                key, field = split_key(info.name)
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if field in samples[-1][1]:
                    raise UserError(f"{tar}: '{info.name}' occurs twice; write the shard again")
                raw.seek(info.offset_data)
                crc = zlib.crc32(raw.read(info.size))
                samples[-1][1][field] = (info.offset_data, info.size, crc)
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a readable tar ({error}); write or copy the shard again") from error
    if not samples:
        raise UserError(f"{tar}: holds no sample; delete it or write the shard again")
    fields = tuple(sorted(samples[0][1]))
    for key, found in samples:
        if tuple(sorted(found)) != fields:
            raise UserError(f"{tar}: sample '{key}' has fields {sorted(found)}, the first has {list(fields)}")
    members = np.array([[found[f] for f in fields] for _, found in samples], MEMBER)
    return ShardIndex(tar, fields, members, tar.stat().st_size, sha256(tar))


def to_bytes(index: ShardIndex) -> bytes:
    """Return the index file's content."""
    body = index.members.tobytes()
    header = json.dumps(
        {
            "tar": index.tar.name,
            "tar_bytes": index.tar_bytes,
            "tar_sha256": index.tar_sha256,
            "samples": len(index),
            "fields": index.fields,
            "body_crc32": zlib.crc32(body),
        }
    ).encode()
    header += b" " * (-(len(MAGIC) + 4 + len(header)) % 64)
    return MAGIC + struct.pack("<I", len(header)) + header + body


def load(tar: Path) -> ShardIndex:
    """Read the index beside ``tar`` and check it against itself and against the tar's size.

    Raises:
        UserError: the tar or its index is missing, damaged, or they do not belong together.
    """
    path = tar.with_name(tar.name + SUFFIX)
    fix = f"prepare the set again (`paperscale data prepare NAME --out {tar.parent}`)"
    try:
        content = path.read_bytes()
        size = tar.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {fix}") from error
    start = len(MAGIC) + 4
    try:
        if not content.startswith(MAGIC):
            raise ValueError("not an index file")
        length = struct.unpack("<I", content[len(MAGIC) : start])[0]
        header = json.loads(content[start : start + length])
        body = content[start + length :]
        if zlib.crc32(body) != header["body_crc32"]:
            raise ValueError("its checksum is wrong")
        fields = tuple(header["fields"])
        members = np.frombuffer(body, MEMBER).reshape(header["samples"], len(fields))
    except (ValueError, KeyError, struct.error) as error:
        raise UserError(f"{path}: damaged index ({error}); {fix}") from error
    if size != header["tar_bytes"]:
        raise UserError(f"{path}: made for a tar of {header['tar_bytes']} bytes, {tar.name} has {size}; {fix}")
    return ShardIndex(tar, fields, members, size, header["tar_sha256"])


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
