"""Megatron-Energon: WebDataset's tar files with an index."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

from paperscale.bench.peers import wds
from paperscale.bench.works import View, collate, on_image, on_tokens

_BUFFER, _SEQUENCE = 1000, 100
_PREPARE = ("prepare", "--non-interactive", "--split-parts", "train:shard-.*", "--sample-type", "CrudeWebdataset")


@stateless
def _raw(sample: Any) -> Any:
    return sample


class Encoder(DefaultTaskEncoder):
    """Turns a sample's members into what the work makes of them."""

    cookers = (Cooker(_raw),)
    decoder = None

    def __init__(self, view: View):
        super().__init__()
        self.image = on_image(view.work) if view.kind == "images" else None

    @stateless
    def encode_sample(self, sample: Any) -> Any:
        """Return the sample."""
        if self.image is not None:
            content = sample["jpg"]
            value: Any = self.image(content, int(sample["__key__"].rpartition("/")[2]))
        else:
            value = on_tokens(np.load(io.BytesIO(sample["npy"])))
        return {**{name: sample[name] for name in sample if name.startswith("__")}, "value": value}

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        """Return the batch."""
        return {"batch": collate([sample["value"] for sample in samples])}

    @stateless
    def encode_batch(self, batch: Any) -> Any:
        """Return the batch as it is."""
        return batch


class Savable:
    """The library's dataset and loader, with the shuffling its documentation shows."""

    reads_ahead = True

    def __init__(self, view: View, folder: Path):
        data = get_train_dataset(
            str(folder),
            worker_config=WorkerConfig(
                rank=view.rank, world_size=view.world, num_workers=view.workers, seed_offset=view.seed
            ),
            batch_size=view.batch_size,
            shuffle_buffer_size=_BUFFER,
            max_samples_per_sequence=_SEQUENCE,
            task_encoder=Encoder(view),
            repeat=False,
        )
        self.loader = get_savable_loader(data)

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        for batch in self.loader:
            yield batch["batch"]

    def state(self) -> Any:
        """Return the rank's state."""
        return self.loader.save_state_rank()

    def restore(self, state: Any) -> None:
        """Give the rank its state."""
        self.loader.restore_state_rank(state)


class Peer:
    """The tar files of :class:`~paperscale.bench.peers.wds.Peer`, indexed."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the tar files and let the library's command index them."""
        wds.Peer().write(kind, source, out)
        command = Path(sys.executable).with_name("energon")
        subprocess.run([command, *_PREPARE, out], check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)

    def open(self, view: View, source: Path, out: Path) -> Savable:
        """Open the indexed tar files."""
        logging.getLogger("megatron").setLevel(logging.ERROR)
        return Savable(view, out)
