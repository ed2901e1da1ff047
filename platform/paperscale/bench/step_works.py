"""What ``paperscale bench step`` trains: three networks and their shards."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from paperscale.papers.resnet import CifarResNet

VOCABULARY, WIDTH = 2048, 128
CLASSES = 8
METRICS = (0, 5)
QUICK = (2, 3)
"""Steps of warm-up, and counted, where it is only tried."""


@dataclass(frozen=True)
class Work:
    """A training whose step is measured.

    Attributes:
        title: for the report.
        batch_size: samples of a step on one rank.
        steps: counted in a training.
        warm_up: steps before them.
        side: height and width of the images; 0 for text.
        length: tokens of a sample of text.
    """

    title: str
    batch_size: int
    steps: int
    warm_up: int
    side: int = 0
    length: int = 0


WORKS = {
    "tiny": Work("one layer, 32 to 4, batches of 8", 8, 1000, 50, length=32),
    "resnet20": Work("ResNet-20, batches of 128 images of 28 x 28", 128, 16, 3, side=28),
    "transformer": Work("2 layers of a Transformer, width 128, batches of 8 x 128 tokens", 8, 16, 3, length=128),
}


class Tiny(nn.Module):
    """A network whose step is nearly all framework."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WORKS["tiny"].length, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean square of the output, shape []."""
        return self.layer(batch["tokens"] / VOCABULARY).square().mean()


class Classifier(nn.Module):
    """Returns the loss of a batch of images, under ResNet-20."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = CifarResNet(n=3, channels=1, classes=CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy, shape []."""
        return F.cross_entropy(self.layers(batch["image"]), batch["label"])


class LanguageModel(nn.Module):
    """Returns the loss of a batch of text, under an encoder of BERT-tiny's size (2 layers, width 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy over tokens, shape []."""
        logits_BLV = self.output(self.encoder(self.embedding(batch["tokens"])))
        return F.cross_entropy(logits_BLV.flatten(0, 1), batch["targets"].flatten())


_NETWORKS = {"tiny": Tiny, "resnet20": Classifier, "transformer": LanguageModel}


class Measured(LightningModule):
    """Trains a work's network with momentum, and logs as papers do.

    Args:
        work: one of :data:`WORKS`.
        metrics: values logged at each step.
    """

    def __init__(self, work: str, metrics: int):
        super().__init__()
        self.network, self.metrics = network(work), metrics

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = self.network(batch)
        for number in range(self.metrics):
            self.log(f"train/metric_{number}", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return sgd(self)


def network(work: str) -> nn.Module:
    """Return a work's network; it maps a batch to its loss."""
    return _NETWORKS[work]()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every way."""
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def write_set(folder: Path, work: str, samples: int) -> dict[str, Any]:
    """Write a work's shards; return the recipe's ``data.class_path`` and ``init_args``, the batch's size left out."""
    from paperscale.data.tokens import Document, write_tokens
    from paperscale.data.writer import ShardWriter

    of, rng = WORKS[work], np.random.default_rng(0)
    if of.side:
        image = {"height": of.side, "width": of.side, "channels": 1, "mean": [0.5], "std": [0.3]}
        with ShardWriter(
            folder, work, num_processes=0, image=image, classes=[str(c) for c in range(CLASSES)]
        ) as writer:
            writer.write("train", _pictures(of.side, samples, rng))
        return {"class_path": "paperscale.data.ImageShards", "init_args": {"path": str(folder)}}
    with ShardWriter(folder, work, num_processes=0) as writer:
        text = rng.integers(VOCABULARY, size=samples * of.length + 1)
        write_tokens(writer, "train", [text], lambda tokens: Document([tokens]), VOCABULARY)
    options = {"path": str(folder), "length": of.length, "next_token": True}
    return {"class_path": "paperscale.data.TokenBlocks", "init_args": options}


def _pictures(side: int, samples: int, rng: np.random.Generator) -> Sequence[dict[str, Any]]:
    from PIL import Image

    kept = []
    for number in range(64):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(png, "png")
        kept.append({"png": png.getvalue(), "cls": str(number % CLASSES).encode()})
    return [{"__key__": f"{number:08d}", **kept[number % len(kept)]} for number in range(samples)]
