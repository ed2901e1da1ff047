"""One rank of :mod:`test_strategies`: trains under one strategy after another, in one group of processes.

``python strategy_rank.py RANK WORLD_SIZE PORT FOLDER JOBS``: JOBS is JSON, a list of :class:`Training`'s fields; rank 0
writes each training's losses as a line of ``FOLDER/out.jsonl``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from paperscale.data import ImageShards
from paperscale.jobs.environment import JobEnvironment
from paperscale.training import rendezvous, strategies
from paperscale.training.callbacks import StreamPosition
from paperscale.training.checkpoint import CheckpointOptions
from paperscale.training.checkpointing import Checkpointing
from paperscale.training.interruption import take_over_signals
from paperscale.training.operators import prepare
from paperscale.training.quiet import quiet_libraries


class Block(nn.Module):
    """A residual block without statistics over the batch: what it computes does not depend on how that is divided."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Small(LightningModule):
    """A network with two parameter groups, a frozen weight, tied weights, a buffer and a schedule."""

    def __init__(self, width: int = 9, lr: float = 0.01):
        super().__init__()
        self.lr = lr
        self.first = nn.Linear(64, width)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.last = nn.Linear(width, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(image.flatten(1)[:, :64]) * self.scale))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen += 1
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() > 1]
        other = [p for p in self.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Training:
    """What to train.

    Attributes:
        strategy: its name, or a class and its arguments.
        steps: at which it ends.
        data: folder of the shards.
        save: folder of checkpoints to write into.
        resume: checkpoint to continue from.
        precision: of the Trainer.
        micro_batch_size: samples of a forward pass.
        clip: of the gradients' norm.
    """

    strategy: Any
    steps: int
    data: str
    save: str
    resume: str | None = None
    precision: str = "32-true"
    micro_batch_size: int | None = None
    clip: float | None = 1.0
    options: dict[str, Any] = field(default_factory=dict)


class Losses(Callback):
    """Keeps the mean loss of each global batch."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._sum = torch.zeros(2, dtype=torch.float64)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        count = len(batch["label"]) * bool(batch["cursor"].weight)
        loss = outputs["loss"].item()
        if not strategies.is_sharded(trainer.strategy) or "Zero" not in type(trainer.strategy).__name__:
            loss *= trainer.accumulate_grad_batches
        self._sum += torch.tensor([loss * count, count], dtype=torch.float64)
        if batch["cursor"].last:
            if trainer.world_size > 1:
                dist.all_reduce(self._sum)
            self.values.append(float(self._sum[0] / self._sum[1]))
            self._sum.zero_()


def train(job: Training, store: Any, world_size: int) -> list[float]:
    """Train; return the losses."""
    torch.manual_seed(1)
    made: Any = job.strategy
    if not isinstance(made, str):
        made = getattr(strategies, made["class"])(**made["arguments"])
    data = ImageShards(job.data, global_batch_size=32, micro_batch_size=job.micro_batch_size)
    folder = Path(job.save)
    folder.mkdir(parents=True, exist_ok=True)
    losses = Losses()
    resume = Path(job.resume) if job.resume else None
    saving = Checkpointing(folder, CheckpointOptions(every_n_steps=5, **job.options), resume, store=store)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make(made, world_size),
        precision=job.precision,
        gradient_clip_val=job.clip,
        max_steps=job.steps,
        max_epochs=-1,
        plugins=[JobEnvironment()],
        callbacks=[losses, StreamPosition(), saving],
        accumulate_grad_batches=data.accumulate(world_size),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    take_over_signals(trainer)
    trainer.fit(Small(), datamodule=data, ckpt_path=resume and resume / "state.pt", weights_only=True)
    return losses.values


def main(rank: int, world_size: int, port: int, folder: Path, jobs: list[Training]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank)
    )
    quiet_libraries()
    torch.set_num_threads(1)
    prepare(())
    store = rendezvous.join(rank, world_size, on_gpu=False)
    for job in jobs:
        losses = train(job, store if world_size > 1 else None, world_size)
        if rank == 0:
            with (folder / "out.jsonl").open("a") as file:
                file.write(json.dumps(losses) + "\n")


if __name__ == "__main__":
    work = [Training(**job) for job in json.loads(sys.argv[5])]
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), work)  # type: ignore[arg-type]
