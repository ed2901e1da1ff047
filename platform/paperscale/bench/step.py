"""``paperscale bench step``: what a framework adds to a training step, and what logging adds to that."""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console

from paperscale.bench.ranks import run_ranks
from paperscale.bench.report import hardware, spread
from paperscale.bench.step_works import METRICS, QUICK, WORKS, write_set
from paperscale.bench.turns import as_markdown, as_table, chosen, made_by, run_in_turns

WORLD_SIZES = (1, 2)
WAYS = {
    "bare": "bare PyTorch loop",
    "lightning-0": "Lightning, no metric",
    "lightning-5": "Lightning, 5 metrics",
    "ours-0": "Paperscale, no metric",
    "ours-5": "Paperscale, 5 metrics",
}
_FRAMEWORKS = ("lightning", "ours")
_COLUMNS = ("step", "µs/step", "times bare", "CPU µs/step", "CPU, times bare")
_METRICS_GOAL_US, _STEP_GOAL = 60.0, 1.03
_JUDGED = 5  # rounds from which on the goals are judged

Times = dict[str, list[float]]
"""Way to its microseconds of a step, round by round."""


@dataclass
class Case:
    """One work on one number of ranks.

    Attributes:
        work: name of the work.
        world_size: ranks.
        device: of the ranks.
        walls: wall time.
        cpus: CPU time of all ranks together.
    """

    work: str
    world_size: int
    device: str
    walls: Times = field(default_factory=lambda: {way: [] for way in WAYS})
    cpus: Times = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratios(self, way: str, cpu: bool = False) -> list[float]:
        """Return a way's time as a multiple of the bare loop's, round by round."""
        times = self.cpus if cpu else self.walls
        return [mine / bare for mine, bare in zip(times[way], times["bare"], strict=True)]

    def added(self, way: str) -> list[float]:
        """Return the CPU microseconds of one rank that a way adds to the bare loop's step, round by round."""
        times = zip(self.cpus[way], self.cpus["bare"], strict=True)
        return [(mine - bare) / self.world_size for mine, bare in times]

    def logging(self, framework: str) -> list[float]:
        """Return the CPU microseconds of one rank that 5 metrics add to a step, round by round."""
        few, many = (self.cpus[f"{framework}-{metrics}"] for metrics in METRICS)
        return [(b - a) / self.world_size for a, b in zip(few, many, strict=True)]


