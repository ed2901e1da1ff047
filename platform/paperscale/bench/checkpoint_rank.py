"""The process of ``paperscale bench checkpoint``: one model, trained and saved in every way, in turns.

    RANK=0 python -m paperscale.bench.checkpoint_rank FOLDER ROUNDS QUICK

Writes a line of JSON for each training: ``{"work": ..., "way": ..., "device": ..., "step_ms": ..., "first_ms": ...,
"stall_ms": ..., "slowed": ..., "write_s": ..., "memory": ...}``, as :class:`Watch` has measured it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paperscale.bench.meters import Growth
from paperscale.bench.ranks import emit
from paperscale.training.checkpoint import CheckpointOptions
from paperscale.training.checkpointing import Checkpointing
from paperscale.training.strategies.single import SingleStrategy

_PLAIN = 4  # steps before a checkpoint, the first of which is not counted
_MOST = 60  # steps in which a checkpoint must be written


@dataclass(frozen=True)
class Work:
    """A model by its size.

    Attributes:
        title: of it.
        tensors: parameters.
        elements: of each.
        optimizer: makes its optimizer.
        states: of the optimizer for each parameter.
        products: of two matrices of 1,024 rows and columns that stand for forward and backward pass.
    """

    title: str
    tensors: int
    elements: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    states: int
    products: int

    @property
    def state_bytes(self) -> int:
        """Return the size of weights and optimizer state, in float32."""
        return 4 * self.tensors * self.elements * (1 + self.states)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-9)


WORKS = {
    "resnet50": Work("ResNet-50, SGD with momentum", 161, 25_557_032 // 161, _sgd, 1, 10),
    "bert-base": Work("BERT-base, AdamW", 199, 109_482_240 // 199, _adamw, 2, 10),
}
QUICK = {"small": Work("a small model, AdamW", 20, 50_000, _adamw, 2, 1)}


class Sized(LightningModule):
    """Parameters of a model's size, and a step of about the length of a short one of it.

    Args:
        work: the size.
    """

    def __init__(self, work: Work):
        super().__init__()
        self.automatic_optimization = False
        self.weights = nn.ParameterList([torch.randn(work.elements) for _ in range(work.tensors)])
        self.products = work.products
        self.register_buffer("matrix", torch.randn(1024, 1024), persistent=False)

    def prepare(self, work: Work) -> None:
        """Make the optimizer and its state, where the weights are now."""
        for weight in self.weights:
            weight.grad = torch.full_like(weight, 1e-3)
        self.optimizer = work.optimizer(self.weights)
        self.optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, the same in every training."""
        return self.optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Compute for a while, and let the optimizer pass over all there is."""
        matrix: Any = self.matrix
        for _ in range(self.products):
            torch.mm(matrix, matrix)
        self.optimizers().step()  # type: ignore[union-attr]


class Nothing(LightningDataModule):
    """Batches of nothing: no time is spent on data."""

    consumed = 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return as many as a training takes at the most."""
        return DataLoader(torch.zeros(_MOST, 1))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Way:
    """A way to write checkpoints.

    Attributes:
        strategy: of the training.
        begin: begins to write into a folder; what it takes is the stall.
        done: whether it is on the disk.
        prepare: called after the first step.
    """

    strategy: Strategy
    begin: Callable[[Trainer, Path], None]
    done: Callable[[], bool]
    prepare: Callable[[Trainer], None] = lambda trainer: None


