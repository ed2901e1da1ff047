"""A rank of ``test_meter``, with batches of its own; prints what was logged."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from paperscale.training import meter
from ranks import trainer_of_rank

FLOPS = 7
VALIDATION_S = 1000.0


class Clock:
    """A clock that the training itself moves on."""

    def __init__(self) -> None:
        self.now = 5.0

    def monotonic(self) -> float:
        return self.now


class Reader(LightningModule):
    """Takes two seconds for a step."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.clock.now += 2.0
        return self.weight * len(batch["lengths"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.clock.now += VALIDATION_S

    def training_flops(self, batch: dict[str, Any]) -> int:
        return FLOPS * sum(batch["lengths"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(rank: int, steps: int) -> DataLoader:
    """Batches of 10, 20, 30... tokens, of the second rank ten times as many."""
    found = [{"lengths": [6 * 10**rank, (10 * number - 6) * 10**rank]} for number in range(1, steps + 1)]
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def metered(clock: Clock) -> meter.TokenMeter:
    """A meter that reads this clock, on a GPU of 100 operations a second."""
    meter.time = clock  # type: ignore[assignment]
    meter.peak_rate = lambda device, precision: 100.0  # a known GPU would have to be there
    return meter.TokenMeter()


def main(steps: int) -> None:
    clock = Clock()
    trainer: Trainer = trainer_of_rank("ddp", metered(clock), max_steps=steps, log_every_n_steps=2)
    trainer.fit(Reader(clock), batches(int(os.environ["RANK"]), steps))
    print(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))
    dist.destroy_process_group()  # or threads of gloo may outlive the interpreter


if __name__ == "__main__":
    main(int(sys.argv[1]))