@dataclass
class Results:
    """What was measured.

    Attributes:
        rounds: of every way.
        quick: whether it was only tried.
        cases: every work on every number of ranks.
        versions: of the packages.
        day: when.
        hardware: where.
    """

    rounds: int
    quick: bool
    cases: list[Case]
    versions: dict[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    )
    day: str = field(default_factory=lambda: date.today().isoformat())
    hardware: dict[str, str] = field(default_factory=hardware)

    def case(self, work: str, world_size: int = 1) -> Case | None:
        """Return one case; ``None`` where it was not measured."""
        return next((case for case in self.cases if (case.work, case.world_size) == (work, world_size)), None)

    def goals(self) -> dict[str, tuple[float, float]]:
        """Return what was aimed at, of the cases that were measured: the most, and what was measured."""
        found = {}
        if tiny := self.case("tiny"):
            found["5 metrics, CPU µs a step (the tiny network)"] = (_METRICS_GOAL_US, median(tiny.logging("ours")))
        if resnet20 := self.case("resnet20"):
            ratio = median(resnet20.ratios("ours-5"))
            found["ResNet-20 with 5 metrics, times the bare loop"] = (_STEP_GOAL, ratio)
        return found

    @property
    def judged(self) -> bool:
        """Return whether these rounds are a measurement."""
        return self.rounds >= _JUDGED and not self.quick

    def to_json(self) -> dict[str, Any]:
        """Return everything, with each round's figures."""
        goals = {
            name: {"at_most": most, "measured": round(measured, 3), "met": measured <= most if self.judged else None}
            for name, (most, measured) in self.goals().items()
        }
        return {**asdict(self), "goals": goals}


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench step``.

    Raises:
        UserError: a work is unknown, or a rank does not get to its end.
    """
    rounds = 1 if options.quick else options.rounds
    works = chosen("work", options.works, list(WORKS))
    sizes = [int(size) for size in chosen("number of ranks", options.ranks, [str(size) for size in WORLD_SIZES])]
    total = (rounds + (not options.quick)) * len(WAYS) * len(works) * len(sizes)
    return run_in_turns(
        options, "step", total, lambda done: measure(rounds, options.quick, done, works, sizes), _show, markdown
    )


# -- the ranks -----------------------------------------------------------------------------------------------


def measure(
    rounds: int,
    quick: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    works: Sequence[str] = tuple(WORKS),
    world_sizes: Sequence[int] = WORLD_SIZES,
) -> Results:
    """Return the figures of every work, way and number of ranks.

    Args:
        rounds: of every way.
        quick: a few steps only: does it work?
        progress: called with the number of trainings that are done.
        works: some of :data:`~paperscale.bench.step_works.WORKS`.
        world_sizes: numbers of ranks.

    Raises:
        UserError: a rank does not get to its end.
    """
    cases: list[Case] = []
    for number, world_size in enumerate(world_sizes):
        before = number * (rounds + (not quick)) * len(WAYS) * len(works)
        ranks = run_ranks(
            "paperscale.bench.step_rank",
            world_size,
            [str(rounds), str(int(quick)), *works],
            threads=1,
            progress=lambda done, before=before: progress(before + done),  # type: ignore[misc]
            prepare=lambda folder, size=world_size: _prepare(folder, size, quick, works),  # type: ignore[misc]
        )
        found = {work: Case(work, world_size, ranks[0][0]["device"]) for work in works}
        for rows in zip(*ranks, strict=True):
            if rows[0]["round"] < 0:
                continue
            case, way = found[rows[0]["work"]], rows[0]["way"]
            case.walls[way].append(rows[0]["wall_us"])
            case.cpus[way].append(sum(row["cpu_us"] for row in rows))
        cases += found.values()
    return Results(rounds, quick, cases)


def _prepare(folder: Path, world_size: int, quick: bool, works: Sequence[str]) -> None:
    """Write the shards, and a run of each work with each number of metrics."""
    for work in works:
        of = WORKS[work]
        warm_up, steps = QUICK if quick else (of.warm_up, of.steps)
        batch = of.batch_size * world_size
        data = write_set(folder / "shards" / work, work, batch * (warm_up + steps + 1))
        data["init_args"].update(global_batch_size=batch, val=None)
        for metrics in METRICS:
            model = {"class_path": "paperscale.bench.step_works.Measured"}
            recipe = {"model": {**model, "init_args": {"work": work, "metrics": metrics}}, "data": data}
            write_run(folder, f"{work}-{metrics}", recipe, world_size)


def write_run(folder: Path, name: str, recipe: dict[str, Any], world_size: int = 1) -> None:
    """Write a run that a benchmark trains, as ``paperscale submit`` does."""
    from paperscale.jobs.run import Run, RunInfo, fill

    info = RunInfo(name, name, "local", "local", 1, world_size, name, time.time(), "", str(folder))
    fill(Run(folder / name), info, yaml.safe_dump({**recipe, "tracking": {"enabled": False}}))


# -- the report ----------------------------------------------------------------------------------------------


def _title(case: Case) -> str:
    ranks = "1 rank" if case.world_size == 1 else f"{case.world_size} ranks"
    return f"{WORKS[case.work].title}; {ranks}, {case.device}"


def _lines(case: Case) -> list[list[str]]:
    """Return a row for each way, the heading first."""
    rows = [list(_COLUMNS)]
    for way, title in WAYS.items():
        times = (spread(case.walls[way]), spread(case.ratios(way)))
        rows.append([title, *times, spread(case.cpus[way]), spread(case.ratios(way, cpu=True))])
    return rows


def _logging(case: Case) -> list[str]:
    """Return what is added, in a sentence, where the step is so short that it shows."""
    if case.work != "tiny":
        return []
    costs = " and ".join(f"{spread(case.logging(framework))} µs" for framework in _FRAMEWORKS)
    added = " and ".join(f"{spread(case.added(f'{framework}-0'))} µs" for framework in _FRAMEWORKS)
    return [
        f"CPU time of a rank, Lightning and Paperscale: {added} a step more than the bare loop without any metric, "
        f"and {costs} more for 5 metrics."
    ]


def _goals(results: Results) -> list[str]:
    """Return the goals in a paragraph, where one of their works was measured."""
    parts = []
    for name, (most, measured) in results.goals().items():
        verdict = ("met" if measured <= most else "not met") if results.judged else "not judged, too few rounds"
        parts.append(f"{name}: at most {most:g}, measured {measured:.3g}: {verdict}.")
    return [" ".join(["Goals.", *parts])] if parts else []


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [
        "# What a step costs beside its arithmetic",
        made_by("step", results),
        "The same network and optimizer, trained by a loop of five lines over a batch in memory, by Lightning's "
        "Trainer as it comes over the same batch in memory, and by a run of Paperscale's with all that a run has: its "
        "samples are read from shards and decoded, and the pulse, the stream's position, the agreement on a stop, "
        "progress and `metrics.jsonl` are kept. Each metric is one `self.log` in `training_step`. Figures are `median "
        f"[least..most]` of {results.rounds} rounds; in a round all ways take turns in the same processes, and ratios "
        "are taken within a round. Each rank computes on one core, and in all ways keeps the memory that it has freed, "
        "as every rank of Paperscale's does. CPU time is that of all ranks with their threads, which read and decode.",
        *_goals(results),
    ]
    for case in results.cases:
        parts += [f"## {_title(case)}", as_markdown(_lines(case)), *_logging(case)]
    return "\n\n".join(parts) + "\n"


def _show(results: Results, console: Console) -> None:
    for case in results.cases:
        table = as_table(_lines(case))
        console.print(f"[bold]{_title(case)}", table, *_logging(case), "", sep="\n", highlight=False)
    console.print(*_goals(results))
