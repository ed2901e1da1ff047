"""When a run checkpoints and stops, and how it takes up what Lightning leaves out."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed import Store

from paperscale.errors import Interrupted, Superseded, UserError, is_lost_rank, nearest
from paperscale.training.callbacks import datamodule
from paperscale.training.checkpoint import (
    RANK_FILES,
    RECIPE,
    CheckpointOptions,
    add_metrics,
    checkpoint_name,
    random_state,
    rank_file,
    read_state,
    restore_random_state,
)
from paperscale.training.interruption import StopAgreement
from paperscale.training.logbook import all_callbacks, continue_epoch, epoch_sums
from paperscale.training.metric_state import metric_state, restore_metric_state
from paperscale.training.pieces import Piece, persistent_buffers, to_write
from paperscale.training.pulse import Pulse
from paperscale.training.saving import SUPERSEDED, Files, Job, Saver
from paperscale.training.strategies.portable import STATE, PortableStrategy
from paperscale.training.tensorfile import Buffer, TensorReader, tensor_file

_LINGER_S, _LINGER_LOST_S = 60.0, 5.0
"""Seconds that an error leaves for the checkpoint that is being written; without a rank, it may never be complete."""


class Checkpointing(Checkpoint):
    """Writes verified checkpoints on schedule and before an interruption, and resumes what Lightning leaves out.

    A subclass of Lightning's ``Checkpoint`` so that it is called after the module's own ``on_train_epoch_end``.

    Args:
        folder: where checkpoints go.
        options: when to write and what to keep.
        resume: the checkpoint the run continues from.
        attempt: number of this attempt.
        pulse: this rank's, where the node's agent leaves requests.
        store: shared by the ranks; ``None`` for a single process.
        is_current: whether this attempt still owns the run; an attempt that was cut off and replaced must not write.
        is_healthy: whether the weights are worth keeping.
        say: prints a line (rank 0).
        facts: of the run, for the manifest: ``run``, ``wandb_id``, ``strategy``.
        recipe: the resolved recipe.
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        resume: Path | None = None,
        attempt: int = 1,
        pulse: Pulse | None = None,
        store: Store | None = None,
        is_current: Callable[[], bool] = lambda: True,
        is_healthy: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = print,
        facts: dict[str, str] | None = None,
        recipe: str = "",
    ):
        self.folder, self.options, self.resume = folder, options, resume
        self.attempt, self.pulse = attempt, pulse or Pulse()
        self.is_current, self.is_healthy, self.say = is_current, is_healthy, say
        self.store, self.facts, self.recipe = store, facts or {}, recipe
        self.agreement = StopAgreement(None, pulse=self.pulse)
        self.saver = Saver(folder, options.retention)
        self._buffer = Buffer()
        self._stopping = self._saving = self._reserved = False
        self._saved_step = self._validated_step = self._concluded_step = -1
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the agreement on stopping, and what has been written, between ranks."""
        if stage == "fit":
            on_gpu = trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda"
            self.agreement = StopAgreement(self.store, on_gpu, self.pulse)
            self.saver = Saver(
                self.folder,
                self.options.retention,
                trainer.global_rank,
                trainer.world_size,
                self.store if trainer.world_size > 1 else None,
                self.attempt,
                self.is_current,
                self.resume,
            )

    # -- taking up ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this rank's random numbers and metrics, and what callbacks have kept."""
        if self.resume is None:
            return
        reader = TensorReader(self.resume)
        for piece in _pieces_of_callbacks(trainer):
            if piece.name in reader:
                reader.fill(piece)
        saved = sorted(self.resume.glob(RANK_FILES))
        mine = saved[trainer.global_rank :: trainer.world_size]  # the same world size: exactly one's own
        states = [read_state(path) for path in mine]
        restore_metric_state(pl_module, [state["metrics"] for state in states])
        continue_epoch(trainer, [state["logged"] for state in states])
        if states:
            restore_random_state(states[0]["random"])
        self._saved_step = trainer.global_step

    # -- when to write and when to stop ------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checkpoint on schedule; checkpoint and stop where the ranks agreed to."""
        if not batch["cursor"].last:
            return
        if self.saver.written:
            self.finish(trainer, last=False)
        if not self._reserved:
            self.reserve(trainer)
        step = trainer.global_step
        decision = self.agreement.reached()
        self._stopping, self._saving = decision == "stop", self._saving or decision == "save"
        if takes_last_step(trainer):
            self._conclude(trainer, pl_module)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end follows, after validation: a checkpoint from here would skip it
        every = self.options.every_n_steps
        if self._stopping or self._saving or (every and step % every == 0):
            self.save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch, once the last one's metrics are logged."""
        if self._stopping:
            raise Interrupted(self.agreement.reason)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how good these weights are.

        Raises:
            UserError: ``checkpoint.monitor`` is not among what is logged.
        """
        self._validated_step = trainer.global_step
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if (monitor := self.options.monitor) and monitor not in self._metrics:
            raise UserError(
                f"checkpoint.monitor={monitor}: the validation logs {', '.join(sorted(self._metrics))}"
                f"{nearest(monitor, self._metrics) or '; use one of these'}"
            )
        if self._saved_step == trainer.global_step and not trainer.sanity_checking:  # saved before it was validated
            self.finish(trainer)
            if self._saved_step >= 0 and trainer.is_global_zero:
                add_metrics(self.folder / checkpoint_name(self._saved_step), self._metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoint at the end of an epoch, after validation; also where the training ends in the middle of one."""
        ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.should_stop and trainer.fit_loop._can_stop_early:  # early stopping: not known beforehand
            self._conclude(trainer, pl_module)
        if self._stopping or self._saving or (trainer.current_epoch + 1) % self.options.every_n_epochs == 0:
            self.save(trainer, epoch_ended=ended)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between epochs, once the finished one's metrics are logged."""
        if self._stopping:
            raise Interrupted(self.agreement.reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the finished state is kept."""
        self.save(trainer, epoch_ended=True)
        self.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the checkpoint that is being written be finished: it was made before whatever has happened."""
        self.pulse.mark("checkpoint", trainer.global_step)
        self.saver.linger(_LINGER_LOST_S if is_lost_rank(exception) else _LINGER_S)

    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``conclude(trainer, module)`` of the callbacks that have it: the weights are trained.

        That is before the last checkpoint, and before the last validation where the end is known by then.
        """
        step = trainer.global_step
        if self._concluded_step == step:
            return
        self._concluded_step = step
        hooks = [hook for callback in all_callbacks(trainer) if (hook := getattr(callback, "conclude", None))]
        for hook in hooks:
            hook(trainer, pl_module)
        if hooks and self._saved_step == step:  # it was saved as it was before
            self.finish(trainer, last=False)
            self._saved_step = -1

    # -- writing -----------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, epoch_ended: bool = False) -> None:
        """Begin to write a checkpoint on all ranks; wait until it is written where the run stops after it.

        Args:
            trainer: the trainer.
            epoch_ended: whether the metrics' epoch is over: the next one begins with empty metrics.

        Raises:
            UserError: it failed and the run is stopping or has ended, so that nothing would come after it.
            Superseded: a newer attempt of the run has started.
        """
        step, self._saving = trainer.global_step, False
        self.pulse.mark("checkpoint", step)
        self.finish(trainer, last=step == self._saved_step)  # the one before: its buffer is needed
        if step != self._saved_step and self.is_healthy():
            self.saver.start(Job(step, self._files(trainer, epoch_ended), self._facts(trainer, epoch_ended)))
            self._saved_step = step
            if self._stopping or self.options.wait:
                self.finish(trainer)
        self.pulse.mark("data")

    def finish(self, trainer: Trainer, last: bool = True) -> None:
        """Wait for the checkpoint that is being written. Where it failed, the previous one stays and training goes on.

        Args:
            trainer: the trainer.
            last: whether none follows at once.

        Raises:
            UserError: it failed, none follows, and the run is stopping or has ended.
            Superseded: a newer attempt of the run has started.
        """
        outcome = self.saver.wait()
        if outcome is None:
            return
        for problem in self.saver.left:
            self.say(f"WARNING {problem}")
        if not outcome:
            return
        step, self._saved_step = self._saved_step, -1
        if outcome == SUPERSEDED:
            raise Superseded("a newer attempt of this run has started: this one stops without writing")
        mend = "free space" if _is_full(outcome) else f"let the job write into {self.folder}"
        kept = f"the previous checkpoint is kept; {mend}, then `paperscale resume {self.folder.parent.name}`"
        message = f"checkpoint at step {step} not written: {outcome}; {kept}"
        if last and (self._stopping or trainer.fit_loop.done):
            raise UserError(message)
        self.say(f"WARNING {message}")

    def reserve(self, trainer: Trainer) -> None:
        """Have the memory for the first checkpoint handed out beside the next step; the optimizers have taken one."""
        self._reserved = True
        self._buffer.reserve(self._written(trainer))

    def _written(self, trainer: Trainer) -> list[Piece]:
        """Return the pieces that this rank writes."""
        strategy: Any = trainer.strategy
        pieces = [*strategy.parameter_pieces(), *strategy.optimizer_pieces(), *_pieces_of_callbacks(trainer)]
        buffers = strategy.buffer_pieces() if trainer.global_rank == 0 else []
        return [*to_write(pieces, trainer.global_rank, trainer.world_size), *buffers]

    def _files(self, trainer: Trainer, epoch_ended: bool) -> Files:
        """Copy what this rank writes."""
        strategy: Any = trainer.strategy
        assert isinstance(strategy, PortableStrategy)  # noqa: S101  the worker's choice
        rank = trainer.global_rank
        own = {
            "random": random_state(),
            "metrics": {} if epoch_ended else metric_state(trainer.lightning_module),
            "logged": {} if epoch_ended else epoch_sums(trainer),
        }
        files: Files = {
            tensor_file(rank): self._buffer.take(self._written(trainer)),
            rank_file(rank): [self._plain(own)],
        }
        trainer.save_checkpoint(self.folder / STATE, weights_only=False)  # kept by the strategy, written here
        if rank == 0:
            files[STATE] = [self._plain(strategy.captured or {})]
            files[RECIPE] = [self.recipe.encode()]
        strategy.captured = None
        return files

    def _plain(self, state: dict[str, Any]) -> bytes:
        """Return state as the content of a file.

        Raises:
            UserError: it could not be read again; said at the first checkpoint, not when one is needed.
        """
        if self.saver.first and (culprit := _unreadable(state)):
            raise UserError(
                f"no checkpoint can be read back with {culprit} in it; keep only numbers, strings, lists, dicts and "
                "tensors in `state_dict`, `on_save_checkpoint` and `save_hyperparameters`"
            )
        return _serialised(state)

    def _facts(self, trainer: Trainer, epoch_ended: bool) -> dict[str, Any]:
        """Return the fields of the manifest."""
        names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
        tied = trainer.lightning_module.named_parameters(remove_duplicate=False)
        return {
            "strategy": type(trainer.strategy).__name__,
            **self.facts,
            "consumed": datamodule(trainer).consumed,
            "world_size": trainer.world_size,
            "epoch": trainer.current_epoch + epoch_ended,
            "metrics": self._metrics if self._validated_step == trainer.global_step else {},
            "aliases": {name: names[id(p)] for name, p in tied if names[id(p)] != name},
            "buffers": [name for name, _ in persistent_buffers(trainer.lightning_module)],
        }


def takes_last_step(trainer: Trainer) -> bool:
    """Return whether the optimizer step that was just taken ends the training, as far as that is known beforehand."""
    loop = trainer.fit_loop
    if 0 <= loop.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop.batch_progress.is_last_batch


def _pieces_of_callbacks(trainer: Trainer) -> Iterator[Piece]:
    for callback in all_callbacks(trainer):
        yield from getattr(callback, "pieces", list)()


def _serialised(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _unreadable(state: Any) -> str:
    """Return where state holds what is not plain data, as ``key.key (type)``; empty if it does not."""
    try:
        torch.load(io.BytesIO(_serialised(state)), weights_only=True)
        return ""
    except Exception:  # whatever its classes do when they are pickled
        inner = state.items() if isinstance(state, dict) else ()
        found = ((key, _unreadable(value)) for key, value in inner)
        return next((f"{key}.{what}" if what[0] != "(" else f"{key} {what}" for key, what in found if what), "") or (
            f"({type(state).__name__})"
        )


def _is_full(outcome: str) -> bool:
    return any(os.strerror(number) in outcome for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
