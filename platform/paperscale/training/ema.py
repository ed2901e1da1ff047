"""Exponential moving averages of the weights, divided over ranks as the strategy divides the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from paperscale.errors import UserError
from paperscale.training.pieces import Piece
from paperscale.training.tensorfile import TensorReader


@dataclass
class EMAOptions:
    """Averages of the weights: a = d a + (1 - d) w after an optimizer step.

    Attributes:
        decay: d, such as 0.9999; ``None`` keeps no averages.
        warmup: begin with a smaller d, the smaller of decay and (1 + t) / (10 + t) at update t = 0, 1, ...
        every_n_steps: optimizer steps between updates; d is per update.
        evaluate: validate, test and end with the averages in place of the weights.
    """

    decay: float | None = None
    warmup: bool = True
    every_n_steps: int = 1
    evaluate: bool = True

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"ema.decay is {self.decay}; use a number from 0 to below 1, such as 0.9999")
        if self.every_n_steps < 1:
            raise UserError(f"ema.every_n_steps is {self.every_n_steps}; use 1 or more")


class EMA(Callback):
    """Averages the weights after optimizer steps, in float32, from the strategy's fp32 masters where it has any.

    Each rank averages the elements that it holds, so that no step waits for another rank. Buffers are not averaged:
    an evaluation with averages uses the batch normalisation statistics that the model has.

    A run begins its averages at the weights of its first step; one that continues from a checkpoint continues with
    the checkpoint's averages where there are any.

    Args:
        options: with a decay.
        resume: the checkpoint the run continues from.
    """

    def __init__(self, options: EMAOptions, resume: Path | None = None):
        self.options, self.resume = options, resume
        self.updates = 0
        self._strategy: Any = None
        self._weights: list[Piece] = []
        self._averages: list[Tensor] = []
        self._kept: list[Tensor] | None = None
        self._loaded = self._begun = False
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; the averages themselves are read into :meth:`pieces`."""
        self.updates, self._loaded = int(state_dict["updates"]), True

    def pieces(self) -> list[Piece]:
        """Return what this rank holds of the averages, named ``ema/<parameter>``; empty before the fit starts."""
        return [
            replace(weight, name=_name(weight), tensor=average)
            for weight, average in zip(self._weights, self._averages, strict=True)
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the averages: the strategy has divided the model."""
        self._strategy = trainer.strategy
        self._weights = self._strategy.parameter_pieces()
        self._averages = [_float32(weight.tensor, copy=True) for weight in self._weights]
        self._begun = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin at the weights as a checkpoint or the model has left them, unless averages were read too."""
        if self._begun:
            return
        self._begun, self._step = True, trainer.global_step
        if not self._loaded:
            for average, weight in zip(self._averages, self._present(), strict=True):
                average.copy_(weight.tensor)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages where an optimizer step was taken and it is time."""
        before, self._step = self._step, trainer.global_step
        if self._step // self.options.every_n_steps > before // self.options.every_n_steps:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        decay = self.options.decay
        assert decay is not None  # noqa: S101  a run without one has no such callback
        if self.options.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._averages:
            weights = [_float32(weight.tensor) for weight in self._present()]
            torch._foreach_lerp_(self._averages, weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the averages, once there are any."""
        if self.options.evaluate and self._begun and trainer.state.fn == "fit":
            self._kept = [weight.tensor.detach().clone() for weight in self._present()]
            self._put(self._averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the very weights that were there before."""
        if self._kept is not None:
            self._put(self._kept)
            self._kept = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the averages also where the checkpoint was of the end already, and nothing was left to train."""
        if self._begun or self.resume is None or not self.options.evaluate:
            return
        strategy: Any = trainer.strategy
        reader = TensorReader(self.resume)
        for weight in strategy.parameter_pieces():
            if _name(weight) in reader:
                reader.fill(replace(weight, name=_name(weight)))
        strategy.weights_changed()

    def finish(self, trainer: Trainer) -> None:
        """Leave the averages in the model: it is trained."""
        if self.options.evaluate and self._begun:
            self._put(self._averages)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        """Give the model other weights. Called on all ranks."""
        for weight, value in zip(self._present(), values, strict=True):
            weight.fill(value)
        self._strategy.weights_changed()

    def _present(self) -> list[Piece]:
        """Return what this rank holds of the weights now."""
        if not self._strategy.keeps_pieces:
            self._weights = self._strategy.parameter_pieces()
        return self._weights


class EMAEnd(Checkpoint):
    """Puts the averages into the trained model.

    A subclass of Lightning's ``Checkpoint``, listed after the one that writes checkpoints, so that the last
    checkpoint still holds the weights that training can go on with.

    Args:
        ema: with the averages.
    """

    def __init__(self, ema: EMA):
        self.ema = ema

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them in."""
        self.ema.finish(trainer)


def _name(weight: Piece) -> str:
    """Return the name of a weight's average."""
    return f"ema/{weight.name.removeprefix('model/')}"


def _float32(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return a tensor in float32, or in its own type if that is more precise."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)
