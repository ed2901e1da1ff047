"""A set of shards on disk: opening it, reading samples by number, verifying it."""

from __future__ import annotations

import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from paperscale.data import index as shard_index
from paperscale.data.index import ShardIndex
from paperscale.errors import UserError, nearest

MANIFEST = "manifest.json"
VERSION = 1
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Shard:
    """One tar of a set: its file name, samples, bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds: written last, so a set without it is not complete.

    Attributes:
        name: the data set's name.
        splits: the shards of each split, in writing order.
        classes: names of the labels.
        image: ``height``, ``width``, ``channels``, and per-channel ``mean`` and ``std`` of the train split in [0, 1].
        provenance: where the data came from, with hashes and licence.
    """

    name: str
    splits: dict[str, list[Shard]]
    classes: list[str] = field(default_factory=list)
    image: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """Return the manifest file's content."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the set in ``folder``.

    Raises:
        UserError: the folder is missing, holds no Paperscale set, or its manifest is damaged.
    """
    path = folder / MANIFEST
    make = "make one with `paperscale data prepare mnist --out DIR`"
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "the folder does not exist"
        raise UserError(f"no shards at {folder}: {what}; {make} or set data.path")
    if not path.exists():
        tars = len(list(folder.glob("*.tar")))
        raise UserError(f"{folder} holds {tars} tar files but no {MANIFEST}: not a set of ours, or unfinished; {make}")
    try:
        raw = json.loads(path.read_text())
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, this program reads {VERSION}")
        splits = {name: [Shard(**shard) for shard in shards] for name, shards in raw.pop("splits").items()}
        return Manifest(splits=splits, **raw)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); {make}") from error


class ShardSet:
    """The samples of one or more splits of a set, by number.

    Args:
        folder: the set.
        split: one split, or several joined by ``+`` (``"train+val"``).

    Raises:
        UserError: the set or the split does not exist.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shards: list[Shard] = []
        for name in split.split("+"):
            if name not in self.manifest.splits:
                known = list(self.manifest.splits)
                raise UserError(f"{self.folder} has no split '{name}', only {known}{nearest(name, known)}")
            self.shards += self.manifest.splits[name]
        self._open: OrderedDict[int, tuple[ShardIndex, mmap.mmap]] = OrderedDict()
        self._lock = Lock()

    @property
    def sizes(self) -> list[int]:
        """Return the number of samples of each shard."""
        return [shard.samples for shard in self.shards]

    def check(self) -> None:
        """Compare the size of every shard with the manifest's; costs one look at each file.

        Raises:
            UserError: a shard or its index is missing, or the shard has another size than when it was written.
        """
        for shard in self.shards:
            tar = self.folder / shard.name
            for path in (tar, tar.with_name(tar.name + shard_index.SUFFIX)):
                if not path.is_file():
                    raise UserError(f"{path} is missing; prepare the set again (`paperscale data prepare`)")
            if (size := tar.stat().st_size) != shard.bytes:
                raise UserError(f"{tar}: has {size} bytes, {shard.bytes} were written; prepare the set again")

    def read(self, shard: int, row: int) -> dict[str, bytes]:
        """Return the members of one sample, by field, each checked against the index's checksum.

        Raises:
            UserError: the shard was damaged or replaced since it was indexed.
        """
        index, data = self._shard(shard)
        sample = {}
        for name, member in zip(index.fields, index.members[row], strict=True):
            offset, size = int(member["offset"]), int(member["size"])
            content = data[offset : offset + size]
            if zlib.crc32(content) != member["crc32"]:
                raise UserError(
                    f"{index.tar}: sample {row}, field '{name}' at byte {offset} is damaged; "
                    f"`paperscale data verify {self.folder}` lists the damage, prepare the set again"
                )
            sample[name] = content
        return sample

    def _shard(self, shard: int) -> tuple[ShardIndex, mmap.mmap]:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            index = shard_index.load(self.folder / self.shards[shard].name)
            if len(index) != self.shards[shard].samples:
                raise UserError(
                    f"{index.tar}: holds {len(index)} samples, {MANIFEST} says {self.shards[shard].samples}; "
                    "prepare the set again"
                )
            with index.tar.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._open[shard] = (index, data)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # the mapping lives on while a reader still holds it
            return self._open[shard]


def verify(folder: Path, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """Check every shard of a set against its manifest and its index; return what is wrong, a line each.

    Args:
        folder: the set.
        progress: called with the number of bytes checked after each shard.
    """
    manifest = read_manifest(folder)

    def check(shard: Shard) -> str | None:
        tar = folder / shard.name
        try:
            index = shard_index.load(tar)
            if index.tar_sha256 != shard.sha256 or shard_index.sha256(tar) != shard.sha256:
                return f"{tar}: its content is not what was written (SHA-256 differs)"
            if len(index) != shard.samples:
                return f"{tar}: {len(index)} samples, {MANIFEST} says {shard.samples}"
        except (UserError, OSError) as error:
            return str(error)
        finally:
            progress(shard.bytes)
        return None

    shards = [shard for split in manifest.splits.values() for shard in split]
    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, shards) if problem]
