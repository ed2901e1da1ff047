"""The command that puts a paper's numbers and ours on one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.cli.options import Add
from paperscale.errors import FINISHED, UserError

if TYPE_CHECKING:
    from paperscale.report.runs import Record

_MANY = 20  # runs whose reading takes long enough to show how far it is


def add_commands(add: Add) -> None:
    """Add the command."""
    report = add("report", run_report, "write a page with a paper's figures and tables beside those of your runs")
    report.add_argument("paper", metavar="PAPER", help="such as resnet").completer = complete_papers  # type: ignore[attr-defined]
    report.add_argument(
        "--runs",
        metavar="DIR",
        nargs="+",
        action="extend",
        type=Path,
        help="folders of runs, or runs (default: ./runs)",
    )
    report.add_argument("-o", "--out", metavar="FILE", type=Path, help="the page (default: PAPER-report.html)")
    report.epilog = (
        "What the page shows is declared in recipes/PAPER/_report.yaml; without one, every recipe's results."
    )


def complete_papers(prefix: str, **_: Any) -> list[str]:
    """Return the names of papers."""
    from paperscale.report.default import papers
    from paperscale.report.spec import spec_files

    return sorted({*spec_files(), *papers()})


def run_report(args: argparse.Namespace) -> int:
    """Write the page; say what it shows."""
    from paperscale.atomic import write_atomically
    from paperscale.jobs.run import runs_dir
    from paperscale.report.page import make

    out = args.out or Path(f"{args.paper}-report.html")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"-o {out}: no file can be written there; name a file in a folder that exists")
    folders = args.runs or [folder for folder in [runs_dir()] if folder.exists()]
    report = make(args.paper, folders, _shown)
    write_atomically(out, report.html.encode())
    for warning in report.warnings:
        print(f"WARNING {warning}", file=sys.stderr)
    decided = [f"{number} {word}" for word, number in report.verdicts.items() if number]
    total = sum(report.verdicts.values())
    checks = f"; {total} check{'s' * (total != 1)}: {', '.join(decided)}" if decided else ""
    print(f"{out}: {report.finished} finished runs of {report.runs}{checks}")
    return FINISHED


def _shown(records: list[Record]) -> Iterable[Record]:
    """Return the records; on a terminal, with a bar where there are many."""
    if len(records) < _MANY or not sys.stderr.isatty():
        return records
    from rich.console import Console
    from rich.progress import track

    return track(records, "reading runs", console=Console(stderr=True), transient=True)
