"""PyTorch's own: a folder of files or a memory-mapped array behind a ``DataLoader``, and what training scripts do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from paperscale.bench.meters import Growth
from paperscale.bench.peers.base import IMAGES, Skipping, blocks
from paperscale.bench.works import View, on_image, on_tokens


class Files(Dataset[Any]):
    """Image files by number."""

    def __init__(self, folder: Path, work: str):
        self.paths = [str(path) for path in sorted(folder.iterdir())]
        self.apply = on_image(work)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        with open(self.paths[number], "rb") as file:  # noqa: PTH123  faster than Path.read_bytes
            return self.apply(file.read(), number)


class Blocks(Dataset[Any]):
    """Blocks of tokens by number."""

    def __init__(self, kind: str, source: Path):
        self.array = blocks(kind, source)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, number: int) -> Tensor:
        return on_tokens(self.array[number])


def dataset(view: View, source: Path) -> Dataset[Any]:
    """Return the map-style set of a view."""
    return Files(source / IMAGES, view.work) if view.kind == "images" else Blocks(view.kind, source)


class Shuffled(Skipping):
    """A ``DataLoader`` that shuffles, over a map-style set; resumed by skipping."""

    def __init__(self, view: View, data: Dataset[Any]):
        self.sampler: Any = DistributedSampler(data, view.world, view.rank, seed=view.seed, drop_last=False)
        self.loader = DataLoader(data, sampler=self.sampler, **view.loading())

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        self.sampler.set_epoch(number)
        return self._pass(iter(self.loader))


class Peer:
    """A folder of image files, or a file of tokens (``memmap``), behind ``DataLoader``."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Do nothing: the source is in this format."""

    def open(self, view: View, source: Path, out: Path) -> Any:
        """Open the source."""
        return Shuffled(view, dataset(view, source))

    def plan(self, samples: int, shards: int, ranks: int, folder: Path) -> dict[str, float]:
        """Draw the epoch's order with ``DistributedSampler``; skipping to the middle draws it again."""
        growth, started = Growth(), time.perf_counter()
        sampler: Any = DistributedSampler(range(samples), ranks, ranks - 1)  # type: ignore[arg-type]
        next(iter(sampler))
        opened = time.perf_counter() - started
        started = time.perf_counter()
        next(islice(iter(sampler), samples // ranks // 2, None))
        seek = time.perf_counter() - started
        return {"open_seconds": opened, "seek_seconds": seek, "bytes": growth.read()}


class RandomBlocks(Skipping):
    """Batches of blocks at random places, drawn with replacement, as small GPT training scripts do."""

    def __init__(self, view: View, source: Path):
        self.array, self.batch_size = blocks(view.kind, source), view.batch_size
        self.tokens, self.length = self.array.reshape(-1), self.array.shape[1]

    def epoch(self, number: int) -> Iterator[Tensor]:
        """Yield as many batches as a pass over the set has."""
        for _ in range(len(self.array) // self.batch_size):
            starts = torch.randint(len(self.tokens) - self.length, (self.batch_size,)).tolist()
            yield torch.stack([on_tokens(self.tokens[start : start + self.length]) for start in starts])


class GetBatch(Peer):
    """nanoGPT's ``get_batch``, in spirit: no loader at all."""

    def open(self, view: View, source: Path, out: Path) -> Any:
        """Open the source."""
        return RandomBlocks(view, source)
