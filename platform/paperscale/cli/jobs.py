"""Commands about runs: resume, runs, status, logs, cancel, drill."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from paperscale.cli.options import (
    Add,
    find,
    positive,
    print_table,
    run_argument,
    shape_options,
)
from paperscale.errors import FINISHED


def add_commands(add: Add) -> None:
    """Add the commands."""
    resume = add("resume", run_resume, "continue a run that was stopped, on the same or another number of nodes")
    run_argument(resume)
    shape_options(resume)
    runs = add("runs", run_runs, "list the runs")
    runs.add_argument("--json", action="store_true", help="print JSON")
    status = add("status", run_status, "show what a run is doing")
    run_argument(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    logs = add("logs", run_logs, "print a run's log")
    run_argument(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, into later attempts")
    logs.add_argument("--rank", type=int, default=0, help="rank (default: 0)")
    logs.add_argument("--attempt", type=positive, help="attempt (default: the last)")
    run_argument(add("cancel", run_cancel, "end a run for good"))
    drill = add("drill", run_drill, "make a fault happen to a running job, to see it recover")
    run_argument(drill)
    drill.add_argument(
        "fault",
        choices=["preempt"],
        help="preempt: the signal that a scheduler sends before it takes the nodes",
    )


def run_resume(args: argparse.Namespace) -> int:
    """Continue a stopped run."""
    from paperscale.jobs.resume import resume
    from paperscale.jobs.submit import Shape

    run = find(args)
    asked = Shape(
        nodes=args.nodes, procs_per_node=args.procs_per_node, gpus_per_node=args.gpus_per_node, time=args.time
    )
    code = resume(run, asked)
    if code is None:
        print(f"resumed {run.name} as job {run.job}; follow it with `paperscale logs {run.name} -f`")
        return FINISHED
    return code


def run_runs(args: argparse.Namespace) -> int:
    """List the runs."""
    from paperscale.jobs.run import all_runs, runs_dir
    from paperscale.jobs.status import status

    found = [(run, status(run)) for run in all_runs()]
    if args.json:
        rows = [{"name": run.name, "state": now.state, **now.progress, "results": now.results} for run, now in found]
        print(json.dumps(rows, indent=1))
        return FINISHED
    if not found:
        print(f"no runs in {runs_dir()}; `paperscale submit resnet20-mnist` makes one")
        return FINISHED
    rows_text = []
    for run, now in found:
        p, info = now.progress, run.info
        shape = f"{info.cluster} {info.nodes} x {info.procs_per_node}"
        step = f"{p['step']}/{p['total_steps']}" if p else "-"
        score = ", ".join(f"{k} {v:.4f}" for k, v in now.results.items() if k.startswith("test/"))
        rows_text.append((run.name, now.state, shape, str(len(run.attempts())), step, score or now.detail))
    print_table(["run", "state", "cluster", "attempts", "step", "result or reason"], rows_text)
    return FINISHED


def run_status(args: argparse.Namespace) -> int:
    """Show one run."""
    from paperscale.jobs.status import status
    from paperscale.training.checkpoint import all_checkpoints

    run = find(args)
    now, info, attempts = status(run), run.info, run.attempts()
    newest = all_checkpoints(run.checkpoints)
    facts: dict[str, Any] = {
        "run": run.name,
        "state": now.state,
        "detail": now.detail,
        "job": run.job,
        "cluster": info.cluster,
        "processes": f"{info.nodes} x {info.procs_per_node}",
        "attempts": len(attempts),
        "checkpoint": newest[0].name if newest else None,
        "wandb id": info.wandb_id,
        "directory": str(run.path),
    }
    if now.progress:
        p = now.progress
        facts |= {
            "step": f"{p['step']}/{p['total_steps']}",
            "epoch": p["epoch"],
            "samples": p["consumed"],
            "loss": p["loss"],
            "samples/s": p["samples_per_s"],
        }
        if now.state == "running":
            facts |= {"left": f"{p['eta_s']} s", "heartbeat": f"{time.time() - p['time']:.0f} s ago"}
    facts |= {name: value for name, value in now.results.items() if "/" in name}
    if args.json:
        print(json.dumps(facts, indent=1))
        return FINISHED
    for name, value in facts.items():
        if value not in (None, ""):
            print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")
    return FINISHED


def run_logs(args: argparse.Namespace) -> int:
    """Print a log."""
    from paperscale.jobs.status import print_log

    print_log(find(args), args.rank, args.attempt, args.follow)
    return FINISHED


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel a run."""
    from paperscale.jobs.status import cancel

    run = find(args)
    cancel(run)
    print(f"cancelled {run.name}; its checkpoints stay in {run.checkpoints}")
    return FINISHED


def run_drill(args: argparse.Namespace) -> int:
    """Preempt a running job."""
    from paperscale.jobs.drill import preempt

    print(preempt(find(args)))
    return FINISHED
