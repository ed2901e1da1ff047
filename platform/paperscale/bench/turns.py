"""Commands whose ways take turns in one run: its progress, what it prints, and the page it writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from paperscale.errors import FINISHED, UserError, nearest


def run_in_turns(
    options: argparse.Namespace,
    name: str,
    total: int,
    measure: Callable[[Callable[[int], None]], Any],
    show: Callable[[Any, Console], None],
    markdown: Callable[[Any], str],
) -> int:
    """Measure, print, and write the page where it is wanted; return the exit code.

    Args:
        options: ``json`` and ``out``.
        name: of the page.
        total: trainings.
        measure: returns the results; is given what to call with the number of trainings that are done.
        show: prints the results.
        markdown: returns the page.
    """
    console = Console(stderr=options.json)
    columns = (TextColumn("training in turns"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        results = measure(lambda done: progress.update(task, completed=done))
    publish(options, name, results, lambda: show(results, console), markdown)
    return FINISHED


def publish(
    options: argparse.Namespace, name: str, results: Any, show: Callable[[], None], markdown: Callable[[Any], str]
) -> None:
    """Print results, as JSON if that is asked for, and write the page and its JSON where they are wanted."""
    if options.json:
        print(json.dumps(results.to_json(), indent=1))
    else:
        show()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.md").write_text(markdown(results))
        (options.out / f"{name}.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")


def chosen(what: str, names: str | None, known: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list, in the known order; all of them without a list.

    Raises:
        UserError: one is not known.
    """
    wanted = known if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"no {what} '{name}'; there are {', '.join(known)}{nearest(name, known)}")
    return [name for name in known if name in wanted]


def made_by(command: str, results: Any) -> str:
    """Return where, when and how results were measured: the first sentences of a page."""
    machine = results.hardware
    packages = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"{results.day}: {machine['cores']} cores of {machine['cpu']}, {machine['memory']}, Linux {machine['kernel']}, "
        f"Python {machine['python']}, {packages}. Made by `paperscale bench {command}`; every round's figures are in "
        "the JSON beside."
    )


def as_markdown(lines: list[list[str]]) -> str:
    """Return a table, whose first line is the heading."""
    heading, *rows = lines
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def as_table(lines: list[list[str]], **options: Any) -> Table:
    """Return a table for the terminal, whose first line is the heading."""
    heading, *rows = lines
    table = Table(*heading, box=None, pad_edge=False, **options)
    for row in rows:
        table.add_row(*row)
    return table
