"""A small set of pictures that a network learns in seconds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from paperscale.data.writer import Sample, ShardWriter

SIZES = {"train": 230, "val": 50, "test": 60}  # no multiple of a batch size, on purpose


def image_of(split: str, number: int) -> tuple[np.ndarray, int]:
    """An 8 x 8 image whose class is the brightest of its ten columns' positions; distinct for each sample."""
    rng = np.random.default_rng([len(split), number])
    image = rng.integers(0, 100, (8, 8), dtype=np.uint8)
    label = number % 8
    image[:, label] += 120
    return image, label


def encode(of: tuple[str, int]) -> Sample:
    split, number = of
    image, label = image_of(split, number)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    return {"__key__": f"{split}-{number:04d}", "png": png.getvalue(), "cls": str(label).encode()}


def items(split: str) -> list[tuple[str, int]]:
    return [(split, number) for number in range(SIZES[split])]


def write_set(folder: Path, shard_samples: int = 37, num_processes: int | None = 0) -> Path:
    image = {"height": 8, "width": 8, "channels": 1, "mean": [0.25], "std": [0.2]}
    facts = {"classes": [str(c) for c in range(8)], "image": image, "provenance": {"source": "the test suite"}}
    with ShardWriter(folder, "tiny", shard_samples=shard_samples, num_processes=num_processes, **facts) as writer:
        for split in SIZES:
            writer.write(split, items(split), encode)
    return folder


def write_recipe(path: Path, shards: Path, checkpoint: str = "{every_n_steps: 5}", more: str = "") -> None:
    """Write a recipe that trains three epochs of eight steps in a second."""
    path.write_text(
        f"""\
# Tiny ResNet on columns   the test suite
# run       paperscale fit tiny.yaml
# needs     a second
# paper     none
# measured  none
seed_everything: 3
model:
  class_path: paperscale.papers.resnet.ResNetClassifier
  init_args:
    network:
      class_path: paperscale.papers.resnet.CifarResNet
      init_args: {{n: 1, channels: 1, classes: 8}}
    lr: 0.05
    classes: 8
data:
  class_path: paperscale.data.ImageShards
  init_args: {{path: {shards}, global_batch_size: 32, crop_padding: 1}}
trainer: {{max_epochs: 3, log_every_n_steps: 1}}
checkpoint: {checkpoint}
{more}"""
    )
