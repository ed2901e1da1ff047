"""``TokenMeter``: the speed of a training on text, in tokens a second and in the share of the GPU's peak."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from paperscale.errors import UserError
from paperscale.training.gpus import recognised


class TokenMeter(Callback):
    """Logs ``speed/tokens_per_s``, real tokens over all ranks, and on GPUs that are known ``speed/mfu``.

    A recipe names it::

        trainer:
          callbacks:
          - class_path: paperscale.training.meter.TokenMeter

    The figures are of the steps since the row of metrics before (``trainer.log_every_n_steps``), validation left out;
    the first step of an attempt, which is slow, is not among them. Tokens are counted on the host, added up over ranks
    on the device, and read with the row: no step waits for them. Padding, which packed batches do not have, would be
    counted where a batch has no ``lengths``.

    The MFU is the share of the GPUs' dense peak rate that the module's ``training_flops(batch)`` makes up: what the
    model needs, not what is computed again. A module without that method has none.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._tokens = self._flops = self._step = 0
        self._paused = self._peak = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._began = None
        self._peak = peak_rate(_device(trainer), str(trainer.precision)) * trainer.world_size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log where a row is due.

        Raises:
            UserError: the batch has no tokens.
        """
        if self._began is None:
            self._restart(trainer.global_step)
            return
        self._tokens += tokens_of(batch)
        module: Any = pl_module
        if self._peak and hasattr(module, "training_flops"):
            self._flops += module.training_flops(batch)
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and trainer.global_step != self._step:
            self._log(trainer, pl_module, time.monotonic() - self._began)
            self._restart(trainer.global_step)

    def _log(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> None:
        """Log the rates; every rank comes here at the same step."""
        done = [torch.full((), float(value), device=_device(trainer)) for value in (self._tokens, self._flops)]
        rate_2 = torch.stack(done) / seconds
        if trainer.world_size > 1:
            dist.all_reduce(rate_2)
        pl_module.log("speed/tokens_per_s", rate_2[0])
        if self._flops:
            pl_module.log("speed/mfu", rate_2[1] / self._peak)

    def _restart(self, step: int) -> None:
        self._began, self._step = time.monotonic(), step
        self._tokens = self._flops = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        if self._began is not None:
            self._began += time.monotonic() - self._paused


def tokens_of(batch: Any) -> int:
    """Return the tokens of a batch, known to the host.

    Raises:
        UserError: it has none.
    """
    if "lengths" in batch:
        return sum(batch["lengths"])
    if isinstance(tokens := batch.get("tokens"), Tensor):
        return tokens.numel()
    raise UserError(
        "trainer.callbacks: TokenMeter counts the `lengths` or `tokens` of a batch, and there are none; leave it out"
    )


def peak_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second that a GPU's data sheet promises; 0 for a CPU, and where it is not known.

    Args:
        device: that computes.
        precision: as Lightning names it.
    """
    if device.type != "cuda":
        return 0.0
    gpu = recognised(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
    if precision.startswith("bf16"):
        return gpu.rate("bf16")
    if precision.startswith("16"):
        return gpu.rate("fp16")
    return gpu.rate("tf32", "fp32") if torch.backends.cuda.matmul.allow_tf32 else gpu.rate("fp32")


def _device(trainer: Trainer) -> torch.device:
    device: torch.device = trainer.strategy.root_device
    return device
