"""A set of shards: opening it, reading samples by number."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from paperscale.data import index as shard_index
from paperscale.data.faults import RemoteError, SampleFault
from paperscale.data.files import Buffer, Folder, ShardFile, open_folder
from paperscale.data.index import ShardIndex, crc32
from paperscale.errors import UserError, nearest

MANIFEST = "manifest.json"
VERSION = 2
_OPEN_SHARDS = 512
_LOOKS_AT_ONCE = 16


@dataclass(frozen=True)
class Shard:
    """One tar of a set.

    Attributes:
        name: its file name, relative to the set.
        samples: WebDataset samples in it.
        bytes: its size.
        sha256: its hash.
        lengths: sums of what batches are made by.
        index: CRC-32 of its index, see :func:`~paperscale.data.index.checksum`.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    lengths: Mapping[str, int] = field(default_factory=dict)
    index: int | None = None


@dataclass
class Manifest:
    """What a set of shards holds: written last, so a set without it is not complete.

    Attributes:
        name: the data set's name.
        splits: the shards of each split, in writing order.
        classes: names of the labels.
        image: ``height``, ``width``, ``channels``, and per-channel ``mean`` and ``std`` of the train split in [0, 1].
        schema: field to what it holds.
        lengths: length to the ``.npy`` field whose rows it counts.
        files: small files of the set beside its shards, with their SHA-256.
        provenance: where the data came from, with hashes and licence.
        tars: folder or URL of the shards, where they are not beside the manifest and the indexes.
    """

    name: str
    splits: dict[str, list[Shard]]
    classes: list[str] = field(default_factory=list)
    image: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tars: str = ""
    version: int = VERSION

    def to_json(self) -> str:
        """Return the manifest file's content: a line for each shard."""
        facts = asdict(self)
        splits = facts.pop("splits")
        lines = [
            f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(shard)}" for shard in shards) + "\n  ]"
            for name, shards in splits.items()
        ]
        return json.dumps(facts, indent=1)[:-2] + ',\n "splits": {\n' + ",\n".join(lines) + "\n }\n}\n"

    def shards(self) -> Iterable[tuple[str, Shard]]:
        """Yield every shard with its split."""
        for split, shards in self.splits.items():
            for shard in shards:
                yield split, shard


def read_manifest(folder: str | Path | Folder) -> Manifest:
    """Read the manifest of the set in ``folder``.

    Raises:
        UserError: the folder is missing, holds no Paperscale set, or its manifest is damaged.
    """
    path = f"{folder}/{MANIFEST}"
    make = "make one with `paperscale data prepare`"
    if isinstance(folder, (str, Path)):
        if "://" not in str(folder):
            _refuse_no_set(Path(folder), make)
        folder = open_folder(folder)
    try:
        raw = json.loads(bytes(folder.read_file(MANIFEST)))
        if raw["version"] != VERSION:
            raise UserError(
                f"{path}: version {raw['version']}, this release reads {VERSION}; make it anew with "
                f"`paperscale data index {folder}`"
            )
        splits = {name: [Shard(**shard) for shard in shards] for name, shards in raw.pop("splits").items()}
        return Manifest(splits=splits, **raw)
    except UserError:
        raise  # a server's, which says all there is to say
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check that it can be read from this machine") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); {make}") from error


def _refuse_no_set(folder: Path, make: str) -> None:
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "the folder does not exist"
        raise UserError(f"no shards at {folder}: {what}; {make} or set data.path")
    if not (folder / MANIFEST).exists():
        tars = len(list(folder.glob("*.tar")))
        raise UserError(
            f"{folder} holds {tars} tar files but no {MANIFEST}: an unfinished set (run `paperscale data prepare` "
            f"again), or somebody's WebDataset shards (adopt them with `paperscale data index {folder}`)"
            if tars
            else f"{folder} holds neither {MANIFEST} nor a tar: {make}, or name the folder of a set"
        )


