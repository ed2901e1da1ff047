"""``ImageShards``: labelled images from shards, for classification.

Batches are dictionaries::

    image   uint8 [batch, channels, height, width]; float32, normalised, once on the device
    label   int64 [batch]
    sample  int64 [batch], the sample's number in its split
    cursor  where the stream stands (training only), see :class:`Cursor`
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from paperscale.data.loader import OrderedLoader
from paperscale.data.order import BatchPlan, Piece, SampleOrder, even_batches
from paperscale.data.random import uniform
from paperscale.data.shards import ShardSet
from paperscale.errors import UserError

_CROP_Y, _CROP_X, _FLIP = 0, 1, 2  # the draws of a sample's augmentation

Batch = dict[str, Any]


class Cursor(NamedTuple):
    """Where the stream stands after a training batch.

    Attributes:
        consumed: samples consumed by the run once this batch is trained on: the whole state of the stream.
        weight: scale of the batch's loss, see :class:`~paperscale.data.order.Piece`.
        last: whether the optimizer steps after this batch.
    """

    consumed: int
    weight: float
    last: bool


class ImageShards(LightningDataModule):
    """Streams labelled images from a folder of shards, the same samples at any world size and thread count.

    Args:
        path: the set, as written by ``paperscale data prepare``.
        global_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: the most samples of one forward pass on one rank; the gradient is accumulated over as
            many passes as that takes. By default one pass.
        eval_batch_size: samples of one forward pass in validation and test.
        train: split (or splits joined by ``+``) to train on.
        val: split to validate on; ``None`` for no validation.
        test: split to test on.
        crop_padding: training images are padded by this many zeros on each side and cropped at a random
            place back to their size (He et al. 2015, section 4.2: 4).
        flip: training images are mirrored with probability one half.
        seed: fixes the order and the augmentation; by default the run's ``seed_everything``.
        window: samples shuffled together.
        num_threads: threads that read and decode; 0 reads in the training thread.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int = 128,
        micro_batch_size: int | None = None,
        eval_batch_size: int = 250,
        train: str = "train",
        val: str | None = "val",
        test: str = "test",
        crop_padding: int = 0,
        flip: bool = False,
        seed: int | None = None,
        window: int = 1 << 16,
        num_threads: int = 1,
    ):
        super().__init__()
        self.path = path
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.splits = {"train": train, "val": val, "test": test}
        self.crop_padding, self.flip = crop_padding, flip
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.window = window
        self.num_threads = num_threads
        self.consumed = 0
        self._shards: dict[str, ShardSet] = {}

    # -- the stream's state: one integer -------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Return the samples consumed, and what the order was made from, to refuse another one on resume."""
        return {"consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the samples that were consumed.

        Raises:
            UserError: the data, the seed or the batch size is not that of the checkpoint.
        """
        for name, now in self._identity().items():
            if state_dict[name] != now:
                raise UserError(
                    f"the checkpoint was made with data.{name}={state_dict[name]}, this run has {now}: its order "
                    f"of samples cannot be continued; restore data.{name} or start a new run"
                )
        self.consumed = state_dict["consumed"]

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "samples": sum(self.shards("train").sizes),
            "window": self.window,
            "global_batch_size": self.global_batch_size,
        }

    # -- what a run must know before it starts -------------------------------------------------------------

    def shards(self, stage: str) -> ShardSet:
        """Return the shards of ``train``, ``val`` or ``test``, opened once.

        Raises:
            UserError: the set or the split does not exist.
        """
        split = self.splits[stage]
        if split is None:
            raise UserError(f"data.{stage} is not set: name the split to use, for example data.{stage}={stage}")
        if split not in self._shards:
            self._shards[split] = ShardSet(Path(self.path), split)
        return self._shards[split]

    def accumulate(self, world_size: int) -> int:
        """Return the forward passes of one optimizer step.

        Raises:
            UserError: there are more processes than samples in a global batch.
        """
        if world_size > self.global_batch_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} cannot be divided over {world_size} processes; "
                f"use at most {self.global_batch_size} processes or a larger data.global_batch_size"
            )
        share = -(-self.global_batch_size // world_size)
        return -(-share // (self.micro_batch_size or share))

    # -- loaders -------------------------------------------------------------------------------------------

    def train_dataloader(self) -> OrderedLoader[Piece, Batch]:
        """Return the training batches of this rank, from where the stream stands to the end of its epoch."""
        shards = self.shards("train")
        rank, world_size = self._rank()
        order = SampleOrder(shards.sizes, seed=self.seed, window=self.window)
        accumulate = self.accumulate(world_size)
        plan = BatchPlan(len(order), self.global_batch_size, world_size, accumulate)

        def pieces() -> Iterator[Piece]:
            return plan.pieces(rank, self.consumed)

        def prepare(piece: Piece) -> Batch:
            # A rank with nothing left of a short batch still takes part in its collectives, with weight zero.
            stop = max(piece.stop, piece.start + 1)
            samples = order.samples(piece.epoch, min(piece.start, len(order) - 1), stop)
            batch = self._read(shards, order, samples)
            batch["image"] = self._augment(batch["image"], piece.epoch, samples)
            return {**_tensors(batch), "cursor": Cursor(piece.consumed, piece.weight, piece.last)}

        return OrderedLoader(pieces, prepare, plan.steps_per_epoch() * accumulate, self.num_threads)

    def val_dataloader(self) -> OrderedLoader[tuple[int, int], Batch] | list[Any]:
        """Return the validation batches of this rank; each sample is visited once over all ranks."""
        return self._eval_dataloader("val") if self.splits["val"] else []

    def test_dataloader(self) -> OrderedLoader[tuple[int, int], Batch]:
        """Return the test batches of this rank; each sample is visited once over all ranks."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> OrderedLoader[tuple[int, int], Batch]:
        """Return the test split."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, stage: str) -> OrderedLoader[tuple[int, int], Batch]:
        shards = self.shards(stage)
        order = SampleOrder(shards.sizes, shuffle=False)
        ranges = even_batches(len(order), self.eval_batch_size, *self._rank())

        def prepare(bounds: tuple[int, int]) -> Batch:
            return _tensors(self._read(shards, order, order.samples(0, *bounds)))

        return OrderedLoader(lambda: ranges, prepare, len(ranges), self.num_threads)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # -- a batch -------------------------------------------------------------------------------------------

    def _read(self, shards: ShardSet, order: SampleOrder, samples: NDArray[np.int64]) -> dict[str, Any]:
        """Return images uint8 [batch, height, width, channels], labels and sample numbers."""
        rows = [shards.read(int(s), int(r)) for s, r in zip(*order.locate(samples), strict=True)]
        images = np.stack([decode(row["png"]) for row in rows])
        return {"image": images, "label": np.array([int(row["cls"]) for row in rows]), "sample": samples}

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
        statistics = self.shards("train").manifest.image
        mean = torch.tensor(statistics["mean"], device=image.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(statistics["std"], device=image.device).view(1, -1, 1, 1) * 255
        return {**batch, "image": (image.float() - mean) / std}


def decode(png: bytes) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [height, width, channels]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _tensors(batch: dict[str, Any]) -> Batch:
    image = torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    return {
        "image": image,
        "label": torch.from_numpy(batch["label"]),
        "sample": torch.from_numpy(batch["sample"]),
    }
