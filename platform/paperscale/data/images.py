"""``ImageShards``: labelled images from shards, for classification and generation.

Batches are dictionaries::

    image   uint8 [batch, channels, height, width], in channels-last memory; float32, normalised, once on the device
    label   int64 [batch]
    sample  int64 [batch], the sample's number in its split
    cursor  where the stream stands (training only), see :class:`~paperscale.data.stream.Cursor`

and, in training with ``mixup`` or ``cutmix``, once on the device::

    other_label  int64 [batch], the label of the image that was mixed in
    share        float32 [batch], the share of the image's own label: the loss is share CE(label) + (1 - share)
                 CE(other_label)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from paperscale.data import augment, jpeg, meanimage, mixing, randaugment
from paperscale.data.absent import AbsentSet
from paperscale.data.augment import Box, Draws
from paperscale.data.batching import Batches
from paperscale.data.files import Buffer
from paperscale.data.kept import kept_array
from paperscale.data.loader import OrderedLoader
from paperscale.data.mixing import Mixing, PairedBatches
from paperscale.data.order import Order
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, ShardStream, Source, at_least
from paperscale.errors import UserError, nearest

FIELDS = ("jpg", "jpeg", "png", "webp")
"""Where an image may be, in the order of preference."""

_CROPS = ("pad", "random_resized", "scale_jitter", "center", "none")
_EVAL_CROPS = ("none", "center", "ten", "dense")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class ImageShards(ShardStream):
    """Labelled images: a field ``jpg``, ``jpeg``, ``png`` or ``webp``, and ``cls``, a label's number or its name.

    Images become float32 on the device, normalised by the manifest's mean and deviation of the training split; by
    ImageNet's (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225) where the manifest has none. Whatever is drawn for an image
    is drawn from (seed, epoch, sample).

    Args:
        path: the set, as written by ``paperscale data prepare``.
        global_batch_size: samples of one optimizer step over all ranks.
        crop_padding: with ``crop=pad``: images are padded by this many zeros on each side and cropped at a random
            place back to their size (He et al. 2015, section 4.2: 4).
        flip: training images are mirrored with probability one half.
        crop: what is done to training images. ``pad``: see ``crop_padding``. ``random_resized``: a random box, see
            ``scale`` and ``ratio``, is resized (Szegedy et al. 2014). ``scale_jitter``: resized to a random shorter
            side, see ``jitter``, and cropped at a random place (Simonyan & Zisserman 2014). ``center``: as in
            evaluation. ``none``: resized as a whole, where the size differs.
        size: height and width of the images; by default the manifest's.
        eval_size: height and width in validation and test; by default ``size``.
        scale: least and greatest share of the area, with ``random_resized``.
        ratio: least and greatest width over height, with ``random_resized``.
        jitter: least and greatest shorter side, with ``scale_jitter``.
        color_jitter: ``pca`` shifts training images' colours along the principal components of ImageNet's
            (Krizhevsky et al. 2012, section 4.1).
        auto_augment: ``rand`` changes training images, once they are cropped, by operations that are drawn for each
            (Cubuk et al. 2019, RandAugment), see :mod:`~paperscale.data.randaugment`.
        rand_ops: operations for each image, with ``rand``.
        rand_magnitude: of the operations, from 0 to 30, with ``rand``.
        erase: probability with which a box of a training image is set to the mean, 0 once it is normalised (Zhong et
            al. 2017, random erasing: 0.02 to 0.4 of the area).
        mixup: neighbours in the global batch are mixed, the share of each drawn from Beta(mixup, mixup) (Zhang et al.
            2018); 0 for none.
        cutmix: they exchange a box, its area drawn from Beta(cutmix, cutmix) (Yun et al. 2019); 0 for none. With both,
            each pair is mixed in one of the two ways, with probability one half.
        normalize: ``channel``: by mean and deviation, as above. ``pixel``: the mean image of the training split is
            subtracted and nothing divided by, in units of 0 to 1 (He et al. 2015, sections 3.4 and 4.2); before images
            are padded, so that ``crop_padding`` adds zeros.
        eval_crop: what is done to images in validation and test. ``none``: as above. ``center``: resized to a
            shorter side of ``resize``, the central ``eval_size`` x ``eval_size`` taken. ``ten``: corners and centre,
            each also mirrored: ``image`` is [batch, 10, channels, height, width]. ``dense``: whole, at each of
            ``scales``: ``image`` is a list over samples of lists over scales of [1, channels, height, width].
        resize: shorter side for ``center`` and ``ten``.
        scales: shorter sides for ``dense`` (He et al. 2015, section 3.4).
        max_reduction: JPEGs may first be reduced by up to 2, 4 or 8 in their decoder while that keeps them larger
            than what is wanted: faster on large photos, at a mean difference of about a level.
        label: field of the label; ``null`` for sets without.
        image_field: field of the images, where it has another name, for example ``left.jpg``.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.

    Raises:
        UserError: an argument is not one of its choices or does not go with the others.
    """

    mapped = False

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 128,
        crop_padding: int = 0,
        flip: bool = False,
        crop: str = "pad",
        size: int | None = None,
        eval_size: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        jitter: tuple[int, int] = (256, 480),
        color_jitter: str | None = None,
        auto_augment: str | None = None,
        rand_ops: int = 2,
        rand_magnitude: int = 9,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        normalize: str = "channel",
        eval_crop: str = "none",
        resize: int = 256,
        scales: Sequence[int] = augment.MULTI_SCALE,
        max_reduction: int = 1,
        label: str | None = "cls",
        image_field: str | None = None,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, **stream)
        self.crop_padding, self.flip, self.crop = crop_padding, flip, crop
        self.size, self.eval_size = size, size if eval_size is None else eval_size
        self.scale, self.ratio, self.jitter, self.color_jitter = scale, ratio, jitter, color_jitter
        self.auto_augment, self.rand_ops, self.rand_magnitude = auto_augment, rand_ops, rand_magnitude
        self.erase, self.mixing, self.normalize = erase, Mixing(mixup, cutmix), normalize
        self.eval_crop, self.resize, self.scales = eval_crop, resize, tuple(scales)
        self.max_reduction, self.label = max_reduction, label
        self.fields = FIELDS if image_field is None else (image_field,)
        self._refuse_choices()
        self._refuse_sizes()
        self._refuse_mixing()
        self._shapes: dict[bool, tuple[int, int, int]] = {}
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._memory = Memory(pinned=torch.cuda.is_available() and not self.workers.processes)

    def _refuse_choices(self) -> None:
        """Refuse what is none of an argument's choices, and numbers out of range."""
        at_least(1, size=self.size, eval_size=self.eval_size, resize=self.resize, rand_ops=self.rand_ops)
        at_least(0, crop_padding=self.crop_padding)
        _choose("crop", self.crop, _CROPS)
        _choose("eval_crop", self.eval_crop, _EVAL_CROPS)
        _choose("color_jitter", self.color_jitter or "pca", ("pca",))
        _choose("auto_augment", self.auto_augment or "rand", ("rand",))
        _choose("normalize", self.normalize, ("channel", "pixel"))
        _choose("max_reduction", str(self.max_reduction), ("1", "2", "4", "8"))
        most = randaugment.MOST
        if not 0 <= self.rand_magnitude <= most:
            raise UserError(f"data.rand_magnitude={self.rand_magnitude}: give a magnitude from 0 to {most}, such as 9")
        if not 0 <= self.erase <= 1:
            raise UserError(f"data.erase={self.erase} is a probability: give 0 to 1, for example 0.1")

    def _refuse_sizes(self) -> None:
        """Refuse what cannot be cropped, or has no mean image."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"data.scale={self.scale}: give two rising shares of the area, for example [0.08, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"data.ratio={self.ratio}: give two rising ratios above 0, for example [0.75, 1.33]")
        sizes = (("crop", self.crop, "size", self.size), ("eval_crop", self.eval_crop, "eval_size", self.eval_size))
        for name, crop, of, size in sizes:
            if self.normalize == "pixel" and crop not in ("pad", "none"):
                raise UserError(
                    f"data.{name}={crop} takes parts of images, and data.normalize=pixel subtracts the mean of whole "
                    f"ones: set data.{name}=none, or train with data.normalize=channel"
                )
            if self.normalize == "pixel" and size != self.size:
                raise UserError(
                    f"data.eval_size={size} is not the size of training images, and data.normalize=pixel has a mean "
                    "image of one size: set data.eval_size=null, or train with data.normalize=channel"
                )
            if size is None and crop not in ("pad", "none", "dense"):
                raise UserError(f"data.{name}={crop} needs a size: set data.size, for example data.size=224")
            if size is not None and crop in ("center", "ten") and self.resize < size:
                of = "size" if size == self.size else of
                raise UserError(f"data.resize={self.resize} is less than data.{of}={size}: raise data.resize")
        if self.size is not None and self.crop == "scale_jitter" and not self.size <= self.jitter[0] <= self.jitter[1]:
            raise UserError(f"data.jitter={self.jitter} must rise from data.size={self.size} or more: raise it")

    def _refuse_mixing(self) -> None:
        """Refuse what cannot be mixed in pairs."""
        for name in ("mixup", "cutmix"):
            if (alpha := getattr(self.mixing, name)) < 0:
                raise UserError(f"data.{name}={alpha}: give an alpha above 0, for example 0.2, or 0 for none")
        if not self.mixing:
            return
        if self.label is None:
            raise UserError("data.mixup and data.cutmix mix labels too: name their field with data.label")
        for name in ("global_batch_size", "micro_batch_size"):
            if (size := getattr(self, name)) and size % 2:
                raise UserError(
                    f"data.{name}={size} is odd, and data.mixup and data.cutmix mix pairs: make it even, for example "
                    f"{size + 1}"
                )

    def source(self, stage: str) -> Source:
        """Return the samples of a stage; refuse sets without images or labels."""
        source = super().source(stage)
        for shards in source.sets:
            fields = shards.fields()
            if not set(self.fields) & set(fields):
                raise UserError(
                    f"{shards.path} has no images in {', '.join(self.fields)}, only the fields {list(fields)}; name "
                    "theirs with data.image_field"
                )
            if self.label is not None and self.label not in fields:
                raise UserError(
                    f"{shards.path} has no labels in data.label={self.label}, only the fields {list(fields)}"
                    f"{nearest(self.label, fields)} (data.label=null for none)"
                )
        return source

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set."""
        if self.size is None:
            raise UserError(
                f"no shards at {path}, and data.size does not say how large its images are; set it, for example "
                "data.size=32, or make them with `paperscale data prepare`"
            )
        label = () if self.label is None else (self.label,)
        return AbsentSet(path, split, (self.fields[0], *label), image={"channels": channels})

    def image_shape(self, train: bool = True) -> tuple[int, int, int]:
        """Return height, width and channels of the images in training, or in validation and test.

        Raises:
            UserError: neither ``size`` nor the manifest tells them.
        """
        if train not in self._shapes:
            facts = self.shards("train").manifest.image
            size = self.size if train else self.eval_size
            height, width = (size or facts.get(side) for side in ("height", "width"))
            if not height or not width:
                fix = " or data.normalize=channel" if self.normalize == "pixel" else ""
                raise UserError(
                    f"the images of {self.paths[0]} differ in size: set data.size, for example data.size=224{fix}"
                )
            shape = (int(height), int(width), int(facts.get("channels", 3)))
            self._shapes = {**self._shapes, train: shape}
        return self._shapes[train]

    def batches(self, source: Source, order: Order) -> tuple[Order, Batches]:
        """Return how an order is cut into global batches; into pieces between pairs, where these are mixed."""
        order, batches = super().batches(source, order)
        return order, PairedBatches(batches) if self.mixing else batches

    def accumulate(self, world_size: int) -> int:
        """Return the forward passes of one optimizer step.

        Raises:
            UserError: there are more processes than samples, or pairs that are mixed, in a global batch.
        """
        if self.mixing and world_size > (pairs := (self.global_batch_size + 1) // 2):
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} cannot be divided over {world_size} processes in "
                f"pairs that are mixed; use at most {pairs} processes or a larger data.global_batch_size"
            )
        return super().accumulate(world_size)

    def halved(self, world_size: int) -> dict[str, int] | None:
        """Return attributes that halve the samples of a forward pass; ``None`` where it is one sample, or one pair."""
        smaller = super().halved(world_size)
        if smaller is None or not self.mixing:
            return smaller
        even = smaller["micro_batch_size"] + smaller["micro_batch_size"] % 2
        samples = -(-self.global_batch_size // (world_size * self.accumulate(world_size)))
        return {"micro_batch_size": even} if even < samples else None

    def allocate(self, count: int, train: bool) -> Batch:
        """Return tensors for a batch of ``count`` samples."""
        batch: Batch = {} if self.label is None else {"label": torch.empty(count, dtype=torch.int64)}
        if train:
            batch |= self._allocate_draws(count)
        if not train and self.eval_crop == "dense":
            return {**batch, "image": Ragged([] for _ in range(count))}
        views = (10,) if not train and self.eval_crop == "ten" else ()
        return {**batch, "image": self._memory.take((count, *views, *self.image_shape(train))).movedim(-1, -3)}

    def _allocate_draws(self, count: int) -> Batch:
        """Return tensors for what is drawn for each sample and used on the device."""
        draws: Batch = {}
        if self.color_jitter:
            draws["shift"] = torch.empty(count, 3)
        if self.normalize == "pixel":
            draws["place"] = torch.zeros(count, 3, dtype=torch.int64)
        if self.erase:
            draws["erased"] = torch.empty(count, 4)
        if self.mixing:
            draws |= {"row": torch.arange(count), "exchanged": torch.zeros(count, 5)}
        return draws

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Read, decode and augment one sample."""
        members = shards.read(shard, row_in_shard, self.fields if self.label is None else (*self.fields, self.label))
        content = next((members[field] for field in self.fields if field in members), None)
        if content is None or (self.label is not None and self.label not in members):
            wanted = "an image" if content is None else f"the label '{self.label}'"
            raise ValueError(f"it has no field with {wanted}, only {sorted(members)}")
        if self.label is not None:
            batch["label"][row] = class_of(bytes(members[self.label]), shards)
        if epoch is None and self.eval_crop == "dense":
            batch["image"][row] = self._dense(content)
            return
        pixels = batch["image"].movedim(-3, -1).numpy()[row]
        if epoch is None:
            self._evaluation(content, pixels)
        else:
            self._training(content, pixels, batch, row, Draws(self.seed, epoch, sample))

    def _training(self, content: Buffer, out: NDArray[np.uint8], batch: Batch, row: int, draws: Draws) -> None:
        flip, top, left = self.flip and draws(augment.FLIP) < 0.5, 0, 0
        if self.crop == "pad" and self.crop_padding:
            image = np.empty_like(out)
            jpeg.decode_into(content, image, None, flip, self.max_reduction)
            pad = self.crop_padding
            top, left = (draws.integer(number, 2 * pad + 1) for number in (augment.CROP_Y, augment.CROP_X))
            pad_and_crop(image, out, top - pad, left - pad)
        else:
            jpeg.decode_into(content, out, self._training_box(content, draws), flip, self.max_reduction)
        if self.auto_augment:
            randaugment.rand_augment(out, draws, self.rand_ops, self.rand_magnitude)
        height, width = out.shape[:2]
        if self.color_jitter:
            batch["shift"][row] = torch.tensor(augment.pca_shift(draws))
        if self.normalize == "pixel":
            batch["place"][row] = torch.tensor((top, left, flip))
        if self.erase:
            box = augment.erased(draws, height, width, self.erase)
            batch["erased"][row] = torch.tensor((box.top, box.left, box.top + box.height, box.left + box.width))
        if self.mixing and row % 2 == 0:
            batch["exchanged"][row] = torch.tensor(self.mixing.draw(draws, height, width))

    def _training_box(self, content: Buffer, draws: Draws) -> Box | None:
        if self.crop == "random_resized":
            return augment.random_resized_crop(draws, *jpeg.size(content), self.scale, self.ratio)
        if self.size is not None and self.crop == "scale_jitter":
            return augment.scale_jitter(draws, *jpeg.size(content), self.jitter, self.size)
        if self.size is not None and self.crop == "center":
            return augment.center_crop(*jpeg.size(content), self.resize, self.size)
        return None

    def _evaluation(self, content: Buffer, out: NDArray[np.uint8]) -> None:
        size = self.eval_size
        if size is None or self.eval_crop == "none":
            jpeg.decode_into(content, out, None, False, self.max_reduction)
        elif self.eval_crop == "center":
            box = augment.center_crop(*jpeg.size(content), self.resize, size)
            jpeg.decode_into(content, out, box, False, self.max_reduction)
        else:
            resized = np.empty((*augment.shorter_side(*jpeg.size(content), self.resize), out.shape[-1]), np.uint8)
            jpeg.decode_into(content, resized, None, False, self.max_reduction)
            for number, (top, left) in enumerate(augment.five_places(*resized.shape[:2], size)):
                out[number] = resized[top : top + size, left : left + size]
            out[5:] = out[:5, :, ::-1]

    def _dense(self, content: Buffer) -> list[Tensor]:
        channels = int(self.shards("train").manifest.image.get("channels", 3))
        views = []
        for side in self.scales:
            out = np.empty((*augment.shorter_side(*jpeg.size(content), side), channels), np.uint8)
            jpeg.decode_into(content, out, None, False, self.max_reduction)
            views.append(torch.from_numpy(out)[None].movedim(-1, -3))
        return views

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 images into normalised float32 on the device; shift, erase and mix them as was drawn."""
        batch = dict(batch)
        images = batch["image"]
        if isinstance(images, Ragged):
            return {**batch, "image": Ragged([self._normalised(view) for view in views] for views in images)}
        images = self._normalised(images, batch.pop("shift", None), batch.pop("place", None))
        if (erased := batch.pop("erased", None)) is not None:
            images = images.masked_fill_(mixing.inside(erased, *images.shape[-2:]), 0)
        if (row := batch.pop("row", None)) is not None:
            mixed = mixing.mix(images, batch["label"], row, batch.pop("exchanged"))
            images, batch["other_label"], batch["share"] = mixed
        return {**batch, "image": images}

    def _normalised(self, image: Tensor, shift: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        if self._statistics is None or self._statistics[0].device != image.device:
            mean, std = self._mean_and_deviation(image)
            self._statistics = (mean.to(image.device), std.to(image.device))
        mean, std = self._statistics
        pixels = image.float()
        if shift is not None:
            pixels += shift[:, : pixels.shape[1], None, None]
        if place is not None:
            mean = meanimage.placed(mean, place, self.crop_padding if self.crop == "pad" else 0)
        return (pixels - mean) / std

    def _mean_and_deviation(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is subtracted from images and what they are then divided by, in levels of 0 to 255."""
        if self.normalize == "pixel":
            fake = isinstance(image, FakeTensor)  # an estimate of memory: nothing needs to be read for it
            mean = torch.zeros(image.shape[-3:]) if fake else torch.from_numpy(self._mean_image())
            return mean, torch.tensor(255.0)
        facts, channels = self.shards("train").manifest.image, image.shape[-3]
        values = [facts.get(name) or _of_imagenet(name, channels) for name in ("mean", "std")]
        mean, std = (255 * torch.tensor(value).view(-1, 1, 1) for value in values)
        return mean, std

    def _mean_image(self) -> NDArray[np.float32]:
        """Return the mean image of the training split, computed once and kept beside the set, if that can be."""
        source, shape = self.source("train"), self.image_shape()

        def compute() -> NDArray[np.float32]:
            ranges = meanimage.blocks(int(source.sizes.sum()), *shape[:2])
            reader = self._eval_dataloader("train").reader
            return meanimage.mean_of(OrderedLoader(lambda: ranges, reader, len(ranges), self.workers))

        of = hashlib.sha256(repr((source.fingerprint(), shape, self.fields)).encode()).hexdigest()[:16]
        path = Path(self.paths[0]) / f"mean-{of}.npy"
        return kept_array(path, self._rank()[0] == 0 and "://" not in self.paths[0], compute)


class Memory:
    """Memory of batches, used again once nothing refers to it.

    Fresh memory costs as much as a tenth of decoding: the kernel clears each page of it at the first touch.

    Args:
        pinned: take page-locked memory, from which the device copies by itself; torch keeps a cache of that.
    """

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._blocks: list[NDArray[np.uint8]] = []
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Memory], tuple[bool]]:  # worker processes have their own
        return Memory, (self.pinned,)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised uint8 tensor."""
        if self.pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            free = [at for at in range(len(self._blocks)) if sys.getrefcount(self._blocks[at]) == _UNUSED]
            for at in free:
                if self._blocks[at].shape == shape:
                    return torch.from_numpy(self._blocks[at])
            for at in reversed(free):
                del self._blocks[at]
            self._blocks.append(np.empty(shape, np.uint8))
            return torch.from_numpy(self._blocks[-1])


_UNUSED = 2  # references to a block that no tensor has: the list's, and that of the call that counts


class Ragged(list[Any]):
    """Images of different sizes, a list of views for each sample; chosen from as a tensor's rows are."""

    def __getitem__(self, which: Any) -> Any:
        """Return the views of one sample, or of those that a tensor of numbers chooses."""
        if isinstance(which, Tensor):
            return Ragged(list.__getitem__(self, row) for row in which.tolist())
        return super().__getitem__(which)


def class_of(label: bytes, shards: ShardSet) -> int:
    """Return the number of a label that is written in digits, or as the name of a class.

    Raises:
        ValueError: it is neither.
    """
    try:
        return int(label)
    except ValueError:
        name = label.decode(errors="replace").strip()
        if name not in shards.manifest.classes:
            raise ValueError(f"label '{name}' is neither a number nor one of the manifest's classes") from None
        return shards.manifest.classes.index(name)


def pad_and_crop(image: NDArray[np.uint8], out: NDArray[np.uint8], top: int, left: int) -> None:
    """Crop ``image`` at ``top`` and ``left``, which may be negative, to ``out``, zeros around it; both [h, w, c]."""
    height, width = image.shape[:2]
    out[...] = 0
    out[max(0, -top) : height - max(0, top), max(0, -left) : width - max(0, left)] = image[
        max(0, top) : height + min(0, top), max(0, left) : width + min(0, left)
    ]


def _of_imagenet(name: str, channels: int) -> tuple[float, ...]:
    """Return ImageNet's mean or deviation of each channel; of grey images, the three's average."""
    values = _IMAGENET[name]
    return values if channels == 3 else (sum(values) / 3,)


def _choose(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"data.{name}={value}: choose {', '.join(choices)}{nearest(value, choices)}")
