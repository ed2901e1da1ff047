"""``ImageShards``: labelled images from shards, for classification.

Batches are dictionaries::

    image   uint8 [batch, channels, height, width]; float32, normalised, once on the device
    label   int64 [batch]
    sample  int64 [batch], the sample's number in its split
    cursor  where the stream stands (training only), see :class:`~paperscale.data.stream.Cursor`
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from paperscale.data.order import SampleOrder
from paperscale.data.random import uniform
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, ShardStream

_CROP_Y, _CROP_X, _FLIP = 0, 1, 2  # the draws of a sample's augmentation


class ImageShards(ShardStream):
    """Labelled images: fields ``png`` and ``cls``.

    Args:
        path: the set, as written by ``paperscale data prepare``.
        global_batch_size: samples of one optimizer step over all ranks.
        crop_padding: training images are padded by this many zeros on each side and cropped at a random
            place back to their size (He et al. 2015, section 4.2: 4).
        flip: training images are mirrored with probability one half.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.
    """

    def __init__(
        self, path: str, global_batch_size: int = 128, crop_padding: int = 0, flip: bool = False, **stream: Any
    ):
        super().__init__(path, global_batch_size, **stream)
        self.crop_padding, self.flip = crop_padding, flip
        self._statistics: tuple[Tensor, Tensor] | None = None

    def read(self, shards: ShardSet, order: SampleOrder, samples: NDArray[np.int64], epoch: int | None) -> Batch:
        """Return the batch of the given samples, cropped and mirrored if ``epoch`` is given."""
        rows = [shards.read(int(s), int(r)) for s, r in zip(*order.locate(samples), strict=True)]
        images = np.stack([decode(row["png"]) for row in rows])  # [batch, height, width, channels]
        if epoch is not None:
            images = self._augment(images, epoch, samples)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            "label": torch.tensor([int(row["cls"]) for row in rows]),
            "sample": torch.from_numpy(samples),
        }

    def _augment(self, images: NDArray[np.uint8], epoch: int, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Crop and mirror each image as (seed, epoch, sample) says."""
        if self.flip:
            mirrored = uniform(self.seed, epoch, samples, _FLIP) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        if pad := self.crop_padding:
            height, width = images.shape[1:3]
            padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            top = (uniform(self.seed, epoch, samples, _CROP_Y) * (2 * pad + 1)).astype(int)
            left = (uniform(self.seed, epoch, samples, _CROP_X) * (2 * pad + 1)).astype(int)
            crops = zip(padded, top, left, strict=True)
            images = np.stack([image[y : y + height, x : x + width] for image, y, x in crops])
        return images

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 images into normalised float32 on the device, by the train split's mean and deviation."""
        image: Tensor = batch["image"]
        if self._statistics is None or self._statistics[0].device != image.device:
            facts = self.shards("train").manifest.image
            mean, std = (255 * torch.tensor(facts[name]).view(1, -1, 1, 1).to(image.device) for name in ("mean", "std"))
            self._statistics = (mean, std)
        mean, std = self._statistics
        return {**batch, "image": (image.float() - mean) / std}


def decode(png: bytes) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [height, width, channels]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
