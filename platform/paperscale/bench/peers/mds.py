"""MosaicML Streaming: MDS shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paperscale.bench.meters import Growth
from paperscale.bench.peers.base import TOKENS, Keeping, blocks, images
from paperscale.bench.works import View, on_image, on_tokens


def _declare_torchvision() -> None:
    """Let ``import streaming``, which imports torchvision for no need of ours, succeed beside a torch without CUDA."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision.library = library  # type: ignore[attr-defined]  # lives as long as the process


try:
    import torchvision  # noqa: F401
except RuntimeError:
    _declare_torchvision()

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.partition.relaxed import get_partitions_relaxed  # noqa: E402
from streaming.base.shuffle.py1e import get_shuffle_py1e  # noqa: E402

_SHARD_BYTES = 64 << 20
_NODE = 8  # ranks


class Shards(StreamingDataset):
    """The library's dataset with the work done on each sample."""

    def __init__(self, view: View, folder: Path):
        super().__init__(local=str(folder), shuffle=True, shuffle_seed=view.seed, batch_size=view.batch_size)
        self.image = on_image(view.work) if view.kind == "images" else None

    def __getitem__(self, at: int) -> Any:
        """Return one sample."""
        sample = super().__getitem__(at)
        return self.image(sample["jpg"], int(sample["id"])) if self.image is not None else on_tokens(sample["tokens"])


class Streaming(Keeping):
    """The library's loader."""

    def __init__(self, view: View, folder: Path):
        self.loader = StreamingDataLoader(Shards(view, folder), **view.loading())


class Peer:
    """MDS shards of 64 MiB."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the shards."""
        tokens = {name: f"ndarray:uint16:{length}" for name, (_, length) in TOKENS.items()}
        columns = {"id": "int", "jpg": "bytes"} if kind == "images" else {"tokens": tokens[kind]}
        with MDSWriter(out=str(out), columns=columns, size_limit=_SHARD_BYTES, exist_ok=True) as writer:
            if kind == "images":
                for number, content in images(source):
                    writer.write({"id": number, "jpg": content})
                return
            for block in blocks(kind, source):
                writer.write({"tokens": block})

    def open(self, view: View, source: Path, out: Path) -> Streaming:
        """Open the shards."""
        return Streaming(view, out)

    def plan(self, samples: int, shards: int, ranks: int, folder: Path) -> dict[str, float]:
        """Draw and divide the epoch's order as the library does at its defaults, on nodes of 8 ranks with a worker."""
        growth, started = Growth(), time.perf_counter()
        _plan(samples, shards, ranks, 0)
        opened = time.perf_counter() - started
        started = time.perf_counter()
        _plan(samples, shards, ranks, samples // 2)
        seek = time.perf_counter() - started
        return {"open_seconds": opened, "seek_seconds": seek, "bytes": growth.read()}


def _plan(samples: int, shards: int, ranks: int, drop_first: int) -> Any:
    nodes = max(1, ranks // _NODE)
    sizes = np.full(shards, samples // shards)
    order = get_shuffle_py1e(sizes, nodes, 0, 0, max(4_000_000 // nodes, 1 << 18))
    ids = get_partitions_relaxed(samples, nodes, nodes, _NODE, 1, 1, drop_first)
    return order[ids[0, 0]]
