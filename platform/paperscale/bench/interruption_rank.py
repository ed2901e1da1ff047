"""One rank of ``paperscale bench interruption``: the same small training in every way, in turns.

    RANK=0 WORLD_SIZE=2 python -m paperscale.bench.interruption_rank FOLDER ROUNDS STEPS

Rank 0 leaves the port of the store in ``FOLDER/port``. Every rank writes a line of JSON for each training:
``{"way": ..., "device": ..., "wall_us": ..., "cpu_us": ...}``, times of a step.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from paperscale.bench.ranks import emit
from paperscale.jobs.environment import JobEnvironment
from paperscale.training.interruption import StopAgreement, take_over_signals

WARM_UP = 50  # steps that are not counted; the ranks then look at the pace they have chosen
_BATCH, _INPUTS, _OUTPUTS = 8, 32, 4
_LOOKS = 2000


class Batches(IterableDataset):
    """The same batch again and again: no time is spent on data.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int):
        self.steps, self.batch = steps, torch.ones(_BATCH, _INPUTS)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.batch] * self.steps)


class Small(LightningModule):
    """A network whose step is nearly all framework."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(_INPUTS, _OUTPUTS)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock:
    """Wall and CPU time of this process from one boundary to another, the device's work included.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Set the beginning."""
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, steps: int) -> dict[str, float]:
        """Return microseconds of a step."""
        self._wait()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_us": wall / steps * 1e6, "cpu_us": cpu / steps * 1e6}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Boundary(Callback):
    """Does at each step boundary what a way of agreeing does there, and times the steps.

    Args:
        clock: of the steps.
        agree: called with the step; returns whether to stop.
    """

    def __init__(self, clock: Clock, agree: Callable[[int], object]):
        self.clock, self.agree = clock, agree

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Look whether to stop."""
        if self.agree(trainer.global_step):
            trainer.should_stop = True
        if trainer.global_step == WARM_UP:
            self.clock.begin()


class Ways:
    """The ways to agree on a stop.

    Args:
        store: shared by the ranks.
        device: of the training.
        steps: counted steps of a training.
    """

    def __init__(self, store: dist.Store, device: torch.device, steps: int):
        self.store, self.device, self.steps = store, device, steps
        self.clock = Clock(device)
        self.flag = torch.zeros(1, device=device)

    def all(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Return each way's training."""
        return {
            "lightning": self.lightning,
            "none": self.none,
            "ours": self.ours,
            "flag": self.flagged,
            "bare": self.bare,
            "again": self.none,
        }

    def lightning(self) -> dict[str, float]:
        """Lightning as it comes: rank 0's flag is broadcast and read back at each step."""
        return self._fit(lambda trainer: None, lambda step: False)

    def none(self) -> dict[str, float]:
        """Lightning without any agreement."""
        return self._fit(_without_broadcast, lambda step: False)

    def ours(self) -> dict[str, float]:
        """A look at the store every half second."""
        agreement = StopAgreement(self.store, self.device.type == "cuda")
        return self._fit(take_over_signals, lambda step: agreement.reached())

    def flagged(self) -> dict[str, float]:
        """A flag of each rank, reduced and read back at each step: any rank can ask for the stop."""
        return self._fit(_without_broadcast, self._reduce_flag)

    def _reduce_flag(self, step: int) -> bool:
        self.flag.zero_()
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        return bool(self.flag.item())

    def _fit(self, prepare: Callable[[Trainer], None], agree: Callable[[int], object]) -> dict[str, float]:
        trainer = Trainer(
            accelerator=self.device.type,
            devices=dist.get_world_size(),
            strategy=DDPStrategy(),
            plugins=[JobEnvironment()],
            max_steps=WARM_UP + self.steps,
            callbacks=[Boundary(self.clock, agree)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        prepare(trainer)
        trainer.fit(Small(), DataLoader(Batches(WARM_UP + self.steps), batch_size=None))
        return self.clock.read(self.steps)

    def bare(self) -> dict[str, float]:
        """DDP in a loop of five lines, without Lightning and without any agreement."""
        module = Small().to(self.device)
        model = DistributedDataParallel(module.layer)
        optimizer = module.configure_optimizers()
        for step, batch in enumerate(Batches(WARM_UP + self.steps)):
            if step == WARM_UP:
                self.clock.begin()
            loss = model(batch.to(self.device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.clock.read(self.steps)

    def look(self) -> dict[str, float]:
        """Only looks at the store, not a training."""
        self.clock.begin()
        for _ in range(_LOOKS):
            self.store.check(["paperscale/nothing"])
        return self.clock.read(_LOOKS)


def _without_broadcast(trainer: Trainer) -> None:
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = lambda: None


def connect(folder: Path, rank: int, world_size: int) -> dist.TCPStore:
    """Return the ranks' store; rank 0 opens it on a free port."""
    port, limit = folder / "port", timedelta(seconds=60)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, True, limit, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        (folder / "new").replace(port)
        return store
    deadline = time.monotonic() + limit.total_seconds()
    while not port.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 has not left its port in {port}")
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world_size, False, limit)


def main(folder: Path, rounds: int, steps: int) -> None:
    """Train in every way, in turns; each round begins with another."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = connect(folder, rank, world_size)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size)
    where = f"{torch.cuda.get_device_name(device)}, NCCL" if on_gpu else "CPU, Gloo"
    ways = Ways(store, device, steps)
    todo = list(ways.all().items())
    ways.lightning()  # not counted: the first training of a process pays for what is loaded late
    for number in range(rounds):
        first = number % len(todo)
        for name, way in [*todo[first:], *todo[:first], ("look", ways.look)]:
            dist.barrier()
            emit(folder, {"way": name, "device": where, **way()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
