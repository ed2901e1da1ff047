"""torchdata: ``StatefulDataLoader`` over a folder or a memory-mapped array."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from paperscale.bench.peers.base import Keeping
from paperscale.bench.peers.folder import dataset
from paperscale.bench.works import View


class Stateful(Keeping):
    """A map-style set, shuffled, whose loader keeps the state."""

    def __init__(self, view: View, data: Dataset[Any]):
        self.sampler = StatefulDistributedSampler(data, view.world, view.rank, seed=view.seed, drop_last=False)
        self.loader = StatefulDataLoader(data, sampler=self.sampler, **view.loading())

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        self.sampler.set_epoch(number)
        return super().epoch(number)


class Peer:
    """The source behind ``StatefulDataLoader``."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Do nothing: the source is in this format."""

    def open(self, view: View, source: Path, out: Path) -> Stateful:
        """Open the source."""
        return Stateful(view, dataset(view, source))
