"""One training in several ways: what is kept of each, and what was aimed at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar

from paperscale.bench.ranks import run_ranks
from paperscale.bench.report import hardware

JUDGED = 3
"""Rounds from which on goals are judged."""
_LIMIT_S = 300.0  # of a training: the first one compiles


@dataclass(kw_only=True)
class Case:
    """One work.

    Attributes:
        work: what is trained.
        device: that it is trained on.
        amount: images or tokens of a step.
        per_s: way to its images or tokens a second, round by round.
        memory: way to the most memory of the GPU that was in use, in bytes, round by round.
        left_out: ways that could not be trained, and why.
    """

    work: Any
    device: str
    amount: float
    per_s: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Take in a line of the process."""
        if "left_out" in row:
            self.left_out[row["left_out"]] = row["reason"]
        elif row["round"] >= 0:
            way = row["way"]
            self.per_s.setdefault(way, []).append(1e6 * self.amount / row["wall_us"])
            if row["memory"] is not None:
                self.memory.setdefault(way, []).append(row["memory"])

    def ratios(self, way: str, other: str) -> list[float]:
        """Return a way's speed as a multiple of another's, round by round; empty where one is left out."""
        if {way, other} - self.per_s.keys():
            return []
        return [mine / theirs for mine, theirs in zip(self.per_s[way], self.per_s[other], strict=True)]

    def gibibytes(self, way: str) -> list[float]:
        """Return the most memory that was in use, in GiB, round by round; empty on a CPU."""
        return [used / 2**30 for used in self.memory.get(way, [])]

    def left_out_lines(self, titles: dict[str, str]) -> list[str]:
        """Return a sentence for each way that could not be trained."""
        return [f"Left out: {titles[way]}, {reason}." for way, reason in self.left_out.items()]


class Goal(NamedTuple):
    """What was aimed at.

    Attributes:
        least: the least.
        measured: in the worst case; ``None`` for nothing.
    """

    least: float
    measured: float | None


def worst(least: float, figures: Sequence[Sequence[float]]) -> Goal:
    """Return a goal for the medians of every case's rounds; a case that has none does not count."""
    medians = [median(rounds) for rounds in figures if rounds]
    return Goal(least, round(min(medians), 3) if medians else None)


@dataclass(kw_only=True)
class Results:
    """What was measured.

    Attributes:
        rounds: of every way.
        quick: whether it was only tried.
        cases: every work.
        versions: of what computes.
        day: when.
        hardware: where.
    """

    rounds: int
    quick: bool
    cases: list[Any]
    versions: dict[str, str]
    day: str = field(default_factory=lambda: date.today().isoformat())
    hardware: dict[str, str] = field(default_factory=hardware)

    def goals(self) -> dict[str, Goal]:
        """Return what was aimed at, by name."""
        raise NotImplementedError

    @property
    def on_gpu(self) -> bool:
        """Return whether a GPU was measured."""
        return all(case.device != "CPU" for case in self.cases)

    @property
    def not_judged(self) -> str:
        """Return why these rounds are no measurement of what the goals are for; empty where they are."""
        return "too few rounds" if self.rounds < JUDGED or self.quick else ""

    def to_json(self) -> dict[str, Any]:
        """Return everything, with each round's figures."""
        goals = {
            name: {
                "at_least": goal.least,
                "measured": goal.measured,
                "met": None if goal.measured is None or self.not_judged else goal.measured >= goal.least,
            }
            for name, goal in self.goals().items()
        }
        return {**asdict(self), "goals": goals}

    def goals_in_words(self) -> str:
        """Return the goals, and whether they are met, as a paragraph."""
        parts = []
        for name, (least, measured) in self.goals().items():
            if measured is None:
                parts.append(f"{name}: at least {least:g}, not measured.")
                continue
            verdict = f"not judged: {self.not_judged}" if self.not_judged else "met" if measured >= least else "not met"
            parts.append(f"{name}: at least {least:g}, measured {measured:g} in the worst case: {verdict}.")
        return "Goals. " + " ".join(parts)


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What is measured: every work in a process of its own, in which the ways take turns.

    Attributes:
        module: of the process: ``python -m MODULE FOLDER WORK ROUNDS``, see :mod:`paperscale.bench.trainings_rank`.
        works: have ``to_json``.
        ways: of the trainings.
        rounds: of every way.
        case: makes a case of a work and the facts that the process begins with.
        write_set: writes the set that all train on into a folder; returns what it is.
        write_runs: writes the runs of a work into a folder; is given the set's too.
    """

    module: str
    works: Sequence[Any]
    ways: Sequence[str]
    rounds: int
    case: Callable[..., C]
    write_set: Callable[[Path], str]
    write_runs: Callable[[Path, Any, Path], None]

    @property
    def lines(self) -> int:
        """Return the lines that all processes write."""
        return len(self.works) * self._lines_of_work

    @property
    def _lines_of_work(self) -> int:
        return 1 + (1 + self.rounds) * len(self.ways)

    def measure(self, progress: Callable[[int], None]) -> tuple[list[C], str]:
        """Return a case of each work, and what the set is.

        Args:
            progress: called with the number of lines that are there.

        Raises:
            UserError: a process does not get to its end.
        """
        with tempfile.TemporaryDirectory(prefix="paperscale-bench-") as folder:
            shards = Path(folder) / "set"
            what = self.write_set(shards)
            return [self._measured(number, shards, progress) for number in range(len(self.works))], what

    def _measured(self, number: int, shards: Path, progress: Callable[[int], None]) -> C:
        work, before = self.works[number], number * self._lines_of_work
        ((facts, *rows),) = run_ranks(
            self.module,
            1,
            [work.to_json(), str(self.rounds)],
            threads=int(hardware()["cores"]),
            progress=lambda done: progress(before + done),
            prepare=lambda into: self.write_runs(into, work, shards),
            limit_s=_LIMIT_S,
        )
        case = self.case(work=work, **facts)
        for row in rows:
            case.add(row)
        return case
