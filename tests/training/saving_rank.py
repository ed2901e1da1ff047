"""One rank of :mod:`test_saving`: a training that writes each checkpoint twice, or one that writes what it has read.

``python saving_rank.py RANK WORLD_SIZE PORT DATA FIRST SECOND`` trains and writes to two folders;
``python saving_rank.py RANK WORLD_SIZE PORT DATA FOLDER --resume CHECKPOINT`` writes what it has read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from networks import Small
from paperscale.data import ImageShards
from paperscale.jobs.environment import JobEnvironment
from paperscale.training import rendezvous, strategies
from paperscale.training.callbacks import StreamPosition
from paperscale.training.checkpoint import CheckpointOptions
from paperscale.training.checkpointing import Checkpointing
from paperscale.training.interruption import take_over_signals
from paperscale.training.quiet import quiet_libraries


class AtStart(Checkpointing):
    """Writes again what it has taken up."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = -1
        self.save(trainer)


def main(data: str, first: Path, second: str, checkpoint: str = "") -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    store = rendezvous.join(int(os.environ["RANK"]), world_size, on_gpu=False) if world_size > 1 else None
    options = CheckpointOptions(every_n_steps=3, wait=True)
    resume = Path(checkpoint) if checkpoint else None
    folders = [first] if resume else [first, Path(second)]
    writing: list[Any] = []
    for folder in folders:
        folder.mkdir(exist_ok=True)
        own = store and dist.PrefixStore(folder.name, store)
        writing.append((AtStart if resume else Checkpointing)(folder, options, resume, store=own))
    images = ImageShards(data, global_batch_size=32)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make("ddp", world_size),
        max_steps=4 if resume else 3,
        plugins=[JobEnvironment()],
        callbacks=[StreamPosition(), *writing],
        accumulate_grad_batches=images.accumulate(world_size),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    take_over_signals(trainer)
    trainer.fit(Small(), datamodule=images, ckpt_path=resume and resume / "state.pt", weights_only=True)


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
