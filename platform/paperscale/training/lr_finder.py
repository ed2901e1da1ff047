"""``paperscale lr-find``: a learning rate from one short training, in which it grows at every step.

After Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3. https://arxiv.org/abs/1506.01186

The slope at a step is fitted to the steps on both sides of it, over the logarithm of the learning rate. (An average
over past steps alone lags behind a rate that grows tenfold in a dozen steps; a slope over the rate itself is steepest
at the smallest rates, whatever the loss does.)
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.data import ShardStream
from paperscale.errors import UserError
from paperscale.training.callbacks import StreamPosition
from paperscale.training.recipe import RecipeCLI

_SIDE = 5  # steps on either side that a slope, or a smoothed loss, is over, at least
_DIVERGED = 4.0  # times the least smoothed loss
_LEAST_STEPS = 4 * _SIDE


class Sweep(Callback):
    """Sets the learning rate of each step, and keeps its loss; ends the training when the loss diverges.

    Args:
        low: learning rate of the first step.
        high: learning rate of the last.
        steps: number of steps.
    """

    def __init__(self, low: float, high: float, steps: int):
        self.planned = np.geomspace(low, high, steps)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._ratios: list[float] = []
        self._part = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the recipe's schedule out, and note how the groups' rates compare with the first one's."""
        trainer.strategy.lr_scheduler_configs = []
        if len(trainer.optimizers) != 1:
            raise UserError(f"lr-find is for models with one optimizer, this one has {len(trainer.optimizers)}")
        rates = [group["initial_lr"] if "initial_lr" in group else group["lr"] for group in _groups(trainer)]
        self._ratios = [rate / rates[0] if rates[0] else 1.0 for rate in rates]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the rate of this step."""
        rate = float(self.planned[len(self.losses)])
        for group, ratio in zip(_groups(trainer), self._ratios, strict=True):
            group["lr"] = rate * ratio

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of the step, over all its forward passes."""
        self._part += float(outputs["loss"]) * batch["cursor"].weight  # Lightning has divided it by the passes
        if not batch["cursor"].last:
            return
        self.rates.append(float(self.planned[len(self.losses)]))
        self.losses.append(self._part)
        self._part = 0.0
        recent, least = np.mean(self.losses[-_SIDE:]), smoothed(self.losses).min()
        if not math.isfinite(self.losses[-1]) or (len(self.losses) > _LEAST_STEPS and recent > _DIVERGED * least):
            trainer.should_stop = True


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.optimizers[0].param_groups


@dataclass(frozen=True)
class Found:
    """What a sweep has found.

    Attributes:
        rates: learning rates.
        losses: smoothed, at each of them.
        best: index of the steepest descent; the rate to train with.
        diverged: whether the loss diverged before the largest rate.
    """

    rates: list[float]
    losses: list[float]
    best: int
    diverged: bool

    @property
    def rate(self) -> float:
        """Return the learning rate at the steepest descent."""
        return self.rates[self.best]