class Watch(Callback):
    """Writes two checkpoints in a training, and measures what they cost it.

    The first one takes its memory from the system; the second has it already, as all later ones of a run have.

    Args:
        way: how.
        folder: where.
    """

    def __init__(self, way: Way, folder: Path):
        self.way, self.folder = way, folder
        self.stalls: list[float] = []
        self.plain: list[float] = []
        self.beside: list[float] = []
        self.writes: list[float] = []
        self.memory, self._growth = 0, Growth()
        self._step = 0

    def on_train_batch_start(self, *args: Any) -> None:
        """Set the clock."""
        self._began, self._writing = time.perf_counter(), not self.way.done()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Read the clock; begin to write when there have been steps without it."""
        _synchronise()
        took = time.perf_counter() - self._began
        self._step += 1
        if self._writing:
            self.beside.append(took)
            if self.way.done():
                self._written()
        elif self._step > 1:
            self.plain.append(took)
        elif not self.stalls:
            self.way.prepare(trainer)
        if self._step == _PLAIN:
            if len(self.stalls) == 2:
                trainer.should_stop = True
            else:
                self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._started = time.perf_counter()
        self.way.begin(trainer, self.folder / f"{len(self.stalls)}")
        _synchronise()
        self.stalls.append(time.perf_counter() - self._started)
        if self.way.done():
            self._written()

    def _written(self) -> None:
        self.writes.append(time.perf_counter() - self._started)
        self.memory = self._growth.read()
        self._step = 0

    def result(self) -> dict[str, float]:
        """Return what was measured."""
        step = median(self.plain)
        return {
            "step_ms": 1e3 * step,
            "first_ms": 1e3 * self.stalls[0],
            "stall_ms": 1e3 * self.stalls[1],
            "slowed": mean(self.beside) / step if self.beside else 1.0,
            "write_s": self.writes[1],
            "memory": self.memory,
        }


# -- the ways ------------------------------------------------------------------------------------------------


def ours(device: torch.device, folder: Path, wait: bool = False) -> Way:
    """A copy on the step path, all else in a thread; or all of it on the step path."""
    saving = Checkpointing(folder, CheckpointOptions(wait=wait), recipe="none")

    return Way(
        SingleStrategy(device=device),
        lambda trainer, path: saving.save(trainer),
        lambda: not saving.saver.writing,
        saving.reserve,
    )


def lightning(device: torch.device, folder: Path) -> Way:
    """What Lightning's ``ModelCheckpoint`` does."""
    return Way(SingleDeviceStrategy(device=device), lambda trainer, path: trainer.save_checkpoint(path), lambda: True)


def distributed(device: torch.device, folder: Path) -> Way:
    """``torch.distributed.checkpoint.async_save`` of the same state."""
    pending: list[Any] = []

    def begin(trainer: Any, path: Path) -> None:
        module, (optimizer,) = trainer.lightning_module, trainer.optimizers
        state = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
        pending[:] = [dcp.async_save(state, checkpoint_id=path)]

    return Way(SingleDeviceStrategy(device=device), begin, lambda: not pending or pending[0].done())


MAKE: dict[str, Callable[[torch.device, Path], Way]] = {
    "ours": ours,
    "wait": lambda device, folder: ours(device, folder, wait=True),
    "lightning": lightning,
    "dcp": distributed,
}


def train(model: Sized, way: Way, device: torch.device, folder: Path) -> dict[str, float]:
    """Train in one way; return what its checkpoints cost."""
    watch = Watch(way, folder)
    trainer = Trainer(
        accelerator=device.type,
        devices=1,
        strategy=way.strategy,
        max_steps=_MOST,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Nothing())
    return watch.result()


def _give_back() -> None:
    """Return what is free to the system, so that the next way's growth is its own."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # not on every system
        ctypes.CDLL(None).malloc_trim(0)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(folder: Path, rounds: int, quick: bool) -> None:
    """Train every model in every way, in turns; each round begins with another."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for name, work in (QUICK if quick else WORKS).items():
        model = Sized(work).to(device)
        model.prepare(work)
        for number in range(rounds):
            ways = list(MAKE.items())
            for way, make in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
                (into := folder / "written").mkdir()
                result = train(model, make(device, into), device, into)
                shutil.rmtree(into)
                _give_back()
                emit(folder, {"work": name, "way": way, "device": where, **result})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
