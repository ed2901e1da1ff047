"""WebDataset: tar files, read from one end to the other, through a shuffle buffer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from paperscale.bench.peers.base import IMAGES, Skipping, blocks, images
from paperscale.bench.works import View, collate, on_image, on_tokens

SHARDS = {"images": 6, "tokens": 10, "million": 100}
BUFFER = 1000


class Transform:
    """Turns a sample's members into what the work makes of them."""

    def __init__(self, view: View):
        self.image = on_image(view.work) if view.kind == "images" else None

    def __call__(self, sample: dict[str, Any]) -> Any:
        """Return the sample."""
        if self.image is not None:
            return self.image(sample["jpg"], int(sample["__key__"]))
        return on_tokens(np.load(io.BytesIO(sample["npy"])))


class Tars(Skipping):
    """The library's usual pipeline."""

    reads_ahead = True

    def __init__(self, view: View, folder: Path):
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        stages = webdataset.WebDataset(
            urls, shardshuffle=len(urls), seed=view.seed, nodesplitter=webdataset.split_by_node
        )
        stages = stages.shuffle(BUFFER, seed=view.seed).map(Transform(view))
        stages = stages.batched(view.batch_size, collation_fn=collate, partial=True)
        self.loader = webdataset.WebLoader(
            stages, batch_size=None, num_workers=view.workers, persistent_workers=view.persistent
        )

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        return self._pass(iter(self.loader))


class Peer:
    """Tar files of 1,000 images or about 10,000 blocks."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the tar files."""
        total = len(list((source / IMAGES).iterdir())) if kind == "images" else len(blocks(kind, source))
        maximum = -(-total // SHARDS[kind])
        with webdataset.ShardWriter(f"{out}/shard-%06d.tar", maxcount=maximum, maxsize=1 << 40, verbose=0) as writer:
            if kind == "images":
                for number, content in images(source):
                    writer.write({"__key__": f"{number:08d}", "jpg": content})
                return
            for number, block in enumerate(blocks(kind, source)):
                writer.write({"__key__": f"{number:08d}", "npy": np.asarray(block)})

    def open(self, view: View, source: Path, out: Path) -> Tars:
        """Open the tar files."""
        return Tars(view, out)