def find_rate(cli: RecipeCLI, low: float = 1e-8, high: float = 1.0, steps: int = 100) -> Found:
    """Train a recipe for some steps in this process, with a learning rate that grows; nothing is kept of it.

    Args:
        cli: the recipe, with its own data and optimizer.
        low: smallest learning rate.
        high: largest.
        steps: optimizer steps.

    Raises:
        UserError: the loss falls nowhere, or the range is none.
    """
    if not 0 < low < high or steps < _LEAST_STEPS:
        raise UserError(
            f"--min-lr {low:g} --max-lr {high:g} --steps {steps}: give 0 < min < max and {_LEAST_STEPS} steps or more"
        )
    stream: ShardStream = cli.datamodule
    cli.config_init.trainer.callbacks = None  # the recipe's are for its training
    sweep = Sweep(low, high, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = cli.trainer_for(
            callbacks=[StreamPosition(), sweep],
            strategy="auto",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            limit_val_batches=0,
            accumulate_grad_batches=stream.accumulate(1),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        trainer.fit(cli.model, datamodule=stream)
    return steepest(sweep.rates, sweep.losses, steps)


def steepest(rates: list[float], losses: list[float], steps: int) -> Found:
    """Return where the loss falls fastest over the logarithm of the learning rate, before its smoothed minimum.

    The rates are a geometric sequence: a slope over steps is one over the logarithm, by least squares.

    Raises:
        UserError: it falls nowhere.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    side = _side(len(finite))
    offsets = np.arange(-side, side + 1)
    slopes = np.correlate(finite, offsets / (offsets**2).sum(), "valid") if len(finite) > 2 * side else np.empty(0)
    smooth = smoothed(finite)
    slopes = slopes[: max(0, int(smooth.argmin()) - side + 1)]  # up to the minimum; the first is that of step `side`
    if not len(slopes) or slopes.min() >= 0:
        raise UserError(
            f"the loss falls nowhere between {rates[0]:.3g} and {rates[-1]:.3g}; try a smaller --min-lr, a larger "
            "--max-lr or more --steps"
        )
    best = int(slopes.argmin()) + side
    return Found(rates[: len(finite)], smooth.tolist(), best, diverged=len(losses) < steps)


def _side(count: int) -> int:
    """Return how many steps on either side a slope, or a smoothed loss, is over."""
    return max(_SIDE, count // 12)


def smoothed(losses: list[float]) -> np.ndarray:
    """Return the mean over the steps on both sides of each, as many on one as on the other."""
    values, most = np.asarray(losses), _side(len(losses))
    sides = [min(most, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - side : i + side + 1].mean() for i, side in enumerate(sides)])


def key_of_rate(cli: RecipeCLI) -> str:
    """Return the recipe's key of the learning rate, or words for it where the model has none of the usual names."""
    arguments = cli.config.model.init_args if "init_args" in cli.config.model else cli.config.model
    return next((f"model.{name}" for name in ("lr", "learning_rate") if name in arguments), "learning rate")


# -- the picture -------------------------------------------------------------------------------------------


def _places(found: Found, width: int, height: int) -> list[tuple[int, int]]:
    """Return column and row (0 at the top) of each point; losses far above the first are cut off."""
    logs = np.log10(found.rates)
    top = min(max(found.losses), found.losses[0] + (found.losses[0] - min(found.losses)))
    x = (logs - logs[0]) / (logs[-1] - logs[0]) * (width - 1)
    y = (top - np.minimum(found.losses, top)) / max(top - min(found.losses), 1e-12) * (height - 1)
    return [(round(column), round(row)) for column, row in zip(x.tolist(), y.tolist(), strict=True)]


def as_text(found: Found, width: int = 64, height: int = 14) -> str:
    """Return the curve drawn with characters; ``O`` marks the rate that was found."""
    canvas = [[" "] * width for _ in range(height)]
    places = _places(found, width, height)
    for column, row in places:
        canvas[row][column] = "·"
    column, row = places[found.best]
    canvas[row][column] = "O"
    ends = f"{found.rates[0]:.0e}".ljust(width - 6) + f"{found.rates[-1]:.0e}"
    return "\n".join(["".join(line).rstrip() for line in canvas] + ["─" * width, ends])


def as_svg(found: Found, name: str) -> str:
    """Return the curve as a picture of 640 by 400."""
    places = _places(found, 560, 320)
    line = " ".join(f"{50 + x},{30 + y}" for x, y in places)
    x, y = places[found.best]
    decades = range(math.ceil(math.log10(found.rates[0])), math.floor(math.log10(found.rates[-1])) + 1)
    first, last = math.log10(found.rates[0]), math.log10(found.rates[-1])
    ticks = "".join(
        f'<text x="{50 + 559 * (decade - first) / (last - first):.0f}" y="372" text-anchor="middle">1e{decade}</text>'
        for decade in decades
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">'
        '<rect width="640" height="400" fill="white"/><path d="M50 30V350H610" fill="none" stroke="black"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>'
        f'<circle cx="{50 + x}" cy="{30 + y}" r="5" fill="#d62728"/>'
        f'<text x="50" y="20">{name}: smoothed loss over the learning rate; steepest at {found.rate:.2e}</text>'
        f"{ticks}"
        f'<text x="44" y="350" text-anchor="end">{min(found.losses):.2f}</text></svg>\n'
    )
