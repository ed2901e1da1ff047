"""One rank of ``paperscale bench step``: every work in every way, in turns.

    RANK=0 WORLD_SIZE=2 python -m paperscale.bench.step_rank FOLDER ROUNDS QUICK WORK...

The folder holds a run for each work and number of metrics, as ``paperscale submit`` would make it. Every rank writes a
line of JSON for each training, with its ``round``, ``work``, ``way`` and a step's ``wall_us`` and ``cpu_us``.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from paperscale.bench.interruption_rank import Clock, connect
from paperscale.bench.ranks import emit
from paperscale.bench.step_works import METRICS, QUICK, WORKS, Measured, network, sgd
from paperscale.jobs.environment import JobEnvironment
from paperscale.jobs.run import Attempt, Run
from paperscale.jobs.worker import Worker
from paperscale.training import speed
from paperscale.training.memory import keep_freed_memory
from paperscale.training.recipe import RecipeCLI
from paperscale.training.sharding import sharding


class Timed(Callback):
    """Times the steps after the first ones.

    Args:
        clock: of the steps.
        warm_up: steps before it is set.
        steps: steps until it is read.
    """

    def __init__(self, clock: Clock, warm_up: int, steps: int):
        self.clock, self.warm_up, self.steps = clock, warm_up, steps
        self.result: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Set or read the clock."""
        if trainer.global_step == self.warm_up:
            self.clock.begin()
        elif trainer.global_step == self.warm_up + self.steps:
            self.result = self.clock.read(self.steps)


def train_run(run: Run, number: int, timed: Timed, store: dist.Store | None = None) -> None:
    """Train a run from its start in this process, as its worker does, and time it.

    Args:
        run: as ``paperscale submit`` makes it.
        number: of its attempt.
        timed: says how many steps there are.
        store: shared by the ranks; ``None`` for one.
    """
    attempt = Attempt(run.path / "attempts" / f"{number:04d}")
    attempt.path.mkdir(exist_ok=True)
    worker = Worker(run, attempt)
    if worker.rank == 0:  # or the training would go on from the one before
        shutil.rmtree(run.checkpoints)
        run.checkpoints.mkdir()
    worker.choose_checkpoint()
    worker.store = store
    cli = RecipeCLI([f"--config={run.recipe}", f"--trainer.max_steps={timed.warm_up + timed.steps}"])
    speed.apply(cli.config_init.speed, cli.model)
    worker.sharding = sharding(cli.config.trainer.strategy, worker.world_size)
    trainer: Any = worker.build_trainer(cli, None)
    trainer.callbacks.append(timed)
    trainer.fit(cli.model, datamodule=cli.datamodule)


class Ways:
    """The ways to train a work.

    Args:
        folder: of the runs.
        work: one of :data:`~paperscale.bench.step_works.WORKS`.
        device: of this rank.
        store: shared by the ranks; ``None`` for one.
        quick: whether a few steps are enough.
    """

    def __init__(self, folder: Path, work: str, device: torch.device, store: dist.Store | None, quick: bool):
        self.folder, self.work, self.device, self.store = folder, work, device, store
        self.clock = Clock(device)
        self.warm_up, self.steps = QUICK if quick else (WORKS[work].warm_up, WORKS[work].steps)
        self.world_size = int(os.environ["WORLD_SIZE"])
        self._trainings = 0
        self.batch = self._prepared()

    def _prepared(self) -> dict[str, Tensor]:
        """Return one rank's batch as the shards give it, layout included."""
        data = RecipeCLI([f"--config={self._run(METRICS[0]).recipe}"]).datamodule
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        count = WORKS[self.work].batch_size
        return {name: value[:count].clone() for name, value in batch.items() if isinstance(value, Tensor)}

    def _run(self, metrics: int) -> Run:
        return Run(self.folder / f"{self.work}-{metrics}")

    def all(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Return each way's training."""
        ways: dict[str, Callable[[], dict[str, float]]] = {"bare": self.bare}
        for metrics in METRICS:
            ways[f"lightning-{metrics}"] = partial(self.lightning, metrics)
            ways[f"ours-{metrics}"] = partial(self.ours, metrics)
        return ways

    def bare(self) -> dict[str, float]:
        """A loop of five lines over batches in memory."""
        model: Any = network(self.work).to(self.device)
        model = DistributedDataParallel(model) if self.world_size > 1 else model
        optimizer = sgd(model)
        for step in range(self.warm_up + self.steps):
            if step == self.warm_up:
                self.clock.begin()
            optimizer.zero_grad()
            model({name: value.to(self.device) for name, value in self.batch.items()}).backward()
            optimizer.step()
        return self.clock.read(self.steps)

    def lightning(self, metrics: int) -> dict[str, float]:
        """Lightning's Trainer as it comes, over batches in memory."""
        timed = Timed(self.clock, self.warm_up, self.steps)
        trainer = Trainer(
            accelerator=self.device.type,
            devices=self.world_size,
            plugins=[JobEnvironment()],
            max_steps=self.warm_up + self.steps,
            callbacks=[timed],
            default_root_dir=str(self.folder / "lightning"),
        )
        data: list[Any] = [self.batch] * (self.warm_up + self.steps)
        trainer.fit(Measured(self.work, metrics), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        return timed.result

    def ours(self, metrics: int) -> dict[str, float]:
        """A run of Paperscale's: shards, position, agreement, pulse, progress, checkpoints."""
        self._trainings += 1
        store = self.store and dist.PrefixStore(f"{self.work}/{self._trainings}/", self.store)
        timed = Timed(self.clock, self.warm_up, self.steps)
        train_run(self._run(metrics), self._trainings, timed, store)
        return timed.result


def main(folder: Path, rounds: int, quick: bool, works: Sequence[str]) -> None:
    """Train works in every way, in turns; each round begins with another."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    store = None
    if world_size > 1:
        store = connect(folder, rank, world_size)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size)
    where = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    ways = {work: Ways(folder, work, device, store, quick).all() for work in works}
    for number in range(0 if quick else -1, rounds):  # round -1 is not counted: it pays for what is loaded late
        for work, trainings in ways.items():
            todo = list(trainings.items())
            first = number % len(todo)
            for way, train in [*todo[first:], *todo[:first]]:
                if store:
                    dist.barrier()
                times = train()
                emit(folder, {"round": number, "work": work, "way": way, "device": where, **times})
    if store:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
