"""Writing shards: ordinary WebDataset tars with an index beside each, atomically and resumably.

The bytes of a shard depend on its samples alone (no clock, no user name), so the same input gives the same tars.
A shard appears under its name only when it and its index are complete and on the disk; a writer that was killed
goes on after the last complete shard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from paperscale.data import index as shard_index
from paperscale.data.shards import Shard
from paperscale.errors import UserError

Sample = dict[str, Any]


def write_split(
    folder: Path,
    split: str,
    count: int,
    samples: Callable[[int, int], Iterable[Sample]],
    *,
    per_shard: int = 5000,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Shard]:
    """Write the shards of one split.

    Args:
        folder: where the set is; created where it is missing.
        split: the shards are called ``<split>-000000.tar`` and so on.
        count: samples of the split.
        samples: ``samples(start, stop)`` yields samples as WebDataset dictionaries (``__key__`` and fields).
        per_shard: samples of a shard.
        progress: called with the number of samples written, or found already written, after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, count, per_shard)):
        stop = min(start + per_shard, count)
        tar = folder / f"{split}-{number:06d}.tar"
        shard = _complete(tar, stop - start) or _write_shard(tar, samples(start, stop))
        shards.append(shard)
        progress(stop - start)
    return shards


def _complete(tar: Path, samples: int) -> Shard | None:
    """Return the shard if an earlier, interrupted writer finished it."""
    try:
        index = shard_index.load(tar)
    except UserError:
        return None
    if len(index) != samples or shard_index.sha256(tar) != index.tar_sha256:
        return None
    return Shard(tar.name, samples, index.tar_bytes, index.tar_sha256)


def _write_shard(tar: Path, samples: Iterable[Sample]) -> Shard:
    from webdataset import TarWriter

    partial = tar.with_name(tar.name + ".partial")
    try:
        with partial.open("wb") as file:
            with TarWriter(file, mtime=0, mode=0o644, user="root", group="root") as writer:
                for sample in samples:
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(tar)) from error
    index = replace(shard_index.build(partial), tar=tar)
    write_atomically(tar.with_name(tar.name + shard_index.SUFFIX), shard_index.to_bytes(index))
    partial.rename(tar)
    return Shard(tar.name, len(index), index.tar_bytes, index.tar_sha256)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name holds the old content or the new, never half of either.

    Raises:
        OSError: it cannot be written; names the file.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
