"""One rank of :mod:`test_probes`: responses and gradients of a network without training, however it is divided."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.data import ImageShards
from paperscale.jobs.environment import JobEnvironment
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.training import strategies
from paperscale.training.probes import LayerGradients, LayerResponses, numbered


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
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make("auto" if world_size == 1 else strategy, world_size),
        plugins=[JobEnvironment()] if world_size > 1 else [],
        callbacks=[Look()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    data = ImageShards(shards, 32, eval_batch_size=16, seed=3)
    module = ResNetClassifier(CifarResNet(1, 8, 1), classes=8)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()  # a rank's own batch would make other gradients
    module.train = lambda mode=True: module  # type: ignore[method-assign, assignment]
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
