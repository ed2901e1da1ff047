"""What a run does at each step boundary: scale short batches, advance the stream, checkpoint, stop, report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed import Store

from paperscale.atomic import write_atomically
from paperscale.data import ShardStream
from paperscale.errors import Interrupted, Superseded, UserError
from paperscale.training.checkpoint import (
    CheckpointOptions,
    prune,
    publish,
    random_state,
    rank_file,
    restore_random_state,
    save_durably,
)
from paperscale.training.interruption import StopAgreement
from paperscale.training.metric_state import metric_state, restore_metric_state
from paperscale.training.pulse import Pulse


class StateIO(CheckpointIO):
    """Writes Lightning's state to the file it is given, and keeps a failure for all ranks to agree on.

    Raising on one rank would leave the others waiting in the barrier that follows.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the state durably; a failure is kept in ``error``."""
        try:
            save_durably(checkpoint, Path(path))
        except OSError as error:
            self.error = error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read the state without running code from the file."""
        return torch.load(Path(path), map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        Path(path).unlink()


class StreamPosition(Callback):
    """Advances the DataModule past each batch that was trained on, and weighs short batches exactly.

    Batches that were prepared ahead but not trained on are not counted.
    """

    def __init__(self) -> None:
        self._weight = 1.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch's weight."""
        self._weight = batch["cursor"].weight

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scale the gradient so that its mean over ranks is the mean over the global batch's samples."""
        if (weight := self._weight) != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the stream; say which samples were skipped."""
        stream = datamodule(trainer)
        for message in stream.advance(batch["cursor"]):
            print(f"WARNING sample skipped: {message}", file=sys.stderr, flush=True)
        if stream.faults.times:
            pl_module.log("data/skipped", float(len(stream.faults.times)))


def datamodule(trainer: Trainer) -> ShardStream:
    """Return the run's DataModule."""
    return trainer.datamodule  # type: ignore[attr-defined]


class Checkpointing(Checkpoint):
    """Writes verified checkpoints on schedule and before an interruption, and resumes what Lightning leaves out.

    A subclass of Lightning's ``Checkpoint`` so that it is called after the module's own ``on_train_epoch_end``.

    Args:
        folder: where checkpoints go.
        options: when to write and what to keep.
        io: the plugin that the Trainer writes with.
        resume: the checkpoint the run continues from.
        attempt: number of this attempt; what it has not finished does not get into the way of another's.
        pulse: this rank's, where the node's agent leaves requests.
        store: shared by the ranks; ``None`` for a single process.
        is_current: whether this attempt still owns the run; an attempt that was cut off and replaced must not write.
        say: prints a line (rank 0).
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        io: StateIO,
        resume: Path | None,
        attempt: int = 1,
        pulse: Pulse | None = None,
        store: Store | None = None,
        is_current: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = print,
    ):
        self.folder, self.options, self.io, self.resume = folder, options, io, resume
        self.attempt, self.pulse = attempt, pulse or Pulse()
        self.is_current, self.say = is_current, say
        self.store = store
        self.agreement = StopAgreement(None, pulse=self.pulse)
        self._stopping = self._saving = False
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the agreement on stopping between ranks."""
        if stage == "fit":
            on_gpu = trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda"
            self.agreement = StopAgreement(self.store, on_gpu, self.pulse)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this rank's random numbers and metrics."""
        if self.resume is None:
            return
        rank, world_size = trainer.global_rank, trainer.world_size
        saved = sorted(self.resume.glob("rank-*.pt"))
        mine = saved[rank::world_size]  # the same world size: exactly one's own
        states = [torch.load(path, map_location="cpu", weights_only=True) for path in mine]
        restore_metric_state(pl_module, [state["metrics"] for state in states])
        if states:
            restore_random_state(states[0]["random"])
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checkpoint on schedule; checkpoint and stop where the ranks agreed to."""
        if not batch["cursor"].last:
            return
        step = trainer.global_step
        decision = self.agreement.reached()
        self._stopping, self._saving = decision == "stop", self._saving or decision == "save"
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end follows, after validation: a checkpoint from here would skip it
        every = self.options.every_n_steps
        if self._stopping or self._saving or (every and step % every == 0):
            self.save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch, once the last one's metrics are logged."""
        if self._stopping:
            raise Interrupted(self.agreement.reason)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoint at the end of an epoch, after validation."""
        if self._stopping or self._saving or (trainer.current_epoch + 1) % self.options.every_n_epochs == 0:
            self.save(trainer, epoch_ended=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between epochs, once the finished one's metrics are logged."""
        if self._stopping:
            raise Interrupted(self.agreement.reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the finished state is kept."""
        self.save(trainer, epoch_ended=True)

    def save(self, trainer: Trainer, epoch_ended: bool = False) -> None:
        """Write a checkpoint on all ranks. Where that fails, the previous one stays and training goes on.

        Args:
            trainer: the trainer.
            epoch_ended: whether the metrics' epoch is over: the next one begins with empty metrics.

        Raises:
            UserError: it failed and the run is stopping or has ended, so that nothing would come after it.
            Superseded: a newer attempt of the run has started.
        """
        step, self._saving = trainer.global_step, False
        if step == self._saved_step:
            return
        self.pulse.mark("checkpoint", step)
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial-{self.attempt}"
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        error = self._write(trainer, partial, epoch_ended)
        error = self._publish(trainer, partial, final) if error is None else error
        if error is None:
            self._saved_step = step
            self.pulse.mark("data")
            return
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        kept = f"the previous checkpoint is kept; free space, then `paperscale resume {self.folder.parent.name}`"
        message = f"checkpoint at step {step} not written: {error}; {kept}"
        if self._stopping or trainer.fit_loop.done:
            raise UserError(message)
        self.say(f"WARNING {message}")
        self.pulse.mark("data")

    def _write(self, trainer: Trainer, partial: Path, epoch_ended: bool) -> str | None:
        """Write every rank's part; return what went wrong on any rank."""
        self.io.error = error = None
        try:
            if trainer.is_global_zero:
                partial.mkdir(exist_ok=True)
        except OSError as failure:
            error = failure
        trainer.strategy.barrier("checkpoint folder")
        trainer.save_checkpoint(partial / "state.pt", weights_only=False)
        try:
            metrics = {} if epoch_ended else metric_state(trainer.lightning_module)
            own = {"random": random_state(), "metrics": metrics}
            save_durably(own, partial / rank_file(trainer.global_rank))
        except OSError as failure:
            error = failure
        error = error or self.io.error
        written = trainer.strategy.reduce_boolean_decision(error is None, all=True)
        return None if written else str(error or "another rank could not write")

    def _publish(self, trainer: Trainer, partial: Path, final: Path) -> str | None:
        """Rename the checkpoint into place on rank 0; return what went wrong there."""
        error: str | None = None
        current = True
        if trainer.is_global_zero:
            current = self.is_current()
            try:
                if current:
                    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can have this name
                    publish(
                        partial,
                        final,
                        step=trainer.global_step,
                        consumed=datamodule(trainer).consumed,
                        world_size=trainer.world_size,
                    )
                    prune(self.folder, self.options.keep_last)
            except OSError as failure:
                error = str(failure)
        error, current = trainer.strategy.broadcast((error, current))
        if not current:
            raise Superseded("a newer attempt of this run has started: this one stops without writing")
        return error


class GlobalMetrics(Callback):
    """Makes a plain ``self.log`` in validation and test the mean over all ranks' samples, not over rank 0's.

    Lightning reduces at the end of the epoch, weighted by batch sizes; no step waits for another rank.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module's ``log`` reduce."""
        plain = LightningModule.log

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.validating or trainer.testing or trainer.sanity_checking:
                kwargs.setdefault("sync_dist", True)
            plain(pl_module, name, value, *args, **kwargs)

        if trainer.world_size > 1:
            pl_module.log = log  # type: ignore[method-assign]


_TIMED_STEPS = 5  # before a time left is told: the first steps are slow


class ProgressReport(Callback):
    """Writes ``progress.json`` every second and prints a line now and then (rank 0).

    Args:
        path: the file.
        attempt: number of this attempt.
        say: prints a line.
        every_s: seconds between printed lines.
    """

    def __init__(self, path: Path, attempt: int, say: Callable[[str], None], every_s: float = 5.0):
        self.path, self.attempt, self.say, self.every_s = path, attempt, say, every_s
        self.trained_samples = 0
        self.trained_seconds = 0.0
        self._consumed = self._first_step = 0
        self._batch_started = 0.0
        self._written = self._printed = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._batch_started = time.monotonic()
        self._consumed = datamodule(trainer).consumed
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; write and print when it is time."""
        now = time.monotonic()
        self.trained_seconds += now - self._batch_started
        self._batch_started = now
        self.trained_samples += batch["cursor"].consumed - self._consumed
        self._consumed = batch["cursor"].consumed
        if now - self._written >= 1:
            self._written = now
            self.write(trainer)
        if now - self._printed >= self.every_s:
            self._printed = now
            self.say(self.line(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput."""
        self._batch_started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end."""
        self.write(trainer)
        self.say(self.line(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write where an interruption or an error has struck."""
        self.write(trainer)

    @property
    def samples_per_s(self) -> float:
        """Return training samples a second over all ranks, in this attempt."""
        return self.trained_samples / self.trained_seconds if self.trained_seconds else 0.0

    def facts(self, trainer: Trainer) -> dict[str, Any]:
        """Return what ``progress.json`` holds."""
        loss = trainer.callback_metrics.get("train/loss")
        estimate = trainer.estimated_stepping_batches
        total = 0 if estimate == float("inf") else int(estimate)  # batches cut by tokens: not known beforehand
        steps = trainer.global_step - self._first_step
        timed = steps >= _TIMED_STEPS and total  # the first steps are slow
        left = (total - trainer.global_step) * self.trained_seconds / steps if timed else None
        return {
            "attempt": self.attempt,
            "step": trainer.global_step,
            "total_steps": total,
            "epoch": trainer.current_epoch,
            "consumed": datamodule(trainer).consumed,
            "loss": None if loss is None else float(loss),
            "samples_per_s": round(self.samples_per_s, 1),
            "eta_s": None if left is None else round(left),
            "time": time.time(),
        }

    def write(self, trainer: Trainer) -> None:
        """Write ``progress.json``; a full disk must not end the training."""
        if not trainer.is_global_zero:
            return
        try:
            write_atomically(self.path, json.dumps(self.facts(trainer)).encode())
        except OSError as error:
            self.say(f"WARNING cannot write {self.path}: {error.strerror}")

    def line(self, trainer: Trainer) -> str:
        """Return one line of progress."""
        f = self.facts(trainer)
        loss = "" if f["loss"] is None else f"  loss {f['loss']:.4f}"
        return (
            f"step {f['step']}/{f['total_steps'] or '?'}  epoch {f['epoch']}  sample {f['consumed']:,}{loss}"
            f"  {f['samples_per_s']:,.0f} samples/s" + ("" if f["eta_s"] is None else f"  {f['eta_s']} s left")
        )


class FirstBatch(Callback):
    """Records which samples an attempt began with, so that a continuation can be checked against the order.

    Args:
        record: called once with the position (samples consumed before) and the first rank-0 sample numbers.
    """

    def __init__(self, record: Callable[[int, list[int]], None]):
        self.record = record
        self._done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the first batch."""
        if not self._done:
            self._done = True
            self.record(datamodule(trainer).consumed, batch["sample"][:8].tolist() if "sample" in batch else [])


def exit_now(code: int) -> None:
    """End the process with ``code`` at once: background threads and a lost W&B service must not hold it up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log on a full disk must not change the code
            stream.flush()
    os._exit(code)
