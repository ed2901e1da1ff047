"""``paperscale bench interruption``: what it costs, at each step, that a training can be interrupted."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median
from typing import Any

from rich.console import Console

from paperscale.bench.ranks import run_ranks
from paperscale.bench.report import OURS, hardware, spread
from paperscale.bench.turns import as_markdown, as_table, made_by, run_in_turns

WORLD_SIZE = 2
_NONE, _LOOK = "none", "look"
WAYS = {
    "lightning": "Lightning as it comes, a broadcast",
    _NONE: "Lightning without its broadcast",
    "again": "the same again: the noise",
    OURS: "Paperscale, a look at the store",
    "flag": "Lightning, an all-reduce of a flag",
    "bare": "bare DDP loop",
    _LOOK: "the look alone",
}
_COLUMNS = ("at each step", "µs/step", "times none", "CPU µs/step", "CPU, times none")
_GOAL = 1.05
_STEP_MS = 100  # a short step of a training worth a cluster
_JUDGED = 5  # rounds from which on the goal is judged


@dataclass
class Results:
    """What was measured.

    Attributes:
        rounds: of every way.
        steps: counted in each.
        device: of the ranks, with what connects them.
        walls: way to its microseconds of a step, round by round.
        cpus: the same, CPU time of both ranks together.
        versions: of the packages.
        day: when.
        hardware: where.
    """

    rounds: int
    steps: int
    device: str
    walls: dict[str, list[float]]
    cpus: dict[str, list[float]]
    versions: dict[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    )
    day: str = field(default_factory=lambda: date.today().isoformat())
    hardware: dict[str, str] = field(default_factory=hardware)

    def ratios(self, way: str, cpu: bool = False) -> list[float]:
        """Return a way's cost as a multiple of no agreement's, round by round."""
        times = self.cpus if cpu else self.walls
        return [mine / none for mine, none in zip(times[way], times[_NONE], strict=True)]

    def added(self, way: str) -> float:
        """Return the microseconds that a way adds to a step without agreement: the median of the rounds."""
        return median(mine - none for mine, none in zip(self.walls[way], self.walls[_NONE], strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return everything, with each round's figures."""
        ways = [way for way in WAYS if way != _LOOK]
        ratios = {way: round(median(self.ratios(way)), 4) for way in ways}
        added = {way: round(self.added(way), 1) for way in ways}
        return {**asdict(self), "times_none": ratios, "added_us": added, "goal": {"at_most": _GOAL, "met": self.met}}

    @property
    def met(self) -> bool | None:
        """Return whether ours costs at most a twentieth more than no agreement; ``None`` from too few rounds."""
        return median(self.ratios(OURS)) <= _GOAL if self.rounds >= _JUDGED else None


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench interruption``.

    Raises:
        UserError: a rank does not get to its end.
    """
    rounds, steps = (1, 20) if options.quick else (options.rounds, options.steps)
    return run_in_turns(
        options,
        "interruption",
        rounds * len(WAYS),
        lambda progress: measure(rounds, steps, progress),
        _show,
        markdown,
    )


# -- the ranks -----------------------------------------------------------------------------------------------


def measure(rounds: int, steps: int, progress: Callable[[int], None] = lambda done: None) -> Results:
    """Return the figures of every way, which take turns in the same processes.

    Args:
        rounds: of every way.
        steps: counted in each.
        progress: called with the number of trainings that are done.

    Raises:
        UserError: a rank does not get to its end.
    """
    module = "paperscale.bench.interruption_rank"
    rows = run_ranks(module, WORLD_SIZE, [str(rounds), str(steps)], threads=1, progress=progress)
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    cpus: dict[str, list[float]] = {way: [] for way in WAYS}
    for row in zip(*rows, strict=True):
        walls[row[0]["way"]].append(row[0]["wall_us"])
        cpus[row[0]["way"]].append(sum(rank["cpu_us"] for rank in row))
    return Results(rounds, steps, rows[0][0]["device"], walls, cpus)


# -- the report ----------------------------------------------------------------------------------------------


def _lines(results: Results) -> list[list[str]]:
    """Return a row for each way, the heading first."""
    rows = [list(_COLUMNS)]
    for way, title in WAYS.items():
        compared = way != _LOOK
        wall, cpu = spread(results.walls[way]), spread(results.cpus[way])
        wall_ratio, cpu_ratio = (spread(results.ratios(way, cpu)) if compared else "" for cpu in (False, True))
        rows.append([title, wall, wall_ratio, cpu, cpu_ratio])
    return rows


def _goal(results: Results) -> str:
    goal = f"Goal: ours at most {_GOAL} times a step without any agreement."
    if results.met is None:
        return f"{goal} Not judged: {results.rounds} rounds are too few, these figures show only that it works."
    return f"{goal} Measured {spread(results.ratios(OURS))}: {'met' if results.met else 'not met'}."


def _in_practice(results: Results) -> str:
    """Return what is added as a part of a step that is not the shortest there can be."""
    ours, broadcast = results.added(OURS), results.added("lightning")
    shares = f"{ours / _STEP_MS / 10:.2f} % and {broadcast / _STEP_MS / 10:.2f} %"
    return (
        f"Ours adds {ours:,.0f} µs to a step (the look alone takes {median(results.walls[_LOOK]):.0f} µs), Lightning's "
        f"broadcast adds {broadcast:,.0f} µs. Of a step of {_STEP_MS} ms that would be {shares}."
    )


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [
        "# What it costs that a training can be interrupted",
        made_by("interruption", results),
        f"A network of one layer (32 to 4, batches of 8) is trained by {WORLD_SIZE} processes ({results.device}) on "
        "this machine: the step is as short as a step can be, so that what is added to it shows. Figures are "
        f"`median [least..most]` of {results.rounds} rounds of {results.steps} steps. In a round all ways take turns "
        "in the same processes, and ratios are taken within a round; the way that is there twice shows how far to "
        "trust them. CPU time is that of all processes together.",
        as_markdown(_lines(results)),
        _goal(results),
        _in_practice(results),
        "The ways differ in what they can do, too. Lightning broadcasts rank 0's flag and reads it back: a signal that "
        "reaches another rank alone is not heard, and on a GPU the host waits for the device at every step. An "
        "all-reduce hears every rank, and waits as well. The look at the store hears every rank, and needs neither a "
        "collective nor a wait.",
    ]
    return "\n\n".join(parts) + "\n"


def _show(results: Results, console: Console) -> None:
    console.print(as_table(_lines(results)), "", _goal(results), sep="\n")
