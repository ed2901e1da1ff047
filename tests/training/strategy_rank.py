"""One rank of :mod:`test_strategies`: trains under one strategy after another, in one group of processes.

``python strategy_rank.py FOLDER JOBS``: JOBS is JSON, a list of :class:`Training`'s fields; rank 0
writes each training's losses as a line of ``FOLDER/out.jsonl``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from networks import Adversaries, Small
from paperscale.data import ImageShards
from paperscale.jobs.environment import JobEnvironment
from paperscale.training import rendezvous, strategies
from paperscale.training.callbacks import StreamPosition
from paperscale.training.checkpoint import CheckpointOptions
from paperscale.training.checkpointing import Checkpointing
from paperscale.training.deferred import construct
from paperscale.training.ema import EMA, EMAOptions
from paperscale.training.initial import InitialWeights
from paperscale.training.interruption import take_over_signals
from paperscale.training.quiet import quiet_libraries
from paperscale.training.sharding import sharding


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
        drop: the optimizer step that is dropped.
        options: of the checkpoints.
        width: of the network.
        lr: its learning rate.
        frozen: a part of it that is not trained.
        decay: of the averages of its weights.
        memory: tell how much memory it takes, and do not train.
        initial: checkpoint to begin with the weights of.
        by_hand: train two networks that step their optimizers by hand.
    """

    strategy: Any
    steps: int
    data: str
    save: str
    resume: str | None = None
    precision: str = "32-true"
    micro_batch_size: int | None = None
    clip: float | None = 1.0
    drop: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    width: int = 9
    lr: float = 0.01
    frozen: str | None = None
    decay: float | None = None
    memory: bool = False
    initial: str | None = None
    by_hand: bool = False


class Losses(Callback):
    """Keeps the mean loss of each global batch and the norm of its gradient; drops one step."""

    def __init__(self, drop: int | None) -> None:
        self.drop = drop
        self.values: list[float] = []
        self.norms: list[float] = []
        self._sum = torch.zeros(2, dtype=torch.float64)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(float(trainer.strategy.gradient_norm()))
        if len(self.norms) == self.drop:
            trainer.strategy.drop_gradients()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        count = len(batch["label"]) * bool(batch["cursor"].weight)
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._sum += torch.tensor([loss * count, count], dtype=torch.float64)
        if batch["cursor"].last:
            if trainer.world_size > 1:
                dist.all_reduce(self._sum)
            self.values.append(float(self._sum[0] / self._sum[1]))
            self._sum.zero_()


class Memory(Callback):
    """Tells how far this process has grown when training starts, in MiB, and ends it there."""

    def __init__(self) -> None:
        self.before = self.peak()

    @staticmethod
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in pl_module.parameters()) * 4 >> 20
        print(json.dumps({"weights": weights, "grown": self.peak() - self.before}), flush=True)
        os._exit(0)


def network(job: Training) -> LightningModule:
    if job.by_hand:
        return Adversaries()
    model = Small(job.width, job.lr)
    if job.frozen:
        model.get_submodule(job.frozen).requires_grad_(False)
    return model


def train(job: Training, store: Any, world_size: int) -> dict[str, list[float]]:
    """Train; return losses and norms."""
    torch.manual_seed(1)
    made: Any = job.strategy
    if not isinstance(made, str):
        made = getattr(strategies, made["class"])(**made["arguments"])
    data = ImageShards(job.data, global_batch_size=32, micro_batch_size=job.micro_batch_size)
    folder = Path(job.save)
    folder.mkdir(parents=True, exist_ok=True)
    losses = Losses(job.drop)
    resume = Path(job.resume) if job.resume else None
    saving = Checkpointing(folder, CheckpointOptions(every_n_steps=5, **job.options), resume, store=store)
    initial = [InitialWeights(Path(job.initial), None)] if job.initial else []
    averages = [EMA(EMAOptions(job.decay), resume)] if job.decay else []
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make(made, world_size, by_hand=job.by_hand),
        precision=job.precision,
        gradient_clip_val=job.clip,
        max_steps=job.steps,
        max_epochs=-1,
        plugins=[JobEnvironment()],
        callbacks=[*initial, losses, StreamPosition(), *averages, saving, *([Memory()] if job.memory else [])],
        accumulate_grad_batches=data.accumulate(world_size),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    take_over_signals(trainer)
    model, initialisation = construct(lambda: network(job))
    if "parameters" in sharding(job.strategy if isinstance(job.strategy, str) else "ddp").divided:
        trainer.strategy.initial = initialisation.value
    else:
        torch.manual_seed(1)
        model = network(job)
    trainer.fit(model, datamodule=data, ckpt_path=resume and resume / "state.pt", weights_only=True)
    return {"losses": losses.values, "norms": losses.norms}


def main(folder: Path, jobs: list[Training]) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    quiet_libraries()
    torch.set_num_threads(1)
    store = rendezvous.join(rank, world_size, on_gpu=False)  # one process makes a group as well: ZeRO needs one
    for job in jobs:
        found = train(job, store if world_size > 1 else None, world_size)
        if rank == 0:
            with (folder / "out.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Training(**job) for job in json.loads(sys.argv[2])])
