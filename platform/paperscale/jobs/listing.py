"""``paperscale runs``: which runs there are, filtered and sorted; quick for ten thousand."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from paperscale.errors import UserError, nearest
from paperscale.jobs.run import Run, RunInfo, dated_runs
from paperscale.jobs.status import STATES, Facts, RunStatus, read_all, statuses
from paperscale.jobs.words import ago, since


@dataclass(frozen=True)
class Row:
    """A run as it is listed."""

    run: Run
    info: RunInfo
    status: RunStatus

    def to_json(self) -> dict[str, Any]:
        """Return what ``paperscale runs --json`` prints of it."""
        info, progress = self.info, self.status.progress
        return {
            "name": self.run.name,
            "state": self.status.state,
            "detail": self.status.detail,
            "recipe": info.recipe,
            "cluster": info.cluster,
            "nodes": info.nodes,
            "procs_per_node": info.procs_per_node,
            "group": info.group,
            "created": info.created,
            "job": self.run.job,
            "attempts": self.run.attempt_count,
            "step": progress.get("step"),
            "total_steps": progress.get("total_steps"),
            "epoch": progress.get("epoch"),
            "loss": progress.get("loss"),
            "samples_per_s": progress.get("samples_per_s"),
            "eta_s": (progress.get("eta_s") or None) if self.status.state == "running" else None,
            "time": progress.get("time"),
            "results": self.status.results,
            "directory": str(self.run.path),
        }

    @property
    def outcome(self) -> str:
        """Return the results on the test split, or why the run is as it is."""
        results = self.status.results
        return ", ".join(f"{k} {v:.4f}" for k, v in results.items() if k.startswith("test/")) or self.status.detail

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table, see :data:`COLUMNS`."""
        info, progress = self.info, self.status.progress
        loss = progress.get("loss")
        return (
            self.run.name,
            self.status.state,
            f"{info.cluster} {info.nodes}x{info.procs_per_node}",
            str(self.run.attempt_count),
            f"{progress['step']}/{progress['total_steps'] or '?'}" if progress else "-",
            "-" if loss is None else f"{loss:.4g}",
            ago(info.created),
            self.outcome,
        )


COLUMNS = ("run", "state", "cluster", "attempts", "step", "loss", "created", "result or reason")

SORTS: dict[str, tuple[Callable[[Row], Any], bool]] = {  # key, and whether the largest comes first
    "created": (lambda row: row.info.created, True),
    "name": (lambda row: row.run.name, False),
    "recipe": (lambda row: row.info.recipe, False),
    "cluster": (lambda row: row.info.cluster, False),
    "state": (lambda row: STATES.index(row.status.state), False),
    "attempts": (lambda row: row.run.attempt_count, True),
    "step": (lambda row: row.status.progress.get("step", -1), True),
    "loss": (lambda row: _or_infinity(row.status.progress.get("loss")), False),
}


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Wanted:
    """Which runs to list.

    Attributes:
        pattern: of the name: a glob, or a part of it; empty for all.
        states: any of these; empty for all.
        cluster: name of the profile; empty for all.
        group: name of the sweep; empty for all.
        recipe: name of the recipe; empty for all.
        since: created within this long (``2d``) or since this date; empty for ever.
        sort: a column, or ``created`` or ``recipe``; or a result, such as ``val/accuracy``, the best first.
        reverse: turn the order round.
        limit: at most this many; ``None`` for all.
    """

    pattern: str = ""
    states: tuple[str, ...] = ()
    cluster: str = ""
    group: str = ""
    recipe: str = ""
    since: str = ""
    sort: str = "created"
    reverse: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.sort not in SORTS and "/" not in self.sort:
            hint = nearest(self.sort, SORTS) or f"; use {', '.join(SORTS)}"
            raise UserError(f"--sort {self.sort}: no column, and no result such as val/accuracy{hint}")
        for state in self.states:
            if state not in STATES:
                hint = nearest(state, STATES)
                raise UserError(f"--state: no state '{state}'{hint}; a run is {', '.join(STATES[:-1])} or {STATES[-1]}")

    def name_fits(self, name: str) -> bool:
        """Return whether a name is one of those wanted."""
        if any(character in self.pattern for character in "*?["):
            return fnmatch.fnmatchcase(name, self.pattern)
        return self.pattern in name

    def fits(self, info: RunInfo, earliest: float) -> bool:
        """Return whether what is fixed about a run is as wanted."""
        return (
            info.created >= earliest
            and self.cluster in ("", info.cluster)
            and self.group in ("", info.group)
            and self.recipe in ("", info.recipe)
        )


def listing(wanted: Wanted) -> tuple[list[Row], int]:
    """Return the rows that are wanted, and how many there are with those beyond the limit.

    Raises:
        UserError: the time of ``since`` cannot be read.
    """
    earliest = since(wanted.since) if wanted.since else 0.0
    dated = [(written, run) for written, run in dated_runs() if written >= earliest and wanted.name_fits(run.name)]
    only_newest = wanted.limit is not None and wanted == Wanted(pattern=wanted.pattern, limit=wanted.limit)
    if only_newest:
        facts, total = list(islice(_newest(dated), wanted.limit)), len(dated)
    else:
        facts = [each for each in read_all([run for _, run in dated]) if wanted.fits(each.info, earliest)]
        total = len(facts)
    rows = [Row(each.run, each.info, now) for each, now in zip(facts, statuses(facts), strict=True)]
    if wanted.states:
        rows = [row for row in rows if row.status.state in wanted.states]
        total = len(rows)
    key, largest_first = SORTS.get(wanted.sort) or _by_result(wanted.sort)
    rows.sort(key=key, reverse=largest_first != wanted.reverse)
    return rows[: wanted.limit], total


def _by_result(name: str) -> tuple[Callable[[Row], Any], bool]:
    """Return how runs are sorted by a result: the best first, and those without it last."""
    sign = 1 if any(word in name for word in ("loss", "perplexity", "error", "bits_per")) else -1

    def key(row: Row) -> float:
        value = row.status.results.get(name)
        return sign * value if isinstance(value, (int, float)) and not math.isnan(value) else math.inf

    return key, False


def _newest(dated: list[tuple[float, Run]]) -> Iterator[Facts]:
    """Yield runs in the order of their creation, newest first, reading no more of them than that takes.

    A ``run.json`` is written when the run is created, and again when it is resumed in another shape: so a run can be
    older than its file, but not newer.
    """
    held: list[Facts] = []
    for written, run in dated:
        held.sort(key=lambda facts: facts.info.created)
        while held and held[-1].info.created >= written:
            yield held.pop()
        held += read_all([run])
    yield from sorted(held, key=lambda facts: facts.info.created, reverse=True)
