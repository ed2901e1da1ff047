"""One rank of :mod:`test_ema`: the same training with averages under each strategy, and in one process."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paperscale.jobs.environment import JobEnvironment
from paperscale.nn.optimizers import Lamb, decay_groups
from paperscale.training import strategies
from paperscale.training.ema import EMA, EMAEnd, EMAOptions
from paperscale.training.strategies.single import SingleStrategy

WORLD_SIZE = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Regression(LightningModule):
    """Notes its losses, as means over ranks."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(5, 3)
        self.world_size = world_size
        self.losses: dict[str, list[float]] = {"train": [], "val": [], "test": []}

    def loss(self, batch: Tensor, name: str) -> Tensor:
        loss = F.mse_loss(self.head(self.blocks(batch)), batch[:, :3].sin())
        total = loss.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        self.losses[name].append(float(total) / self.world_size)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Lamb(decay_groups(self, 0.01), 0.05)  # it sees whole layers, or the averages are others


class Restored(Callback):
    """Sees whether a validation leaves the weights as they were, to the bit. Listed last."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.same: list[bool] = []

    def weights(self, trainer: Trainer) -> list[Tensor]:
        strategy: Any = trainer.strategy
        return [piece.tensor.detach().clone() for piece in strategy.parameter_pieces()]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.before = self.weights(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.same += map(torch.equal, self.before, self.weights(trainer))


def loader(first: int, step: int, count: int) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows: Any = [row for _ in range(count) for row in torch.randn(8, 5, generator=generator)[first::step]]
    return DataLoader(rows, batch_size=8 // step)


def gathered(ema: EMA, world_size: int) -> list[float]:
    """Return the averages' elements, put together from all ranks."""
    own = [(p.name, p.start, p.tensor.flatten().tolist()) for p in ema.pieces()]
    parts: list[Any] = [own]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, own)
    elements = {(name, start + i): x for part in parts for name, start, xs in part for i, x in enumerate(xs)}
    return [elements[key] for key in sorted(elements)]


def run(name: str, strategy: Any, rank: int, world_size: int) -> None:
    """Train, test and print what was seen."""
    module, ema, restored = Regression(world_size), EMA(EMAOptions(decay=0.7)), Restored()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[JobEnvironment()] if world_size > 1 else [],
        callbacks=[ema, restored, EMAEnd(ema)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(rank, world_size, 6), loader(rank, world_size, 2))
    averages = gathered(ema, world_size)
    trainer.test(module, loader(rank, world_size, 2), verbose=False)
    row = {"strategy": name, **module.losses, "averages": averages, "restored": all(restored.same)}
    print(json.dumps(row), flush=True)


def main(names: list[str]) -> None:
    """Run all of them in turn."""
    from paperscale.training.operators import prepare

    rank = int(os.environ["RANK"])
    run("whole", SingleStrategy(device="cpu"), 0, 1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    prepare()
    for name in names:
        wide = name == "fsdp whole"
        strategy = strategies.FSDP2Strategy(reshard_after_forward=False) if wide else strategies.make(name, WORLD_SIZE)
        run(name, strategy, rank, WORLD_SIZE)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
