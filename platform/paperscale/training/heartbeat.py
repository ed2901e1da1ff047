"""Marks what a rank is doing at every event of the loop, and measures its own part of each step."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from paperscale.training.pulse import Pulse


class Heartbeat(Callback):
    """Writes the rank's pulse.

    With synchronous gradients all ranks take equally long for a step, however slow one of them is. What tells them
    apart is the time up to the first gradient, data and forward pass, without the wait for the others that DDP's
    exchange of buffers puts in between.

    Args:
        pulse: this rank's.
    """

    def __init__(self, pulse: Pulse):
        self.pulse = pulse
        self._ended = self._started = self._data_s = self._local_s = 0.0
        self._entered = self._waited_s = 0.0
        self._device_start: torch.cuda.Event | None = None
        self._forward: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)
        self._device_forward_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time what the strategy does between its own forward pass and the model's."""
        self.pulse.mark("starting", trainer.global_step)
        wrapper = trainer.strategy.model
        if isinstance(wrapper, torch.nn.Module) and wrapper is not pl_module:
            wrapper.register_forward_pre_hook(self._enter)
            pl_module.register_forward_pre_hook(self._begin)

    def _enter(self, *args: Any) -> None:
        self._entered = time.monotonic()

    def _begin(self, *args: Any) -> None:
        self._waited_s = time.monotonic() - self._entered

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loader begins anew."""
        self.pulse.mark("starting", trainer.global_step)
        self._ended = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self.pulse.mark("forward")
        self._started = time.monotonic()
        self._data_s = self._started - self._ended if self._ended else 0.0
        if pl_module.device.type == "cuda":
            self._device_start = torch.cuda.Event(enable_timing=True)
            self._device_start.record()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is done; from here on ranks wait for each other."""
        self.pulse.mark("backward")
        self._local_s = self._data_s + time.monotonic() - self._started - self._waited_s
        self._waited_s = 0.0
        if self._device_start is not None:
            done = torch.cuda.Event(enable_timing=True)
            done.record()
            self._forward.append((self._device_start, done))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done; the next batch is waited for."""
        now = time.monotonic()
        if self._ended:
            while self._forward and self._forward[0][1].query():  # of earlier steps: nothing is waited for
                start, done = self._forward.popleft()
                self._device_forward_s = start.elapsed_time(done) / 1000
            local = max(self._local_s, self._data_s + self._device_forward_s)
            self.pulse.measured(now - self._ended, local, self._data_s)
        self._ended = now
        self.pulse.mark("data", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another loader begins."""
        self.pulse.mark("starting")
        self._ended = 0.0

    def on_validation_batch_start(self, *args: Any) -> None:
        """A batch of validation."""
        self.pulse.mark("validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another loader begins."""
        self.pulse.mark("starting")

    def on_test_batch_start(self, *args: Any) -> None:
        """A batch of the test."""
        self.pulse.mark("test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left is the end."""
        self.pulse.mark("ending", trainer.global_step)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left is the end."""
        self.pulse.mark("ending")
