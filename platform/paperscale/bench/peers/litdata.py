"""LitData: chunks of samples, streamed; ``TokensLoader`` for tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

from paperscale.bench.peers.base import IMAGES, TOKENS, Keeping, blocks
from paperscale.bench.works import View, on_image, on_tokens

_CHUNK = "64MB"
_ROWS = 4096  # blocks handed over at once when writing


def _image(folder: str, name: str) -> dict[str, Any]:
    return {"id": int(name.split(".")[0]), "jpg": (Path(folder) / name).read_bytes()}


def _tokens(kind: str, source: str, start: int) -> torch.Tensor:
    rows = blocks(kind, Path(source))[start : start + _ROWS]
    return torch.from_numpy(rows.reshape(-1).copy())


class Transform:
    """Turns an item into what the work makes of it."""

    def __init__(self, view: View):
        self.image = on_image(view.work) if view.kind == "images" else None

    def __call__(self, item: Any, *_: Any) -> Any:
        """Return the sample."""
        return self.image(item["jpg"], item["id"]) if self.image is not None else on_tokens(item)


class Chunks(Keeping):
    """The library's dataset and loader, at their defaults but for dropping."""

    def __init__(self, view: View, folder: Path):
        item_loader = None if view.kind == "images" else TokensLoader(block_size=TOKENS[view.kind][1])
        data = StreamingDataset(
            str(folder),
            item_loader=item_loader,
            shuffle=True,
            seed=view.seed + 1,  # its seed must not be 0
            drop_last=False,
            transform=Transform(view),
        )
        self.loader = StreamingDataLoader(data, **view.loading())


class Peer:
    """Chunks of 64 MB."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the chunks."""
        if kind == "images":
            names = sorted(path.name for path in (source / IMAGES).iterdir())
            optimize(
                partial(_image, str(source / IMAGES)), names, str(out), chunk_bytes=_CHUNK, num_workers=1, verbose=False
            )
            return
        starts = list(range(0, len(blocks(kind, source)), _ROWS))
        length = TOKENS[kind][1]
        optimize(
            partial(_tokens, kind, str(source)),
            starts,
            str(out),
            chunk_size=length * (1 << 16),
            item_loader=TokensLoader(block_size=length),
            num_workers=1,
            verbose=False,
        )

    def open(self, view: View, source: Path, out: Path) -> Chunks:
        """Open the chunks."""
        return Chunks(view, out)