class ShardSet:
    """The samples of one or more splits of a set, by number.

    Args:
        path: the set: a folder or a URL.
        split: one split, or several joined by ``+`` (``"train+val"``).
        mapped: whether shards on a local disk are mapped: nothing is copied, and the pages that were read count as
            this process's memory. On a network file system they never are.

    Raises:
        UserError: the set or the split does not exist.
    """

    def __init__(self, path: str | Path, split: str, *, mapped: bool = True):
        self.path, self.split, self.mapped = str(path), split, mapped
        if "://" not in self.path:
            _refuse_no_set(Path(path), "make one with `paperscale data prepare`")
        self.folder = open_folder(path, mapped)
        self.manifest = read_manifest(self.folder)
        self.tars = open_folder(self.manifest.tars, mapped) if self.manifest.tars else self.folder
        self.shards: list[Shard] = []
        for name in split.split("+"):
            if name not in self.manifest.splits:
                known = list(self.manifest.splits)
                raise UserError(f"{self.path} has no split '{name}', only {known}{nearest(name, known)}")
            self.shards += self.manifest.splits[name]
        self._open: OrderedDict[int, tuple[ShardIndex, ShardFile]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes open their own
        return partial(ShardSet, self.path, self.split, mapped=self.mapped), ()

    @property
    def sizes(self) -> list[int]:
        """Return the number of samples of each shard."""
        return [shard.samples for shard in self.shards]

    def check(self) -> list[str]:
        """Compare the size of every shard with the manifest's, a look at each file; return what is wrong."""
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            return [problem for problem in pool.map(self._look_at, self.shards) if problem]

    def _look_at(self, shard: Shard) -> str | None:
        try:
            size = self.tars.size(shard.name)
            self.folder.size(shard.name + shard_index.SUFFIX)
        except FileNotFoundError as error:
            return f"{error.filename or shard.name} is missing; copy the set again, or prepare it again"
        except OSError as error:
            return f"{self.tars}/{shard.name}: {error.strerror or error}; check the file system"
        if size != shard.bytes:
            fix = "copy it again, or prepare the set again"
            return f"{self.tars}/{shard.name}: has {size} bytes, {shard.bytes} were written; {fix}"
        return None

    def tar(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        return f"{self.tars}/{self.shards[shard].name}"

    def fields(self) -> tuple[str, ...]:
        """Return the fields of the samples, by the index of the first shard that has one.

        Raises:
            UserError: no shard can be opened.
        """
        for shard in range(len(self.shards)):
            try:
                return self.opened(shard)[0].fields
            except (OSError, UserError):
                continue
        raise UserError(f"{self.path}: no shard of '{self.split}' can be opened; `paperscale data verify {self.path}`")

    def key(self, shard: int, row: int) -> str:
        """Return a sample's key."""
        return self.opened(shard)[0].key(row)

    def read(self, shard: int, row: int, fields: Sequence[str] | None = None) -> dict[str, Buffer]:
        """Return the members of one sample, by field, each checked against the index's checksum.

        Args:
            shard: its place in :attr:`shards`.
            row: the sample's place in the shard.
            fields: the members to read, of those the sample has; by default all.

        Raises:
            SampleFault: the shard cannot be read, or was damaged or replaced since it was indexed.
        """
        retried = False
        while True:
            try:
                return self._read(shard, row, fields)
            except SampleFault:
                if retried or not self._forget(shard, row):
                    raise
            except (OSError, UserError) as error:
                if isinstance(error, RemoteError) and not isinstance(error, FileNotFoundError):
                    raise  # it has been tried again already, and the sample may well be whole
                if retried:
                    reason = str(error)
                    if isinstance(error, OSError) and error.strerror:
                        reason = f"{error.filename}: {error.strerror}"
                    raise SampleFault(self.tar(shard), f"row {row}", reason) from error
                with self._lock:
                    self._open.pop(shard, None)  # a mount that came back has new handles
            retried = True

    def _read(self, shard: int, row: int, fields: Sequence[str] | None) -> dict[str, Buffer]:
        index, file = self.opened(shard)
        sample: dict[str, Buffer] = {}
        for name, (offset, size, crc) in zip(index.fields, index.members[row].tolist(), strict=True):
            if not offset or (fields is not None and name not in fields):
                continue
            content = file.read(offset, size)
            if crc32(content) != crc:
                raise self._fault(index, shard, row, name, offset, size, content)
            sample[name] = content
        return sample

    def _fault(
        self, index: ShardIndex, shard: int, row: int, name: str, offset: int, size: int, content: Buffer
    ) -> SampleFault:
        """Return the error that says what is wrong with a member."""
        if len(content) < size:
            what = f"the shard ends at byte {offset + len(content)}, inside or before it: cut off"
        elif not any(bytes(content[:4096])):
            what = "zeros instead of its content"
        else:
            what = "its content is not what was written (checksum)"
        where = f"member '{name}' at byte {offset}"
        return SampleFault(self.tar(shard), index.key(row), f"{where}: {what}")

    def _forget(self, shard: int, row: int) -> bool:
        """Drop what a cache holds of a sample; return whether there is a cache that may be what is damaged."""
        forget = getattr(self.tars, "forget", None)
        if forget is None:
            return False
        for offset, size, _ in self.opened(shard)[0].members[row].tolist():
            forget(self.shards[shard].name, offset, size)
        return True

    def opened(self, shard: int) -> tuple[ShardIndex, ShardFile]:
        """Return a shard's index and the open shard.

        Raises:
            UserError: the index is missing, damaged, or another shard's.
            OSError: a file cannot be read.
        """
        found = self._open.get(shard)
        if found is not None:
            return found
        facts = self.shards[shard]
        path = f"{self.path}/{facts.name}{shard_index.SUFFIX}"
        index = shard_index.from_bytes(path, self.folder.read_file(facts.name + shard_index.SUFFIX))
        if index.tar_sha256 != facts.sha256 or facts.index not in (index.crc32, None):
            raise UserError(
                f"{path}: not the index of the shard in {MANIFEST}: the shard was replaced; copy the set again, or "
                f"make index and manifest anew with `paperscale data index {self.path}`"
            )
        opened = (index, self.tars.open(facts.name))
        with self._lock:
            self._open[shard] = opened
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # lives on while a reader still holds it
        return opened

    def prefetch(self, samples: Iterable[tuple[int, int]]) -> None:
        """Let a remote folder fetch samples, given as (shard, row), that will be read soon."""
        prefetch = getattr(self.tars, "prefetch", None)
        if prefetch is None:
            return
        ranges = []
        for shard, row in samples:
            members = self.opened(shard)[0].members[row]
            members = members[members["offset"] > 0]
            if len(members):
                start = int(members["offset"].min())
                stop = int((members["offset"] + members["size"]).max())
                ranges.append((self.shards[shard].name, start, stop - start))
        prefetch(ranges)

    def lengths(self, shards: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Return the lengths of samples, int64 [samples, names], from the index.

        Raises:
            UserError: the index has no such length.
        """
        found = np.empty((len(rows), len(names)), np.int64)
        for shard in np.unique(shards):
            index = self.opened(int(shard))[0]
            here = shards == shard
            for column, name in enumerate(names):
                if name not in index.lengths:
                    known = list(index.lengths)
                    raise UserError(
                        f"{self.path}: its index has no length '{name}', only {known}{nearest(name, known)}; make it "
                        f"with `paperscale data index {self.path} --length {name}=FIELD.npy`"
                    )
                found[here, column] = index.lengths[name][rows[here]]
        return found
