"""``paperscale bench data``: sets up, measures, prints and writes the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from paperscale.bench import data, environments, report
from paperscale.bench.measure import WORKS, Bench
from paperscale.bench.registry import PEERS
from paperscale.bench.report import Results
from paperscale.bench.turns import chosen, publish
from paperscale.errors import FINISHED, UserError

_SECONDS = 2.0


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench data``.

    Raises:
        UserError: a work or a peer is unknown, or the samples cannot be made.
    """
    console = Console(stderr=options.json)
    works = chosen("work", options.only, list(WORKS))
    peers = chosen("peer", options.peers, list(PEERS))
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("the benchmark reads Linux's /proc, which is not there; run it on Linux")
    cache = environments.cache_folder()
    if options.setup:
        environments.set_up(cache, console.print)
    results = measure(cache, works, peers, options.rounds, options.quick, console)
    publish(options, "data", results, lambda: show(results, console), report.markdown)
    return FINISHED


def measure(
    cache: Path, works: Sequence[str], peers: Sequence[str], rounds: int, quick: bool, console: Console
) -> Results:
    """Return what was measured."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    size = data.QUICK if quick else data.FULL
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("preparing", total=len(works) + 1)
        bench = Bench(
            cache,
            size,
            peers,
            rounds=1 if quick else rounds,
            seconds=0.05 if quick else _SECONDS,
            fresh=not quick,
            step=lambda what: progress.update(task, description=what),
        )
        try:
            bench.prepare(works, console.print)
            rows = []
            for work in works:
                progress.advance(task)
                rows += WORKS[work].measure(bench)
        finally:
            bench.close()
    facts = data.facts(cache / "data" / size.name / "source")
    return Results(size.name, bench.rounds, rows, facts, bench.versions, bench.decoders)


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for work in results.works():
        heading, *rows = report.lines(work, results)
        table = Table(*heading, title=report.TABLES[work].title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    goals = Table("", "goal", "measured", "met", title="Goals", title_justify="left", box=None, pad_edge=False)
    for goal in report.goals(results):
        goals.add_row(report.TABLES[goal.work].title, goal.goal, goal.measured, "yes" if goal.met else "no")
    console.print(goals)
    if results.size == data.QUICK.name:
        console.print("\nThese figures are of little data and one short round: they show only that it works.")
