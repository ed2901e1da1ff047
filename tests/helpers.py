"""Callbacks that recipes of the tests name, and ways to look at a run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from paperscale.jobs.run import Run
from paperscale.papers.resnet import ResNetClassifier
from paperscale.tracking.wandb import read_metrics
from paperscale.training.tensorfile import TensorReader


class SignalAt(Callback):
    """Sends this process a real signal after a step of the first attempt.

    Args:
        step: optimizer steps after which the signal is sent.
        signal: its name.
        rank: the only rank that gets it.
    """

    def __init__(self, step: int, signal: str = "SIGTERM", rank: int = 0):
        self.step, self.signal, self.rank = step, signal, rank
        self.first = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.first and trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), getattr(signal, self.signal))


class Slowly(Callback):
    """Waits after each step, so that a test can do something to a running job.

    Args:
        seconds: to wait.
        first: whether to wait in the first attempt only.
    """

    def __init__(self, seconds: float = 0.1, first: bool = False):
        self.seconds, self.first = seconds, first

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not self.first or trainer.default_root_dir.endswith("0001"):
            time.sleep(self.seconds)


class SampleLog(Callback):
    """Writes the samples of each micro-step to ``samples-<rank>.jsonl`` in the run's directory."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch["cursor"].weight:
            row = {"step": trainer.global_step, "samples": batch["sample"].tolist()}
            path = Path(trainer.default_root_dir).parents[1] / f"samples-{trainer.global_rank}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def trained_samples(run: Run) -> dict[int, list[int]]:
    """Return the samples of each step over all ranks; a step that was repeated counts once."""
    by_rank: dict[tuple[int, str], list[int]] = {}
    for path in sorted(run.path.glob("samples-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            by_rank[row["step"], path.name] = row["samples"]
    steps: dict[int, list[int]] = {}
    for (step, _), samples in sorted(by_rank.items()):
        steps.setdefault(step, []).extend(samples)
    return steps


def losses(run: Run) -> list[tuple[int, float]]:
    """Return the logged training losses, in full precision."""
    return [(row["step"], row["train/loss"]) for row in read_metrics(run.metrics) if "train/loss" in row]


def rows(run: Run) -> list[dict[str, Any]]:
    """Return all logged rows without the number of the attempt."""
    return [{k: v for k, v in row.items() if k != "attempt"} for row in read_metrics(run.metrics)]


def final_state(run: Run) -> dict[str, Any]:
    """Return the model's and the optimizer's last state."""
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    reader = TensorReader(newest)
    tensors = {name: reader.whole(name) for name in sorted(reader.tensors)}
    return {**tensors, "schedule": torch.tensor(state["lr_schedulers"][0]["last_epoch"])}


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def wait_for(condition: Any, seconds: float = 120, what: str = "") -> None:
    """Wait until ``condition()`` is true.

    Raises:
        AssertionError: it has not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.1)


class Broken(Callback):
    """Fails as a defect in a user's code does."""

    def on_train_batch_end(self, *args: Any) -> None:
        print(1 / 0)


class KillAlways(Callback):
    """Kills the process at the first step of every attempt."""

    def on_train_batch_end(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class SkewedSignal(SignalAt):
    """Sends every rank the signal, and lets each rank fall ``seconds`` behind the one before it.

    Args:
        step: optimizer steps after which the signals are sent.
        signal: their name.
        seconds: skew between ranks.
    """

    def __init__(self, step: int, signal: str, seconds: float):
        super().__init__(step, signal)
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.first and trainer.global_step == self.step - 1:
            time.sleep(self.seconds * trainer.global_rank)
            os.kill(os.getpid(), getattr(signal, self.signal))


class SignalInTest(Callback):
    """Sends the signal while the test split is scored, when training is done.

    Args:
        signal: its name.
    """

    def __init__(self, signal: str):
        self.signal = signal

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        os.kill(os.getpid(), getattr(signal, self.signal))


class Linear(torch.nn.Sequential):
    """A network without batch normalisation: its gradient is a mean over samples, however they are divided."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 8))


class Damage(Callback):
    """Makes rank 1 read a damaged shard, as a failing disk of its node would."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            data = trainer.datamodule
            tar = Path(data.paths[0]) / "train-000000.tar"
            tar.write_bytes(bytes(512 * 9) + tar.read_bytes()[512 * 9 :])
            data._sets.clear()
            for row in range(9):
                data.shards("train").read(0, row)


class PlainLog(ResNetClassifier):
    """Logs a plain number in test."""

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/mean_label", batch["label"].float().mean(), batch_size=len(batch["label"]))


class HangAt(Callback):
    """Stands still at a step of the first attempt, as a deadlock does.

    Args:
        step: optimizer steps before it.
        rank: the rank that hangs.
        where: ``forward``, or ``data`` before the batch is there.
    """

    def __init__(self, step: int, rank: int, where: str = "forward"):
        self.step, self.rank, self.where = step, rank, where

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._hang(trainer, "forward")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._hang(trainer, "data")

    def _hang(self, trainer: Trainer, where: str) -> None:
        first = trainer.default_root_dir.endswith("0001")
        if first and where == self.where and (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            (Path(trainer.default_root_dir) / "hung").touch()
            time.sleep(3600)


class SlowRank(Callback):
    """Makes one rank slow, as a node that throttles does.

    Args:
        rank: the rank.
        seconds: more for each of its steps.
    """

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


BUILT_ON: list[str] = []
"""The devices that the classifiers below were made on."""


class Noted(ResNetClassifier):
    """Notes the device of its weights."""

    def __init__(self, network: torch.nn.Module, lr: float = 0.1, classes: int = 8):
        super().__init__(network, lr, classes=classes)
        BUILT_ON.append(str(next(self.parameters()).device))


class Computing(Noted):
    """Looks at its weights in the constructor."""

    def __init__(self, network: torch.nn.Module, lr: float = 0.1, classes: int = 8):
        super().__init__(network, lr, classes)
        self.largest = float(next(self.parameters()).detach().abs().max())
