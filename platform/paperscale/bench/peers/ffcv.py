"""FFCV: its own file format and compiled decoder; it has no state to resume from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader import OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter

from paperscale.bench.peers.base import TOKENS, Skipping, blocks
from paperscale.bench.peers.base import images as image_files
from paperscale.bench.works import SIZE, View, decode_rgb

_QUALITY = 94
_FILE = "set.beton"


class Images:
    """The images, decoded once for the writer, which encodes them again."""

    def __init__(self, source: Path):
        self.files = list(image_files(source))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        number, content = self.files[at]
        return decode_rgb(content), number


class Blocks:
    """The token blocks."""

    def __init__(self, kind: str, source: Path):
        self.array = blocks(kind, source)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: int) -> tuple[Any]:
        return (self.array[at].view(np.int16),)


class Threads(Skipping):
    """The library's loader; it reads and decodes on threads."""

    reads_ahead = True

    def __init__(self, view: View, folder: Path):
        pipelines: dict[str, Any]
        if view.kind == "images":
            crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
            image = [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage(channels_last=False)]
            pipelines = {"image": image if view.work == "decode" else None, "id": [IntDecoder(), ToTensor()]}
        else:
            pipelines = {"tokens": [NDArrayDecoder(), ToTensor()]}
        self.kind = view.kind
        self.loader = FFCVLoader(
            str(folder / _FILE),
            view.batch_size,
            num_workers=max(1, view.workers),
            order=OrderOption.RANDOM,
            seed=view.seed,
            drop_last=False,
            pipelines=pipelines,
        )

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches."""
        for batch in self.loader:
            if self.kind == "images":
                yield batch[-1].flatten(), batch[0]
            else:
                yield batch[0].long()


class Peer:
    """One ``.beton`` file; images are encoded again with quality 94."""

    def decoder(self) -> str:
        """Return what decodes JPEGs."""
        return "its own"

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write the file."""
        if kind == "images":
            fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=_QUALITY), "id": IntField()}
            data: Any = Images(source)
        else:
            fields = {"tokens": NDArrayField(np.dtype("int16"), (TOKENS[kind][1],))}
            data = Blocks(kind, source)
        DatasetWriter(str(out / _FILE), fields, num_workers=1).from_indexed_dataset(data, chunksize=100)

    def open(self, view: View, source: Path, out: Path) -> Threads:
        """Open the file."""
        return Threads(view, out)
