"""One rank of :mod:`test_recompute`: statistics of a network that is not trained, on any number of ranks."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.data import ImageShards
from paperscale.jobs.environment import JobEnvironment
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.training import strategies
from paperscale.training.recompute import RecomputeBatchNorm


class AtOnce(Callback):
    """Recomputes before anything is trained, prints what was found, and ends."""

    def __init__(self) -> None:
        self.recompute = RecomputeBatchNorm(99)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recompute.on_fit_start(trainer, pl_module)
        self.recompute.conclude(trainer, pl_module)
        found = {name: buffer.tolist() for name, buffer in pl_module.named_buffers() if "running" in name}
        print(json.dumps(found), flush=True)
        trainer.should_stop = True


def main(shards: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make("ddp", world_size),
        plugins=[JobEnvironment()] if world_size > 1 else [],
        callbacks=[AtOnce()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    data = ImageShards(shards, 32, crop_padding=1, flip=True, eval_batch_size=32, seed=3)
    trainer.fit(ResNetClassifier(CifarResNet(1, 8, 1), classes=8), datamodule=data)


if __name__ == "__main__":
    main(sys.argv[1])
