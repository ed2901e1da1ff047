"""What a run does at each step boundary: scale short batches, advance the stream, report."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from paperscale.atomic import write_atomically
from paperscale.data import ShardStream


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
