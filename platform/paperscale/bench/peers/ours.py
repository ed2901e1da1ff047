"""Paperscale itself: shards and the streams that a training reads them through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from paperscale.bench import meters
from paperscale.bench.peers.base import TOKENS, blocks, images
from paperscale.bench.source import VOCABULARY
from paperscale.bench.works import SIZE, View
from paperscale.data import jpeg
from paperscale.data.images import ImageShards
from paperscale.data.shards import MANIFEST, Manifest, Shard, ShardSet
from paperscale.data.stream import Batch, ShardStream
from paperscale.data.text import TokenBlocks
from paperscale.data.tokens import Document, write_tokens
from paperscale.data.writer import ShardWriter

IMAGES_PER_SHARD = 1000
_DOCUMENT = 4096  # tokens


class Contents(ShardStream):
    """Images that are read and not decoded; the checksum reads every byte of them, so nothing else has to."""

    def allocate(self, count: int, train: bool) -> Batch:
        """Return nothing: the samples' numbers are the batch."""
        return {}

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Read one image."""
        shards.read(shard, row_in_shard, ("jpg",))


def stream_of(view: View, folder: Path) -> ShardStream:
    """Return the stream of a view, as one rank of a training has it."""
    size = view.batch_size * view.world
    common: dict[str, Any] = {"global_batch_size": size, "seed": view.seed, "num_threads": view.workers}
    stream: ShardStream
    if view.kind != "images":
        stream = TokenBlocks(str(folder), length=TOKENS[view.kind][1], **common)
    elif view.work == "decode":
        stream = ImageShards(str(folder), crop="random_resized", size=SIZE, flip=True, **common)
    else:
        stream = Contents(str(folder), **common)
    stream.trainer = SimpleNamespace(global_rank=view.rank, world_size=view.world)  # type: ignore[assignment]
    return stream


class Stream:
    """A stream, advanced after each batch as a training does it."""

    def __init__(self, view: View, folder: Path):
        self.stream = stream_of(view, folder)
        self.payload = {"decode": "image", "tokens": "tokens"}.get(view.work, "sample")

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches from where the stream stands to the end of its epoch."""
        for batch in self.stream.train_dataloader():
            self.stream.advance(batch["cursor"])
            if batch["cursor"].weight:  # of 0: another rank has the last samples of the epoch, this one repeats one
                yield batch["sample"], batch[self.payload]

    def state(self) -> Any:
        """Return the stream's state, after the batch that was yielded last."""
        return self.stream.state_dict()

    def restore(self, state: Any) -> None:
        """Give the stream its state."""
        self.stream.load_state_dict(state)


def _image(item: tuple[int, bytes]) -> dict[str, Any]:
    number, content = item
    return {"__key__": f"{number:08d}", "jpg": content, "cls": str(number % 1000).encode()}


def _document(kind: str, source: str, start: int) -> Document:
    tokens = blocks(kind, Path(source)).reshape(-1)[start : start + _DOCUMENT]
    return Document([tokens])


class Peer:
    """Paperscale's shards."""

    def decoder(self) -> str:
        """Return what decodes JPEGs."""
        return f"its own, {jpeg.backend()}"

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the shards."""
        (out / MANIFEST).unlink(missing_ok=True)
        if kind == "images":
            facts = {"height": SIZE, "width": SIZE, "channels": 3}
            total = sum(1 for _ in images(source))
            per_shard = min(IMAGES_PER_SHARD, -(-total // 6))
            with ShardWriter(out, kind, image=facts, shard_samples=per_shard, num_processes=0) as writer:
                writer.write("train", images(source), _image)
            return
        with ShardWriter(out, kind, num_processes=0) as writer:
            starts = range(0, blocks(kind, source).size, _DOCUMENT)
            write_tokens(writer, "train", starts, partial(_document, kind, str(source)), VOCABULARY)

    def open(self, view: View, source: Path, out: Path) -> Stream:
        """Open the shards."""
        return Stream(view, out)

    def plan(self, samples: int, shards: int, ranks: int, folder: Path) -> dict[str, float]:
        """Open a set of a huge number of samples, of which there is only the manifest, and seek in it.

        Returns:
            Seconds to open it on one of ``ranks`` ranks up to the numbers of the first batch, seconds to do so from
            the middle of an epoch, and the bytes by which the process has grown at the most.
        """
        _write_manifest(folder, samples, shards)
        growth = meters.Growth()
        started = time.perf_counter()
        stream = Contents(str(folder), global_batch_size=ranks, seed=0, num_threads=0)
        stream.trainer = SimpleNamespace(global_rank=ranks - 1, world_size=ranks)  # type: ignore[assignment]
        state = stream.state_dict()
        _first_of(stream.train_dataloader())
        opened = time.perf_counter() - started
        middle = samples // 2 // ranks * ranks
        stream.load_state_dict({**state, "consumed": middle})
        loader = stream.train_dataloader()
        started = time.perf_counter()
        _first_of(loader)
        seek = time.perf_counter() - started
        return {"open_seconds": opened, "seek_seconds": seek, "bytes": growth.read()}


def _first_of(loader: Any) -> None:
    piece = next(iter(loader.plans()))
    if not len(loader.reader.order.take(piece.epoch, piece.start, piece.stop).samples):
        raise RuntimeError("the first batch is empty")


def _write_manifest(folder: Path, samples: int, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = np.random.default_rng(0).bytes(32 * shards).hex()
    size = samples // shards
    listed = [
        Shard(f"train-{number:06d}.tar", size, size * 100_000, sha256[64 * number : 64 * number + 64])
        for number in range(shards)
    ]
    (folder / MANIFEST).write_text(Manifest("planned", {"train": listed}).to_json())
