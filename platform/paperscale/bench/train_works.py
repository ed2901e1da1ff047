"""What ``paperscale bench train`` trains: networks, images on the device, and JPEGs in shards."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperscale.bench.source import photograph, texture
from paperscale.data import ImageShards
from paperscale.data.shards import MANIFEST, ShardSet
from paperscale.data.stream import Batch, Places, Source
from paperscale.data.writer import ShardWriter
from paperscale.papers.resnet import BLOCKS, ResNet

NETWORKS = {f"resnet{depth}": depth for depth in BLOCKS}
CLASSES = 1000
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
"""The optimizer in every way."""
_PHOTOGRAPHS = Path("data/grocery")
_BASES, _DISTINCT = 16, 128  # photographs that JPEGs are made from, and JPEGs that differ


@dataclass(frozen=True)
class Work:
    """A training whose steps are measured.

    Attributes:
        network: one of :data:`NETWORKS`.
        batch_size: images of a step.
        side: height and width of the images.
        warm_up: steps before those that count.
        steps: that count.
        precision: as Lightning's Trainer takes it.
    """

    network: str
    batch_size: int
    side: int
    warm_up: int
    steps: int
    precision: str

    @property
    def depth(self) -> int:
        """Return the network's weighted layers."""
        return NETWORKS[self.network]

    @property
    def title(self) -> str:
        """Return the work in words."""
        images = f"batches of {self.batch_size} images of {self.side} x {self.side}"
        return f"ResNet-{self.depth}, {images}, precision {self.precision}"

    def to_json(self) -> str:
        """Return the work for another process."""
        return json.dumps(asdict(self))


def reference(depth: int) -> tuple[nn.Module, str]:
    """Return the network of the hand-written loop, and whose it is: torchvision's where that can be imported."""
    try:
        import torchvision
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        return ResNet(depth, CLASSES, bottleneck_stride="3x3"), "Paperscale's network, for want of torchvision"
    network: nn.Module = torchvision.models.get_model(f"resnet{depth}", num_classes=CLASSES)
    return network, f"torchvision {torchvision.__version__}'s network"


def images_on(device: torch.device, count: int, side: int) -> dict[str, Tensor]:
    """Return ``image``, float32 [count, 3, side, side] in channels-last memory, and ``label``, int64 [count]."""
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randn(count, 3, side, side, generator=generator, device=device)
    label = torch.randint(CLASSES, (count,), generator=generator, device=device)
    return {"image": image.contiguous(memory_format=torch.channels_last), "label": label}


class SyntheticImages(ImageShards):
    """Shards of which nothing is read: every batch is the same images, which are on the device already.

    The order of the samples, their division into batches, the threads and the position are those of any run.
    """

    _kept: dict[str, Tensor] | None = None

    def allocate(self, count: int, train: bool) -> Batch:
        """Return nothing to be filled."""
        return {}

    def fill_rows(self, source: Source, batch: Batch, rows: range, places: Places, train: bool) -> list[Any]:
        """Read nothing."""
        return []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Add the images to what is moved."""
        if self._kept is None:
            self._kept = images_on(device, len(batch["sample"]), self.image_shape()[0])
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **self._kept}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave the images as they are."""
        return batch


# -- JPEGs ---------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, samples: int) -> str:
    """Write a set of JPEGs of ImageNet's sizes, a few different ones again and again; return what they are."""
    bases, of = _bases()
    jpegs = [photograph(bases[number % len(bases)], number) for number in range(min(samples, _DISTINCT))]
    content = [
        {"__key__": f"{number:08d}", "jpg": jpegs[number % len(jpegs)], "cls": b"%d" % (number % CLASSES)}
        for number in range(samples)
    ]
    with ShardWriter(folder, "pictures", num_processes=0, image={"channels": 3}) as writer:
        writer.write("train", content)
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1e3
    return f"{len(jpegs)} different JPEGs of about 500 x 375, {kilobytes:.0f} kB on average, made from {of}"


def _bases() -> tuple[Sequence[Any], str]:
    """Return the Pillow images that JPEGs are made from, and what they are."""
    from PIL import Image

    if not (_PHOTOGRAPHS / MANIFEST).exists():
        return [texture(number) for number in range(8)], "smooth random pictures"
    shards = ShardSet(_PHOTOGRAPHS, "train", mapped=False)
    read = (shards.read(0, row, ("jpg",))["jpg"] for row in range(min(_BASES, shards.sizes[0])))
    return [Image.open(io.BytesIO(bytes(jpeg))).convert("RGB") for jpeg in read], f"photographs of {_PHOTOGRAPHS}"
