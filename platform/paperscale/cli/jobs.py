"""Commands about runs: resume, runs, status, watch, logs, cancel, diff, drill."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from paperscale.cli.options import (
    Add,
    Parser,
    complete_clusters,
    complete_groups,
    complete_recipes,
    complete_runs,
    complete_states,
    console,
    find,
    position,
    positive,
    print_json,
    run_argument,
    shape_options,
    strategy_option,
    tell,
    wait_option,
    with_strategy,
)
from paperscale.errors import FAILED, FINISHED, UserError
from paperscale.jobs.faults import FAULTS

if TYPE_CHECKING:
    from paperscale.jobs.run import Run

_NEWEST = 50  # runs that are listed on a terminal
_WIDE = 130  # columns of a terminal that hold the whole table of runs
_LESS_IMPORTANT = ("cluster", "attempts", "loss", "created")
_SORTS = ("created", "name", "recipe", "cluster", "state", "attempts", "step", "loss")


def _sorts(**_: Any) -> tuple[str, ...]:
    return _SORTS


def add_commands(add: Add) -> None:
    """Add the commands."""
    resume = add("resume", run_resume, "continue a run, on another number of nodes or with another strategy if asked")
    run_argument(resume)
    help = "train longer (trainer.max_epochs, trainer.max_steps), or in other micro-batches (data.micro_batch_size)"
    resume.add_argument("changes", nargs="*", metavar="key=value", help=help)
    shape_options(resume)
    strategy_option(resume, "the run's")
    resume.add_argument("--json", action="store_true", help="print run and job as JSON")
    _add_runs(add("runs", run_runs, "list the runs"))
    status = add("status", run_status, "show what a run is doing")
    run_argument(status)
    status.add_argument(
        "--verify", action="store_true", help="hash the newest checkpoint's files, not only their sizes"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    watch = add("watch", run_watch, "show runs as they train: one in detail, or several in a table; q ends it")
    _several_runs(watch, "runs (default: all that are alive)")
    watch.add_argument("--once", action="store_true", help="print what there is now and end")
    watch.add_argument("--json", action="store_true", help="print what there is now as JSON, as of `status`, and end")
    _add_logs(add("logs", run_logs, "print a run's log"))
    cancel = add("cancel", run_cancel, "end runs for good")
    _several_runs(cancel, "runs")
    cancel.add_argument("--group", help="all runs of this sweep that are alive").completer = complete_groups  # type: ignore[attr-defined]
    cancel.add_argument("--save", action="store_true", help="write a checkpoint first, and wait for the end")
    wait_option(cancel, "the end, with --save")
    diff = add("diff", run_diff, "show what two runs differ in: recipe, cluster, code, results")
    run_argument(diff)
    run_argument(diff, "other_name", "OTHER")
    diff.add_argument("--code", action="store_true", help="print the differences of the code as a patch, nothing else")
    diff.add_argument("--json", action="store_true", help="print JSON")
    drill = add("drill", run_drill, "make a fault happen to a running job, and see it recover")
    run_argument(drill)
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    drill.add_argument("fault", choices=list(FAULTS), metavar="FAULT", help=faults)
    drill.add_argument("--rank", type=position, help="rank that is struck (default: the last; fill-disk: 0)")
    drill.add_argument("--node", help="node of bad-node (default: the last)")
    drill.add_argument("--no-wait", action="store_true", help="do not wait until it trains again")
    drill.add_argument("--json", action="store_true", help="print what came of it as JSON")


def _add_runs(runs: Parser) -> None:
    pattern = runs.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="part of the name, or a glob")
    pattern.completer = complete_runs  # type: ignore[attr-defined]
    runs.add_argument("--state", metavar="STATE,...", help="running, queued, failed, ...").completer = complete_states  # type: ignore[attr-defined]
    runs.add_argument("--cluster", help="on this cluster").completer = complete_clusters  # type: ignore[attr-defined]
    runs.add_argument("--group", help="of this sweep").completer = complete_groups  # type: ignore[attr-defined]
    runs.add_argument("--recipe", help="of this recipe").completer = complete_recipes  # type: ignore[attr-defined]
    runs.add_argument("--since", metavar="WHEN", help="created within 12h, 2d, 1w, or since a date")
    order = f"{', '.join(_SORTS)}, or a result such as val/accuracy (default: created, newest first)"
    runs.add_argument("--sort", default="created", metavar="COLUMN", help=order).completer = _sorts  # type: ignore[attr-defined]
    runs.add_argument("--reverse", action="store_true", help="turn the order round")
    runs.add_argument("--limit", type=positive, metavar="N", help=f"at most N (default: {_NEWEST} on a terminal)")
    runs.add_argument("--json", action="store_true", help="print JSON")


def _add_logs(logs: Parser) -> None:
    run_argument(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, into later attempts")
    logs.add_argument("--rank", type=_rank, default=0, metavar="N|all", help="rank (default: 0)")
    logs.add_argument("--node", type=position, metavar="N", help="all ranks of this node, from 0")
    logs.add_argument("--attempt", type=positive, metavar="K", help="attempt (default: the last)")
    logs.add_argument("--job", action="store_true", help="what the job script said, over all attempts")
    logs.add_argument("--tail", type=positive, metavar="N", help="only the last N lines")
    logs.add_argument("--grep", default="", metavar="REGEX", help="only lines that match")


def _rank(text: str) -> int | None:
    return None if text == "all" else position(text)


def _several_runs(parser: Parser, help: str) -> None:
    runs = parser.add_argument("run_names", metavar="RUN", nargs="*", help=help)
    runs.completer = complete_runs  # type: ignore[attr-defined]


def run_resume(args: argparse.Namespace) -> int:
    """Continue a stopped run."""
    from paperscale.jobs.resume import resume
    from paperscale.jobs.submit import Shape

    run = find(args)
    asked = Shape(
        nodes=args.nodes, procs_per_node=args.procs_per_node, gpus_per_node=args.gpus_per_node, time=args.time
    )
    if args.json and run.info.engine == "here":
        raise UserError(f"--json: run '{run.name}' trains here, and its log is what is printed; leave --json out")
    code = resume(run, asked, with_strategy(args.changes, args))
    if code is not None:
        return code
    if args.json:
        print_json({"run": run.name, "job": run.job})
    else:
        print(f"resumed {run.name} as job {run.job}; follow it with `paperscale logs {run.name} -f`")
    return FINISHED


def run_runs(args: argparse.Namespace) -> int:
    """List the runs."""
    from paperscale.jobs.listing import COLUMNS, Wanted, listing
    from paperscale.jobs.run import runs_dir

    terminal = sys.stdout.isatty() and not args.json
    wanted = Wanted(
        pattern=args.pattern,
        states=tuple(args.state.split(",")) if args.state else (),
        cluster=args.cluster or "",
        group=args.group or "",
        recipe=args.recipe or "",
        since=args.since or "",
        sort=args.sort,
        reverse=args.reverse,
        limit=args.limit or (_NEWEST if terminal else None),
    )
    rows, total = listing(wanted)
    if args.json:
        print_json([row.to_json() for row in rows])
    elif not rows:
        fits = "" if wanted == Wanted(limit=wanted.limit) else " that fit"
        print(f"no runs{fits} in {runs_dir()}; `paperscale submit resnet20-mnist` makes one", file=sys.stderr)
    elif terminal:
        _print_runs(COLUMNS, [row.cells() for row in rows])
        if total > len(rows):
            print(f"{total - len(rows):,} more; see --limit, --state, --since")
    else:
        for cells in [COLUMNS, *(row.cells() for row in rows)]:
            print("\t".join(cells))
    return FINISHED


def _print_runs(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print the table; a narrow terminal gets the columns that matter most."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from paperscale.jobs.words import COLOURS

    terminal = console()
    shown = [i for i, name in enumerate(columns) if terminal.width >= _WIDE or name not in _LESS_IMPORTANT]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        table.add_column(columns[i], overflow="fold", no_wrap=0 < i < len(columns) - 1)
    for row in rows:
        style = COLOURS[row[columns.index("state")]]
        table.add_row(*(Text(row[i], style=style if columns[i] == "state" else "") for i in shown))
    terminal.print(table)


def run_status(args: argparse.Namespace) -> int:
    """Show one run."""
    from paperscale.jobs.report import lines, report

    facts = report(find(args), verify=args.verify)
    if args.json:
        print_json(facts)
        return FINISHED
    for name, value in lines(facts):
        print(f"{name:14} {value}")
    return FINISHED


def run_watch(args: argparse.Namespace) -> int:
    """Watch runs."""
    from paperscale.jobs.report import report
    from paperscale.jobs.status import live_runs
    from paperscale.jobs.watch import watch

    chosen = _find_all(args.run_names)
    if args.json:
        print_json([report(run) for run in chosen or live_runs()])
    else:
        watch(chosen, args.once)
    return FINISHED


def run_logs(args: argparse.Namespace) -> int:
    """Print a log."""
    from paperscale.jobs.logs import follow_job, print_log

    run = find(args)
    if args.job:
        for text in follow_job(run, args.follow, args.tail, args.grep):
            print(text, end="", flush=True)
        return FINISHED
    rank = None if args.node is not None else args.rank
    print_log(run, rank, args.attempt, args.follow, node=args.node, tail=args.tail, grep=args.grep)
    return FINISHED


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel runs: all that can be, whatever becomes of the others."""
    from paperscale.jobs.status import LIVE, cancel, read_all, statuses
    from paperscale.jobs.switches import newest, save_and_cancel

    runs = _find_all(args.run_names)
    if args.group:
        runs += [run for run in _in_group(args.group) if run not in runs]
    if not runs:
        raise UserError(
            "name the runs to cancel, or a sweep with --group; `paperscale runs --state running` lists them"
        )
    facts = read_all(runs)
    done: list[dict[str, Any]] = []
    for run, now in zip([f.run for f in facts], statuses(facts), strict=True):
        if args.group and now.state not in LIVE and run.name not in args.run_names:
            continue
        one = {"run": run.name, "cancelled": True, "checkpoint": None, "warning": "", "error": ""}
        try:
            if args.save:
                save_and_cancel(run, now, args.timeout, tell)
            else:
                one["warning"] = cancel(run, now)
        except UserError as error:
            one |= {"cancelled": run.cancelled and now.state in LIVE, "error": str(error)}
        done.append({**one, "checkpoint": newest(run) or None})
    return _say_cancelled(done, args.json)


