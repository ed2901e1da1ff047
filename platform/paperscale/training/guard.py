"""What a run does when training goes wrong: gradients that are not finite, a loss that jumps, memory that runs out.

Whatever is decided must be decided alike on all ranks. The norm of the whole gradient, and the loss over the global
batch, are the same on all of them, so that none has to ask another.

On a GPU the host is ahead of the device, and looking at a number waits for it. Where the answer only ends the run,
the look is put off until the next step's forward pass is on its way to the device: it has work to do meanwhile, and
the gradients are still there to be named.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paperscale.data import ShardStream
from paperscale.errors import RolledBack, UserError
from paperscale.training.callbacks import datamodule
from paperscale.training.checkpoint import checkpoint_name

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 1e-3  # of the median: a loss that hardly moves has no spikes
_LEAST_LOSSES = 16
_SKIPS_AMONG = 1000
_NAMED = 8


@dataclass
class GuardOptions:
    """What happens when training goes wrong; see docs/guard.md.

    Attributes:
        non_finite: what a step whose gradients are not finite does: ``stop`` ends the run; ``skip`` leaves weights and
            optimizer as they are; ``rollback`` goes back to the last checkpoint and passes over the samples since.
        max_skips: steps among the last 1,000 that may be skipped before the run ends.
        spike: a loss of the global batch that is more than this many robust standard deviations (by the median
            absolute deviation) above the median of the recent losses is a spike; ``None`` does not look. The short
            batch at an epoch's end is not judged.
        spike_action: what a spike does: ``warn``, ``skip`` or ``rollback``.
        window: steps that are recent; also the most that a rollback passes over.
        max_rollbacks: times that a run may go back.
        log_gradient_norm: whether ``train/gradient_norm``, before clipping, is logged.
        halve_on_oom: whether a run that is out of memory goes on with half the samples a forward pass.
    """

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    max_skips: int = 10
    spike: float | None = None
    spike_action: Literal["warn", "skip", "rollback"] = "warn"
    window: int = 128
    max_rollbacks: int = 3
    log_gradient_norm: bool = False
    halve_on_oom: bool = True

    def __post_init__(self) -> None:
        if self.spike is not None and self.spike <= 0:
            raise UserError(f"guard.spike={self.spike}: give a number above 0, such as 6, or leave it out")
        if self.window < _LEAST_LOSSES:
            raise UserError(
                f"guard.window={self.window} is too short to tell what is usual; use {_LEAST_LOSSES} or more"
            )
        for name in ("max_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"guard.{name}={getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class _Step:
    """An optimizer step that has not been judged.

    Attributes:
        number: of the step, from 1.
        start: samples consumed before its batch.
        norm: 2-norm of the gradient.
        loss: mean over the global batch; ``None`` where nobody looks at it.
    """

    number: int
    start: int
    norm: Tensor
    loss: Tensor | None


class Guard(Callback):
    """Looks at each step's gradients and loss before, or soon after, the optimizer uses them.

    Args:
        options: what to do.
        rollbacks: how often the run has gone back before this attempt.
        say: prints a line (rank 0).
        recipe: the file in which the user changes ``guard``, and the command that goes on after it.
    """

    def __init__(
        self,
        options: GuardOptions,
        rollbacks: int = 0,
        say: Callable[[str], None] = print,
        recipe: str = "the recipe",
    ):
        self.options, self.rollbacks, self.say, self.recipe = options, rollbacks, say, recipe
        self.skipped = 0
        self.in_step = False
        self._recent: list[int] = []
        self._losses: deque[float] = deque(maxlen=options.window)
        self._starts: deque[int] = deque(maxlen=options.window)
        self._saved = (0, 0)
        self._trainer: Trainer | None = None
        self._step: _Step | None = None
        self._loss: Tensor | None = None
        self._buffers: list[Tensor] = []
        self._at_once = self._begins = True
        self._weight = 1.0

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was skipped, and the recent losses."""
        assert self._trainer is not None  # noqa: S101  nothing is saved before the start
        accumulate = self._trainer.accumulate_grad_batches
        return {"skipped": self.skipped, "recent": self._recent, "losses": [*self._losses], "accumulate": accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.skipped, self._recent = state_dict["skipped"], state_dict["recent"]
        self._losses.extend(state_dict["losses"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let Lightning's loops count the forward passes of this attempt, which may divide a step otherwise."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        before, now = state.get("accumulate"), trainer.accumulate_grad_batches
        if before is None or before == now:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            passes = count["ready"] // before * now
            count.update({name: passes - (count["ready"] - value) for name, value in count.items()})
        state["accumulate"] = now

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the run would go back to."""
        self._saved = trainer.global_step, datamodule(trainer).consumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look."""
        options = self.options
        if options.spike is not None and not pl_module.automatic_optimization:
            raise UserError("guard.spike: a module with manual optimization has no one loss; leave guard.spike out")
        changes_step = options.non_finite != "stop" or (options.spike is not None and options.spike_action != "warn")
        self._at_once = changes_step or pl_module.device.type == "cpu"
        self._buffers = [torch.empty_like(buffer) for buffer in pl_module.buffers()] if changes_step else []
        self._trainer = trainer
        self._saved = trainer.global_step, datamodule(trainer).consumed

    # -- the step ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note where the stream stands; keep what a forward pass changes, as batch normalisation does."""
        self.in_step = True
        self._weight = batch["cursor"].weight
        if self._begins:
            self._starts.append(datamodule(trainer).consumed)
            if self._buffers:
                torch._foreach_copy_(self._buffers, [*pl_module.buffers()])
        self._begins = batch["cursor"].last

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add up this rank's part of the global batch's mean loss."""
        if self.options.spike is None:
            return
        part = loss.detach().float() * self._weight
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            part /= scaler.scale(torch.ones_like(part))
        self._loss = part if self._loss is None else self._loss + part

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradient, after unscaling and before clipping."""
        self._look(trainer)  # where a manual optimization has cleared its gradients without telling
        norm = trainer.strategy.gradient_norm()  # type: ignore[attr-defined]
        loss = None if self._loss is None else trainer.strategy.reduce(self._loss, reduce_op="mean")
        self._loss = None
        number = trainer.global_step + 1
        self._step = _Step(number, datamodule(trainer).consumed, norm, loss)
        if self.options.log_gradient_norm and number % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/gradient_norm", norm)
        if self._at_once:
            self._look(trainer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the step before, whose gradients are still there."""
        self._look(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many steps were skipped, once some were."""
        self.in_step = False
        if self.skipped:
            pl_module.log("guard/skipped", float(self.skipped))

    def is_healthy(self) -> bool:
        """Return whether the weights are worth keeping: asked before a checkpoint.

        Raises:
            UserError: the last step has broken them, and the run is to stop then.
        """
        if self._trainer is not None:
            self._look(self._trainer)
        return True

    # -- judgement ---------------------------------------------------------------------------------------------

    def _look(self, trainer: Trainer) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        if not math.isfinite(float(step.norm)):
            scale = trainer.strategy.loss_scaling()  # type: ignore[attr-defined]
            if scale is None or scale["scale"] <= 1:  # else fp16's scaler skips the step itself, until its scale fits
                self._act(trainer, step, self.options.non_finite, self._not_finite(trainer))
        elif step.loss is not None:
            loss = float(step.loss)
            spike = self._spike(loss)
            if math.isfinite(loss):
                self._losses.append(loss)
            if spike and not _is_short(datamodule(trainer), step.start):
                self._act(trainer, step, self.options.spike_action, spike)

    def _not_finite(self, trainer: Trainer) -> str:
        """Say which gradients are not finite, of those that this rank holds."""
        clipped = not self._at_once and trainer.gradient_clip_val  # clipping spreads it over all of them
        gradients = [] if clipped else trainer.lightning_module.named_parameters()
        names = [name for name, parameter in gradients if not _is_finite(parameter.grad)]
        if not names:
            return "the norm of the gradient is not finite"
        return f"the gradient is not finite, in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")

    def _spike(self, loss: float) -> str:
        """Say how far a loss is above the recent ones; empty if it is no spike."""
        if self.options.spike is None or len(self._losses) < _LEAST_LOSSES:
            return ""
        median = statistics.median(self._losses)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in self._losses)
        above = (loss - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)
        if above <= self.options.spike:
            return ""
        return f"the loss of {loss:.4g} is {above:.1f} deviations above {median:.4g}, the median of recent steps"

    def _act(self, trainer: Trainer, step: _Step, action: str, what: str) -> None:
        stream = datamodule(trainer)
        samples = stream.samples_between(step.start, stream.end_of_batch(step.start))
        more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
        numbers = ", ".join(map(str, samples[:_NAMED]))
        what = f"step {step.number}: {what} (samples {numbers}{more}, after {step.start:,} were consumed)"
        if action == "warn":
            self.say(f"WARNING {what}")
        elif action == "skip":
            self._skip(trainer, step, what)
        elif action == "rollback":
            self._roll_back(trainer, step, what)
        else:
            raise UserError(self._advice(what, "set guard.non_finite to skip or rollback"))

    def _skip(self, trainer: Trainer, step: _Step, what: str) -> None:
        """Leave weights, buffers and optimizer as they were before the step.

        Raises:
            UserError: too many steps were skipped.
        """
        trainer.strategy.drop_gradients()  # type: ignore[attr-defined]
        if self._buffers:
            torch._foreach_copy_([*trainer.lightning_module.buffers()], self._buffers)
        self.skipped += 1
        self._recent = [number for number in self._recent if number > step.number - _SKIPS_AMONG] + [step.number]
        if len(self._recent) > self.options.max_skips:
            skips = f"{what}; {len(self._recent)} of the last {min(step.number, _SKIPS_AMONG):,} steps were skipped"
            raise UserError(self._advice(skips, "raise guard.max_skips"))
        self.say(f"WARNING {what}: skipped")

    def _roll_back(self, trainer: Trainer, step: _Step, what: str) -> None:
        """End the attempt; the next one does not meet this batch again.

        Raises:
            RolledBack: with the samples to pass over.
            UserError: the run has gone back too often.
        """
        stream = datamodule(trainer)
        stop = stream.end_of_batch(step.start)
        start = self._back_to(stream, step.start, stop)
        if start is None:
            self._skip(trainer, step, what)  # nothing was trained since the checkpoint: that is the same
            return
        if self.rollbacks >= self.options.max_rollbacks:
            often = f"{what}; the run has gone back {self.rollbacks} times"
            raise UserError(self._advice(often, "raise guard.max_rollbacks"))
        raise RolledBack(f"{what}: back to {self._checkpoint}, without samples {start:,} to {stop:,}", start, stop)

    def _back_to(self, stream: ShardStream, bad: int, stop: int) -> int | None:
        """Return where the samples begin that are passed over, up to the batch from ``bad`` to ``stop``.

        At most the recent ones, of the epoch alone, and at least one batch of it is trained on: Lightning takes an
        epoch without a batch for the end of the training. ``None`` where that leaves nothing to pass over.
        """
        first, last = stream.epoch_around(bad)
        since = max(self._saved[1], first)
        starts = [start for start in self._starts if start >= since]
        if stop == last and starts[:1] == [since]:
            starts = starts[1:]
        return starts[0] if starts and self._saved[1] < bad else None

    @property
    def _checkpoint(self) -> str:
        step, _ = self._saved
        return checkpoint_name(step) if step else "the start"

    def _advice(self, what: str, change: str) -> str:
        return (
            f"{what}; nothing after {self._checkpoint} was kept: submit it again with a lower learning rate, or "
            f"{change}, in {self.recipe}"
        )


def _is_short(stream: ShardStream, start: int) -> bool:
    """Return whether a batch is what an epoch has left over: the loss of a few samples jumps without cause."""
    _, last = stream.epoch_around(start)
    return last - start < stream.global_batch_size // 2


def _is_finite(gradient: Tensor | None) -> bool:
    if gradient is None:
        return True
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(torch.isfinite(local).all())


_NO_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory")  # of torch's CPU allocator


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a device's, or this machine's, want of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _NO_MEMORY)
