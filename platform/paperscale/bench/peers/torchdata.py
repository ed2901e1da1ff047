"""torchdata: ``StatefulDataLoader`` over a folder or a memory-mapped array."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from paperscale.bench.peers.folder import dataset
from paperscale.bench.works import View, collate


class Stateful:
    """A map-style set, shuffled, whose loader keeps the state."""

    def __init__(self, view: View, data: Dataset[Any]):
        self.sampler = StatefulDistributedSampler(data, view.world, view.rank, seed=view.seed, drop_last=False)
        self.loader = StatefulDataLoader(
            data,
            view.batch_size,
            sampler=self.sampler,
            num_workers=view.workers,
            collate_fn=collate,
            persistent_workers=view.persistent,
        )

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        self.sampler.set_epoch(number)
        return iter(self.loader)

    def state(self) -> Any:
        """Return the loader's state."""
        return self.loader.state_dict()

    def restore(self, state: Any) -> None:
        """Give the loader its state."""
        self.loader.load_state_dict(state)


class Peer:
    """The source behind ``StatefulDataLoader``."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Do nothing: the source is in this format."""

    def open(self, view: View, source: Path, out: Path) -> Stateful:
        """Open the source."""
        return Stateful(view, dataset(view, source))
