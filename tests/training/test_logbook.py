"""What is logged through the logbook is what Lightning would have logged, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from paperscale.training.lean import NoProfiler, make_lean
from paperscale.training.logbook import Logbook, continue_epoch, epoch_sums

STEPS = 7  # of an epoch; the last batch is short


class Rows(DummyLogger):
    """Keeps the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


class Everything(LightningModule):
    """Logs in all the ways that Lightning documents."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.seen = SumMetric()
        self.pair = MetricCollection({"a": MeanMetric(), "b": SumMetric()})
        self.running = torch.tensor(0.5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch) * self.scale).square().mean()
        self.log("loss", loss)
        self.log("scale", self.scale)  # changed in place by the optimizer before the row is written
        self.running.mul_(0.9)
        self.log("running", self.running, on_step=True, on_epoch=True, batch_size=len(batch))
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log("bar", loss, prog_bar=True)
        self.log("half", loss.detach().half(), on_epoch=True)
        for reduce in ("min", "max", "sum"):
            self.log(reduce, loss.detach(), on_step=False, on_epoch=True, reduce_fx=reduce)
        self.log("number", 3 * batch_idx)
        self.log_dict({"d/one": 0.1 * batch_idx, "d/two": loss}, on_epoch=True)
        self.seen.update(len(batch))
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.pair(loss.detach())
        self.log_dict(self.pair, on_step=True, on_epoch=True)
        if batch_idx % 3 == 0:
            self.log("seldom", loss.detach() + batch_idx)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("after", float(batch_idx))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "monitor": "loss"}}


class Reader(Callback):
    """Reads what others may read at any time, and logs."""

    def __init__(self) -> None:
        self.read: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.log("from_callback", pl_module.layer.weight.grad.norm())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.read.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_epoch_end = on_train_batch_end


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4 if number < STEPS - 1 else 2, 3, generator=generator) for number in range(STEPS)]


def trained(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    module, rows, reader = module or Everything(), Rows(), Reader()
    stop = EarlyStopping("mean_epoch", patience=100, check_on_train_epoch_end=True)
    settings = {"max_epochs": 3, "log_every_n_steps": 3, "val_check_interval": 3, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=rows,
        callbacks=[reader, stop, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    make_lean(callbacks, module)
    loader: Any = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    return rows.rows, reader.read, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"max_epochs": -1, "max_steps": 12}])
def test_rows_and_what_callbacks_read_are_lightnings_own(options):
    assert trained(Logbook(), **options) == trained(**options)
    assert trained(Logbook(), profiler=NoProfiler(), **options) == trained(**options)


def test_lightning_is_asked_once_an_epoch_for_each_name():
    class Counted(Everything):
        calls = 0

        def log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
            Counted.calls += 1
            super().log(name, value, *arguments, **options)

    names = 18  # of a step, with the callback's
    trained(Logbook(), module=Counted(), limit_val_batches=0, max_epochs=1)
    assert Counted.calls == names
    trained(Logbook(), module=Counted(), limit_val_batches=0, max_epochs=3)
    assert Counted.calls == names + 3 * names


def test_a_mistake_is_lightnings_error_at_the_call():
    class Twice(Everything):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.layer(batch).mean()
            self.log("loss", loss)
            self.log("loss", loss, on_epoch=batch_idx > 1)
            return loss

    class Wide(Everything):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.layer(batch)
            self.log("loss", loss.mean() if batch_idx < 2 else loss)
            return loss.mean()

    with pytest.raises(MisconfigurationException, match="twice in `training_step` with different arguments"):
        trained(Logbook(), module=Twice())
    with pytest.raises(ValueError, match="the tensor must have a single element"):
        trained(Logbook(), module=Wide())


def test_an_epochs_mean_survives_an_interruption():
    class Cut(Callback):
        """Takes the sums away in the middle of an epoch, as a new process would, and gives them back."""

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 4:
                sums = {key: dict(value) for key, value in epoch_sums(trainer).items()}
                results: Any = trainer.fit_loop.epoch_loop._results
                for key in sums:
                    results[key].reset()
                assert {key.split(".")[-1] for key in sums} >= {"mean", "min", "max", "sum", "d/one"}
                continue_epoch(trainer, [sums])

    rows, _, _ = trained(Cut(), Logbook())
    whole, _, _ = trained()
    assert rows == whole


_FAULTS = """
import resource
from paperscale.training.memory import keep_freed_memory
if {keep}: keep_freed_memory()
def step():
    for _ in range(30): [b"1" * (1 << 22) for _ in range(4)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_a_step_frees_is_there_for_the_next():
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults(keep=True) < faults(keep=False) / 10
