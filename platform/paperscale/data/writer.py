"""Writing shards: ordinary WebDataset tars with an index beside each, atomically and resumably.

The bytes of a shard depend on its samples alone (no clock, no user name, not the number of processes), so the same
input gives the same tars. A shard appears under its name only when it and its index are complete and on the disk; a
writer that was killed goes on after the last complete shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

from paperscale.atomic import write_atomically
from paperscale.data import index as shard_index
from paperscale.data.index import Rules
from paperscale.data.loader import cores
from paperscale.data.shards import MANIFEST, Manifest, Shard
from paperscale.errors import UserError

Sample = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 32  # items that a worker process encodes at a time
_FEW = 1000  # items that are not worth starting processes for


@dataclass
class Done:
    """What an earlier, interrupted writer has finished of a split.

    Attributes:
        shards: its complete shards.
        last: index of the last of them.
    """

    shards: list[Shard] = field(default_factory=list)
    last: shard_index.ShardIndex | None = None

    @property
    def samples(self) -> int:
        """Return the number of finished samples."""
        return sum(shard.samples for shard in self.shards)

    def total(self, length: str) -> int:
        """Return the sum of a length over the finished samples."""
        return sum(shard.lengths[length] for shard in self.shards)


class ShardWriter:
    """Writes a set of shards; leaving the ``with`` block without an error writes the manifest, which completes it.

    ::

        with ShardWriter("data/photos", "photos", classes=["cat", "dog"]) as writer:
            writer.write("train", files, encode)  # encode(files[i]) -> {"__key__": ..., "jpg": ..., "cls": ...}

    Args:
        folder: where the set goes; created where it is missing.
        name: the set's name.
        shard_bytes: a shard is closed with the sample that takes it to this size, in bytes.
        shard_samples: or with this number of samples.
        classes: names of the labels.
        image: the manifest's facts about images.
        schema: field to what it holds.
        lengths: length to the ``.npy`` field whose rows it counts; kept in the index, to make batches by.
        provenance: where the data came from.
        num_processes: processes that encode; 0 encodes in this one, ``None`` takes one for each core if there are
            1,000 samples or more (a script then needs the usual ``if __name__ == "__main__":``).
        progress: called with the number of samples written, or found already written.

    Raises:
        UserError: the folder holds a complete set.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        *,
        shard_bytes: int = 128 << 20,
        shard_samples: int | None = None,
        classes: Sequence[str] = (),
        image: dict[str, Any] | None = None,
        schema: dict[str, str] | None = None,
        lengths: dict[str, str] | None = None,
        provenance: dict[str, Any] | None = None,
        num_processes: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ):
        self.folder, self.name = Path(folder), name
        self.shard_bytes, self.shard_samples = shard_bytes, shard_samples
        self.classes, self.image, self.schema = list(classes), image or {}, schema or {}
        self.lengths, self.provenance = lengths or {}, provenance or {}
        self.num_processes, self.progress = num_processes, progress
        self.splits: dict[str, list[Shard]] = {}
        self.files: dict[str, str] = {}
        if (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder} holds a complete set; choose another folder, or delete it to write it anew")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}; choose another folder") from error

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Complete the set if nothing went wrong."""
        if error is None:
            self.finish()

    def write(self, split: str, items: Iterable[T], encode: Callable[[T], Sample] | None = None) -> list[Shard]:
        """Write the samples of a split, in the order of the items.

        Args:
            split: the shards are called ``<split>-000000.tar`` and so on.
            items: what to encode; the same in the same order when an interrupted writer is run again.
            encode: makes a WebDataset dictionary of an item; without it the items are such dictionaries.

        Raises:
            UserError: finished shards of an earlier run do not begin as these items do.
        """

        def samples(done: Done) -> Iterator[Sample]:
            rest = iter(items)
            for number in range(done.samples):
                item = next(rest, None)
                if number == done.samples - 1:
                    sample: Any = None if item is None else encode(item) if encode else item
                    self._check_same(split, done.last, sample)
            if encode is None:
                return (sample for sample in rest)  # type: ignore[misc]
            return map_in_order(encode, rest, self.processes(items, done.samples))

        return self.write_samples(split, samples)

    def _check_same(self, split: str, last: shard_index.ShardIndex | None, sample: Sample | None) -> None:
        """Compare the last finished sample with what the input has in its place, to the byte."""
        if last is None:
            return
        key, now = last.key(len(last) - 1), ""
        if sample is None:
            now = "ends before"
        elif sample["__key__"] != key:
            now = f"has '{sample['__key__']}' in its place"
        elif _checksums(sample) != dict(zip(last.fields, last.members[-1]["crc32"].tolist(), strict=True)):
            now = "gives it another content"
        if now:
            raise UserError(
                f"{self.folder}: its finished shards of '{split}' end with sample '{key}', the input {now}: "
                "they are of another input; choose another folder, or delete them"
            )

    def processes(self, items: Iterable[Any], done: int) -> int:
        """Return how many processes encode ``items``, ``done`` of which are finished."""
        if self.num_processes is not None:
            return self.num_processes
        few = isinstance(items, Sized) and len(items) - done < _FEW
        return 0 if few else cores()

    def write_samples(self, split: str, make: Callable[[Done], Iterable[Sample]]) -> list[Shard]:
        """Write the samples of a split.

        Args:
            split: the shards are called ``<split>-000000.tar`` and so on.
            make: given what an interrupted writer has finished, yields the samples that follow.
        """
        if split in self.splits:
            raise UserError(f"split '{split}' is written twice; write all its samples at once")
        done = self._done(split)
        self.progress(done.samples)
        shards = done.shards
        samples = (self._checked(split, number, sample) for number, sample in enumerate(make(done), done.samples))
        while (first := next(samples, None)) is not None:
            tar = self.folder / f"{split}-{len(shards):06d}.tar"
            shards.append(self._write_shard(tar, first, samples))
        if not shards:
            raise UserError(f"{self.folder}: split '{split}' has no sample; check the source of the data")
        self.splits[split] = shards
        return shards

    def _checked(self, split: str, number: int, sample: Sample | None) -> Sample:
        """Return a sample whose members WebDataset will find together."""
        where = f"{self.folder}: sample {number:,} of '{split}'"
        if not isinstance(sample, dict) or not isinstance(sample.get("__key__"), str):
            raise UserError(
                f"{where} is {type(sample).__name__} without a '__key__': give a dictionary for each item, and leave "
                "out beforehand what should not be written"
            )
        key = sample["__key__"]
        if "." in key.rpartition("/")[2]:
            raise UserError(
                f"{where}: its key '{key}' has a dot, where WebDataset would cut it; use '{key.replace('.', '-')}'"
            )
        return sample

    def _done(self, split: str) -> Done:
        """Return what an earlier, interrupted writer has finished."""
        done = Done()
        while True:
            tar = self.folder / f"{split}-{len(done.shards):06d}.tar"
            try:
                index = shard_index.load(tar)
            except UserError:
                return done
            if shard_index.sha256(tar) != index.tar_sha256 or set(index.lengths) != set(self.lengths):
                return done
            done.shards.append(as_shard(index))
            done.last = index

    def _write_shard(self, tar: Path, first: Sample, rest: Iterator[Sample]) -> Shard:
        """Write one shard: ``first``, then as many of the rest as it takes."""
        from webdataset import TarWriter

        partial = tar.with_name(tar.name + ".partial")
        written = 0
        try:
            with partial.open("wb") as file:
                with TarWriter(file, mtime=0, mode=0o644, user="root", group="root") as writer:
                    sample: Sample | None = first
                    while sample is not None:
                        writer.write(sample)
                        written += 1
                        if written % _CHUNK == 0:
                            self.progress(_CHUNK)
                        full = file.tell() >= self.shard_bytes or written == self.shard_samples
                        sample = None if full else next(rest, None)
                file.flush()
                os.fsync(file.fileno())
            self.progress(written % _CHUNK)
            index = replace(shard_index.build(partial, Rules(lengths=self.lengths)), tar=tar.name)
            if len(index) != written:
                raise UserError(f"{tar}: two of its samples have the same key; give samples distinct keys")
            write_atomically(tar.with_name(tar.name + shard_index.SUFFIX), shard_index.to_bytes(index))
            partial.rename(tar)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OSError(error.errno, error.strerror, str(tar)) from error
        return as_shard(index)

    def attach(self, name: str, content: bytes) -> None:
        """Add a small file to the set, for example its ``tokenizer.json``."""
        write_atomically(self.folder / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def finish(self) -> Manifest:
        """Write the manifest, which completes the set, and return it."""
        manifest = Manifest(
            self.name,
            self.splits,
            self.classes,
            self.image,
            self.schema,
            self.lengths,
            self.files,
            self.provenance,
        )
        known = {shard.name for _, shard in manifest.shards()}
        for tar in self.folder.glob("*.tar"):  # of an earlier, longer input
            if tar.name.rpartition("-")[0] in self.splits and tar.name not in known:
                tar.unlink()
                tar.with_name(tar.name + shard_index.SUFFIX).unlink(missing_ok=True)
        write_atomically(self.folder / MANIFEST, manifest.to_json().encode())
        return manifest


def as_shard(index: shard_index.ShardIndex) -> Shard:
    """Return what a manifest says of an indexed shard."""
    sums = {name: int(column.sum()) for name, column in index.lengths.items()}
    return Shard(index.tar, len(index), index.tar_bytes, index.tar_sha256, sums, shard_index.checksum(index))


def _checksums(sample: Sample) -> dict[str, int]:
    """Return the checksum of each member as it would be written."""
    from webdataset.writer import make_encoder

    members = make_encoder(True)(sample).items()
    return {name: shard_index.crc32(content) for name, content in members if not name.startswith("_")}


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], num_processes: int, chunk: int = _CHUNK
) -> Iterator[R]:
    """Yield ``function(item)`` of each item in their order, computed by processes a bounded number of items ahead.

    Args:
        function: what to compute; picklable.
        items: of what.
        num_processes: below 2 everything is computed here.
        chunk: items that a process is given at a time.
    """
    if num_processes < 2:
        yield from map(function, items)
        return
    try:
        pickle.dumps(function)
    except Exception as error:  # of whatever kind its pieces raise
        raise UserError(
            f"{getattr(function, '__name__', function)} cannot be sent to worker processes ({error}); define it at the "
            "top level of a module, or encode in this process with num_processes=0"
        ) from error
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    waiting: deque[Future[list[R]]] = deque()
    rest = iter(items)
    with ProcessPoolExecutor(num_processes, context, _end_with_parent) as pool:
        try:
            while True:
                while len(waiting) < 4 * num_processes and (some := _take(rest, chunk)):
                    waiting.append(pool.submit(_map, function, some))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process ended before its time: a script needs `if __name__ == '__main__':` around what it "
                "does, or num_processes=0; otherwise look whether memory ran out (dmesg)"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker process when the one it works for is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _take(items: Iterator[T], count: int) -> list[T]:
    return [item for _, item in zip(range(count), items, strict=False)]


def _map(function: Callable[[T], R], items: list[T]) -> list[R]:
    return [function(item) for item in items]
