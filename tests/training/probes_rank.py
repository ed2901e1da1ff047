"""One rank of :mod:`test_probes`: responses and gradients of a network without training, however it is divided."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.data import ImageShards
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.training.probes import LayerGradients, LayerResponses, numbered
from ranks import trainer_of_rank


class Look(Callback):
    """Prints what the probes find at the first step."""

    def __init__(self) -> None:
        self.responses, self.gradients = LayerResponses(samples=32), LayerGradients()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.responses.on_fit_start(trainer, pl_module)
        self.gradients.on_fit_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = self.responses.deviations(trainer, pl_module)
        row = dict(zip(numbered("responses", [*found]), found.values(), strict=True))
        print(json.dumps({**row, **self.gradients.norms(trainer, optimizer)}), flush=True)


def main(shards: str, strategy: str) -> None:
    trainer = trainer_of_rank(strategy, Look())
    data = ImageShards(shards, 32, eval_batch_size=16, seed=3)
    module = ResNetClassifier(CifarResNet(1, 8, 1), classes=8)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()  # a rank's own batch would make other gradients
    module.train = lambda mode=True: module  # type: ignore[method-assign, assignment]
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
