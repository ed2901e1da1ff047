"""``paperscale bench checkpoint``: how long the training waits for a checkpoint, in every way of writing one."""

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

WAYS = {
    OURS: "Paperscale: a copy, then a thread",
    "wait": "Paperscale, `checkpoint.wait=true`",
    "lightning": "Lightning, `trainer.save_checkpoint`",
    "dcp": "`torch.distributed.checkpoint.async_save`",
}
_COLUMNS = (
    "way",
    "stall, ms",
    "times ours",
    "in steps",
    "the first, ms",
    "until written, s",
    "steps meanwhile",
    "memory, times the state",
)
_GOAL_STEPS = 1.0
_JUDGED = 3  # rounds from which on the goal is judged

Figures = dict[str, list[float]]
"""Name of a figure to its values, round by round."""


@dataclass
class Case:
    """One model.

    Attributes:
        work: its name.
        title: of it.
        state_mb: weights and optimizer state, 10^6 bytes.
        device: that it is trained on.
        ways: way to its figures.
    """

    work: str
    title: str
    state_mb: float
    device: str
    ways: dict[str, Figures] = field(default_factory=lambda: {way: {} for way in WAYS})

    def steps(self, way: str) -> list[float]:
        """Return how many steps long a way's stall is, round by round."""
        figures = self.ways[way]
        return [stall / step for stall, step in zip(figures["stall_ms"], figures["step_ms"], strict=True)]

    def times_ours(self, way: str) -> list[float]:
        """Return a way's stall as a multiple of ours, round by round."""
        pairs = zip(self.ways[way]["stall_ms"], self.ways[OURS]["stall_ms"], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def memory(self, way: str) -> list[float]:
        """Return by how much a checkpoint makes the process grow, as a multiple of the state."""
        return [grown / 1e6 / self.state_mb for grown in self.ways[way]["memory"]]


@dataclass
class Results:
    """What was measured.

    Attributes:
        rounds: of every way.
        cases: of each model.
        versions: of the packages.
        day: when.
        hardware: where.
    """

    rounds: int
    cases: list[Case]
    versions: dict[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    )
    day: str = field(default_factory=lambda: date.today().isoformat())
    hardware: dict[str, str] = field(default_factory=hardware)

    @property
    def met(self) -> bool | None:
        """Return whether our stall is shorter than a step with every model; ``None`` from too few rounds."""
        if self.rounds < _JUDGED:
            return None
        return all(median(case.steps(OURS)) < _GOAL_STEPS for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return everything, with each round's figures."""
        ratios = {
            case.work: {way: {"steps": case.steps(way), "times_ours": case.times_ours(way)} for way in WAYS}
            for case in self.cases
        }
        return {**asdict(self), "ratios": ratios, "goal": {"steps_below": _GOAL_STEPS, "met": self.met}}


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench checkpoint``.

    Raises:
        UserError: its process does not get to its end.
    """
    from paperscale.bench.checkpoint_rank import QUICK, WORKS

    rounds = 1 if options.quick else options.rounds
    total = rounds * len(WAYS) * len(QUICK if options.quick else WORKS)
    return run_in_turns(
        options, "checkpoint", total, lambda progress: measure(rounds, options.quick, progress), _show, markdown
    )


def measure(rounds: int, quick: bool = False, progress: Callable[[int], None] = lambda done: None) -> Results:
    """Return the figures of every way, which take turns in one process.

    Args:
        rounds: of every way.
        quick: whether a small model is enough.
        progress: called with the number of trainings that are done.

    Raises:
        UserError: the process does not get to its end.
    """
    from paperscale.bench.checkpoint_rank import QUICK, WORKS

    threads = int(hardware()["cores"])
    words = [str(rounds), str(int(quick))]
    (rows,) = run_ranks("paperscale.bench.checkpoint_rank", 1, words, threads=threads, progress=progress)
    works = QUICK if quick else WORKS
    cases = {name: Case(name, work.title, work.state_bytes / 1e6, rows[0]["device"]) for name, work in works.items()}
    for row in rows:
        figures = cases[row["work"]].ways[row["way"]]
        for name, value in row.items():
            if name not in ("work", "way", "device"):
                figures.setdefault(name, []).append(value)
    return Results(rounds, list(cases.values()))


# -- the report ----------------------------------------------------------------------------------------------


def _lines(case: Case) -> list[list[str]]:
    """Return a row for each way, the heading first."""
    rows = [list(_COLUMNS)]
    for way, title in WAYS.items():
        figures = case.ways[way]
        beside = spread(figures["slowed"]) if way in (OURS, "dcp") else ""
        rows.append(
            [
                title,
                spread(figures["stall_ms"]),
                spread(case.times_ours(way)),
                spread(case.steps(way)),
                spread(figures["first_ms"]),
                spread(figures["write_s"]),
                beside,
                spread(case.memory(way)),
            ]
        )
    return rows


def _heading(case: Case) -> str:
    step = spread([step for figures in case.ways.values() for step in figures["step_ms"]])
    return f"{case.title}: {case.state_mb:,.0f} MB of state, steps of {step} ms, {case.device}"


def _goal(results: Results) -> str:
    goal = "Goal: a training waits less than one of these steps for its checkpoint."
    if results.met is None:
        return f"{goal} Not judged: {results.rounds} rounds are too few, these figures show only that it works."
    found = "; ".join(f"{case.title} {spread(case.steps(OURS))} steps" for case in results.cases)
    return f"{goal} Measured: {found}: {'met' if results.met else 'not met'}."


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [
        "# How long a training waits for its checkpoint",
        made_by("checkpoint", results),
        "Tensors of a model's sizes, filled with random numbers, are trained by one process that computes with all "
        "cores and lets a real optimizer pass over them. In a round each way trains once, in turns and in the same "
        f"process, and writes two checkpoints; figures are `median [least..most]` of {results.rounds} rounds, ratios "
        "are taken within a round. The stall is what the training waits for the second checkpoint. The first one needs "
        "memory of the system besides, which Paperscale lets a thread ask for beforehand. `Steps meanwhile` are those "
        "until the checkpoint is written, as a multiple of a step without: the writing takes cores and memory "
        "bandwidth from them. Memory is that by which the process grows for its checkpoints.",
    ]
    for case in results.cases:
        parts += [f"## {_heading(case)}", as_markdown(_lines(case))]
    parts += [
        _goal(results),
        "The ways differ in what is there afterwards, too. Paperscale waits until the disk has every file, hashes it, "
        "and gives the checkpoint its name only then. Lightning hands one file to the system, under its name once it "
        "is whole, and neither waits for the disk nor hashes it. `async_save` waits for the disk and hashes nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _show(results: Results, console: Console) -> None:
    for case in results.cases:
        console.print(as_table(_lines(case), title=_heading(case), title_justify="left"), "", sep="\n")
    console.print(_goal(results))
