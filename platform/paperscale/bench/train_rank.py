"""The process of ``paperscale bench train``: one network at one batch size, trained in every way, in turns.

    RANK=0 WORLD_SIZE=1 python -m paperscale.bench.train_rank FOLDER WORK ROUNDS

The folder holds a run for each of our ways. Writes a line of JSON for each training, with its ``round``, ``way``, a
step's ``wall_us`` and the most GPU ``memory`` in bytes; for a way that cannot be trained, ``left_out`` and why.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from paperscale.bench.interruption_rank import Clock
from paperscale.bench.ranks import emit
from paperscale.bench.step_rank import Timed, train_run
from paperscale.bench.step_works import QUICK
from paperscale.bench.train_works import SGD, Work, images_on, reference
from paperscale.jobs.run import Run
from paperscale.training.memory import keep_freed_memory

Train = Callable[[int, int], dict[str, float]]
"""Trains for some steps, and some more that are timed; returns the times of one of these."""


class Ways:
    """The ways to train a work.

    Args:
        folder: of the runs.
        work: what is trained.
        device: of this process.
    """

    def __init__(self, folder: Path, work: Work, device: torch.device):
        self.folder, self.work, self.device = folder, work, device
        self.clock = Clock(device)
        self._trainings = 0

    def all(self) -> dict[str, Train]:
        """Return each way's training: the hand-written loop, and those that have a run."""
        runs = sorted(path.parent.name for path in self.folder.glob("*/run.json"))
        return {"bare": self.bare, **{way: partial(self.ours, way) for way in runs}}

    def bare(self, warm_up: int, steps: int) -> dict[str, float]:
        """A hand-written loop over one batch on the device."""
        network = reference(self.work.depth)[0].to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), **SGD, fused=True)
        batch = images_on(self.device, self.work.batch_size, self.work.side)
        mixed = self.work.precision == "bf16-mixed"
        for step in range(warm_up + steps):
            if step == warm_up:
                self.clock.begin()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                loss = F.cross_entropy(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
        return self.clock.read(steps)

    def ours(self, way: str, warm_up: int, steps: int) -> dict[str, float]:
        """A run of Paperscale's."""
        self._trainings += 1
        timed = Timed(self.clock, warm_up, steps)
        train_run(Run(self.folder / way), self._trainings, timed)
        return timed.result


def measured(train: Train, warm_up: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Return a step's wall time in microseconds, and the most memory of the GPU that was in use, in bytes."""
    gc.collect()  # the training before this one
    if device.type != "cuda":
        return {"wall_us": train(warm_up, steps)["wall_us"], "memory": None}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    wall = train(warm_up, steps)["wall_us"]
    return {"wall_us": wall, "memory": torch.cuda.max_memory_allocated(device)}


def main(folder: Path, work: Work, rounds: int) -> None:
    """Train in every way, in turns; each round begins with another."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.benchmark = True  # in all ways
    ways = Ways(folder, work, device).all()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    emit(folder, {"device": where, "reference": reference(work.depth)[1]})
    for way, train in list(ways.items()):  # not counted: it pays for what is compiled, and loaded late
        try:
            emit(folder, {"round": -1, "way": way, **measured(train, *QUICK, device)})
        except Exception as error:  # no memory, no compiler: the other ways can be measured all the same
            del ways[way]
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            emit(folder, {"left_out": way, "reason": f"{type(error).__name__}: {reason}"})
    for number in range(rounds):
        todo = list(ways.items())
        first = number % max(1, len(todo))
        for way, train in [*todo[first:], *todo[:first]]:
            row = measured(train, work.warm_up, work.steps, device)
            emit(folder, {"round": number, "way": way, **row})


if __name__ == "__main__":
    keep_freed_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main(Path(sys.argv[1]), Work(**json.loads(sys.argv[2])), int(sys.argv[3]))
