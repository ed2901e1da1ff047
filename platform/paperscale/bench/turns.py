"""Commands whose ways take turns in one run: its progress, what it prints, and the page it writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from paperscale.errors import FINISHED


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
    if options.json:
        print(json.dumps(results.to_json(), indent=1))
    else:
        show(results, console)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.md").write_text(markdown(results))
        (options.out / f"{name}.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")
    return FINISHED