def _say_cancelled(done: list[dict[str, Any]], as_json: bool) -> int:
    """Print what became of each run; return the exit code.

    Raises:
        UserError: it went wrong for the only one.
    """
    errors = [one["error"] for one in done if one["error"]]
    if as_json:
        print_json(done)
        return FAILED if errors else FINISHED
    if len(done) == 1 and errors:
        raise UserError(errors[0])
    for one in done:
        if one["error"] or one["warning"]:
            print(f"error: {one['error']}" if one["error"] else f"WARNING {one['warning']}", file=sys.stderr)
        else:
            print(
                f"cancelled {one['run']}; "
                + (f"its newest checkpoint is {one['checkpoint']}" if one["checkpoint"] else "it has no checkpoint")
            )
    if not done:
        print("no run of the sweep is alive", file=sys.stderr)
    return FAILED if errors else FINISHED


def run_diff(args: argparse.Namespace) -> int:
    """Compare two runs."""
    from paperscale.jobs.diff import diff, unified
    from paperscale.jobs.run import find_run

    first, second = find(args), find_run(args.other_name)
    if args.code:
        for line in unified(first, second):
            print(line, end="")
        return FINISHED
    found = diff(first, second)
    if args.json:
        print_json(found)
        return FINISHED
    for part in ("recipe", "cluster", "code", "results"):
        for row in found[part]:
            print(f"{part}.{row['key']}: {_side(row, 'first')} -> {_side(row, 'second')}")
    for name in found["files"]:
        print(f"file {name} differs")
    if not any(found[part] for part in ("recipe", "cluster", "code", "results", "files")):
        print(f"{first.name} and {second.name} do not differ")
    return FINISHED


