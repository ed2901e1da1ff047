"""Hugging Face datasets: memory-mapped Arrow with random access, and streamed Parquet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from paperscale.bench.peers.base import TOKENS, Keeping, blocks, images
from paperscale.bench.peers.torchdata import Stateful
from paperscale.bench.works import View, collate, on_image, on_tokens

_FILES = 6
_ROW_GROUP = 100  # images of a Parquet row group: 10 MB
_BUFFER = 1000


def _rows(kind: str, source: str) -> Iterator[dict[str, Any]]:
    if kind == "images":
        for number, content in images(Path(source)):
            yield {"id": number, "jpg": content}
        return
    for block in blocks(kind, Path(source)):
        yield {"tokens": np.asarray(block)}


def _table(kind: str, source: Path, cache: Path) -> Any:
    if kind == "images":
        features = datasets.Features({"id": datasets.Value("int64"), "jpg": datasets.Value("binary")})
    else:
        length = TOKENS[kind][1]
        features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=length)})
    return datasets.Dataset.from_generator(
        _rows, features, cache_dir=str(cache), gen_kwargs={"kind": kind, "source": str(source)}
    )


class Transform:
    """Turns columns into what the work makes of each row."""

    def __init__(self, view: View):
        self.image = on_image(view.work) if view.kind == "images" else None

    def one(self, row: dict[str, Any]) -> Any:
        """Return a sample."""
        return self.image(row["jpg"], row["id"]) if self.image is not None else on_tokens(row["tokens"])


class Rows:
    """Map-style rows; a whole batch is fetched at once, as the library does for PyTorch."""

    def __init__(self, view: View, folder: Path):
        table = datasets.load_from_disk(str(folder))
        self.table = table if view.kind == "images" else table.with_format("numpy")
        self.transform = Transform(view)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Any:
        return self.transform.one(self.table[number])

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        """Return several samples."""
        columns = self.table[numbers]
        names = list(columns)
        return [
            self.transform.one(dict(zip(names, row, strict=True)))
            for row in zip(*(columns[name] for name in names), strict=True)
        ]


class Streamed(Keeping):
    """Parquet files, streamed through the shuffle buffer."""

    reads_ahead = True

    def __init__(self, view: View, folder: Path):
        files = [str(path) for path in sorted(folder.glob("*.parquet"))]
        stream: Any = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        stream = stream.shuffle(seed=view.seed, buffer_size=_BUFFER)
        if view.kind != "images":
            stream = stream.with_format("numpy")
        self.stream = split_dataset_by_node(stream, view.rank, view.world) if view.world > 1 else stream
        self.transform = Transform(view)
        self.loader = StatefulDataLoader(self.stream, **{**view.loading(), "collate_fn": self._collate})

    def _collate(self, rows: list[Any]) -> Any:
        return collate([self.transform.one(row) for row in rows])


class Peer:
    """Arrow, memory-mapped, with random access."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the Arrow files."""
        _table(kind, source, out / "cache").save_to_disk(str(out), num_shards=_FILES)
        shutil.rmtree(out / "cache")

    def open(self, view: View, source: Path, out: Path) -> Stateful:
        """Open the Arrow files."""
        return Stateful(view, Rows(view, out))  # type: ignore[arg-type]


class Parquet(Peer):
    """Parquet, streamed."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the Parquet files."""
        table = _table(kind, source, out / "cache")
        for number in range(_FILES):
            shard = table.shard(_FILES, number, contiguous=True)
            shard.to_parquet(str(out / f"{number:05d}.parquet"), batch_size=_ROW_GROUP if kind == "images" else 10_000)
        shutil.rmtree(out / "cache")

    def open(self, view: View, source: Path, out: Path) -> Any:
        """Open the Parquet files."""
        return Streamed(view, out)
