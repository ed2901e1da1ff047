"""Troubles that training meets, for recipes of the tests to name."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers import Linear, SignalAt


class Poison(Callback):
    """Spoils the batches that hold certain positions of the order, as a damaged file would: on every visit.

    Args:
        at: samples consumed before each spoiled sample.
        value: what the images of its batch, on its rank, are multiplied by.
    """

    def __init__(self, at: list[int], value: float = float("nan")):
        self.at, self.value = at, value

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        stream: Any = trainer.datamodule
        first, last = stream.epoch_around(stream.consumed)
        spoiled = {number for at in self.at if first <= at < last for number in stream.samples_between(at, at + 1)}
        if spoiled.intersection(batch["sample"].tolist()):
            batch["image"] *= self.value


class SignalIn(SignalAt):
    """Sends the signal in one attempt alone.

    Args:
        attempt: its number.
        step: optimizer steps after which the signal is sent.
    """

    def __init__(self, attempt: int, step: int):
        super().__init__(step)
        self.attempt = attempt

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.default_root_dir.endswith(f"{self.attempt:04d}")


class StateLog(Callback):
    """Keeps weights, buffers and optimizer state before and after each step, for a test in this process."""

    states: ClassVar[dict[int, dict[str, Any]]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        for number, held in optimizer.state_dict()["state"].items():
            state |= {f"{number} {key}": torch.as_tensor(value).clone() for key, value in held.items()}
        self.states[trainer.global_step] = state


class Hungry(Linear):
    """Asks for more memory than any machine has, for more than ``limit`` training samples at a time.

    Args:
        limit: samples.
        after: passes that are let through in each process.
        rank: the rank whose memory is short.
    """

    def __init__(self, limit: int, after: int = 0, rank: int = 0):
        super().__init__()
        self.limit, self.after = limit, after
        self.short = int(os.environ.get("RANK", 0)) == rank

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and self.short:
            self.after -= 1
            if len(images) > self.limit and self.after < 0:
                torch.empty(1 << 58)
        return super().forward(images)