def _side(row: dict[str, Any], side: str) -> str:
    return json.dumps(row[side], default=str) if side in row else "(absent)"


def run_drill(args: argparse.Namespace) -> int:
    """Make a fault happen; tell how long it took until the training went on."""
    import dataclasses
    import time

    from paperscale.jobs.drill import Recovery, drill, full_disk, recovery

    run = find(args)
    attempt, since = len(run.attempts()), time.time()
    done = drill(run, args.fault, args.rank, args.node)
    if not args.json:
        print(done)
    if args.fault == "fill-disk":
        for line in () if args.no_wait else full_disk(run):
            print(line)
        return FINISHED
    attempt += args.fault == "bad-node"  # the next attempt is the one that it strikes
    for seen in () if args.no_wait else recovery(run, attempt, since):
        if not args.json:
            print(seen)
        elif isinstance(seen, Recovery):
            print_json(dataclasses.asdict(seen))
    return FINISHED


def _find_all(names: list[str]) -> list[Run]:
    from paperscale.jobs.run import find_run

    return [find_run(name) for name in dict.fromkeys(names)]


def _in_group(group: str) -> list[Run]:
    """Return the runs of a sweep.

    Raises:
        UserError: there is no such sweep.
    """
    from paperscale.jobs.listing import Wanted, listing

    rows, _ = listing(Wanted(group=group))
    if not rows:
        raise UserError(f"no run belongs to a sweep '{group}'; `paperscale runs --json` names the group of each")
    return [row.run for row in rows]
