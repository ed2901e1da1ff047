"""The process that trains a work in every way, in turns: what ``bench train`` and ``bench bert`` share.

Writes a line of JSON for each training, with its ``round``, ``way``, a step's ``wall_us`` and the most GPU ``memory``
in bytes; for a way that cannot be trained, ``left_out`` and why.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paperscale.bench.interruption_rank import Clock
from paperscale.bench.ranks import emit
from paperscale.bench.step_rank import Timed, train_run
from paperscale.bench.step_works import QUICK
from paperscale.errors import UserError
from paperscale.jobs.run import Run
from paperscale.training.memory import keep_freed_memory

Train = Callable[[int, int], dict[str, float]]
"""Trains for some steps, and some more that are timed; returns the times of one of these."""


class Ways:
    """The ways to train a work that have a run.

    Args:
        folder: of the runs.
        work: what is trained.
        device: of this process.
    """

    def __init__(self, folder: Path, work: Any, device: torch.device):
        self.folder, self.work, self.device = folder, work, device
        self.clock = Clock(device)
        self._trainings = 0

    def all(self) -> dict[str, Train]:
        """Return each way's training."""
        runs = sorted(path.parent.name for path in self.folder.glob("*/run.json"))
        return {way: partial(self.ours, way) for way in runs}

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


def take_turns(
    folder: Path, ways: Mapping[str, Train], warm_up: int, steps: int, rounds: int, device: torch.device
) -> None:
    """Train in every way, in turns; each round begins with another.

    Args:
        folder: that the lines are written to.
        ways: each way's training.
        warm_up: steps of a training before those that count.
        steps: that count.
        rounds: of every way.
        device: of this process.
    """
    ways = dict(ways)
    for way, train in list(ways.items()):  # not counted: it pays for what is compiled, and loaded late
        try:
            emit(folder, {"round": -1, "way": way, **measured(train, *QUICK, device)})
        except Exception as error:  # no memory, no compiler: the other ways can be measured all the same
            del ways[way]
            emit(folder, {"left_out": way, "reason": _reason(error)})
    for number in range(rounds):
        todo = list(ways.items())
        first = number % max(1, len(todo))
        for way, train in [*todo[first:], *todo[:first]]:
            emit(folder, {"round": number, "way": way, **measured(train, warm_up, steps, device)})


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def begin() -> torch.device:
    """Set the process up as a worker is, quietly; return its device."""
    keep_freed_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def name_of(device: torch.device) -> str:
    """Return what a device is called in a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
