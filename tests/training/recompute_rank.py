"""One rank of :mod:`test_recompute`: statistics of a network that is not trained, on any number of ranks."""

from __future__ import annotations

import json
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.data import ImageShards
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.training.recompute import RecomputeBatchNorm
from ranks import trainer_of_rank


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
    trainer = trainer_of_rank("ddp", AtOnce())
    data = ImageShards(shards, 32, crop_padding=1, flip=True, eval_batch_size=32, seed=3)
    trainer.fit(ResNetClassifier(CifarResNet(1, 8, 1), classes=8), datamodule=data)


if __name__ == "__main__":
    main(sys.argv[1])
