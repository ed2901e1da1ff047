"""Continuing a run that was stopped."""

from __future__ import annotations

import dataclasses
import json

from paperscale.data.writer import write_atomically
from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run, RunInfo
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.submit import Shape, render, start


def resume(run: Run, asked: Shape) -> int | None:
    """Submit the run's job again, or train here if it was begun with ``fit``.

    Args:
        run: the run.
        asked: what is to change; the cluster stays the run's.

    Returns:
        The exit code of training here; ``None`` for a job.

    Raises:
        UserError: the run is alive or finished, or the cluster cannot give what is asked.
    """
    now = status(run)
    if now.state in LIVE:
        raise UserError(f"run '{run.name}' is {now.state} ({now.detail}); `paperscale cancel {run.name}` ends it first")
    if now.state == "finished":
        raise UserError(f"run '{run.name}' is finished; submit the recipe again under another --name")
    info = run.info
    changed = dataclasses.replace(asked, cluster=info.cluster) != Shape(info.cluster)
    if info.engine == "here" and changed:
        raise UserError(f"run '{run.name}' trains here in one process; submit it to a cluster for more")
    if changed:
        _reshape(run, info, asked)
    for mark in ("cancelled", "stalled"):
        (run.path / mark).unlink(missing_ok=True)
    if info.engine == "here":
        from paperscale.jobs.foreground import train_here

        return train_here(run)
    start(run)
    return None


def _reshape(run: Run, info: RunInfo, asked: Shape) -> None:
    """Write the run's script for other nodes, processes or time."""
    shape = dataclasses.replace(
        asked,
        cluster=info.cluster,
        nodes=asked.nodes or info.nodes,
        procs_per_node=asked.procs_per_node or asked.gpus_per_node or info.procs_per_node,
    )
    profile = shape.profile()
    info = dataclasses.replace(info, nodes=profile.nodes, procs_per_node=profile.processes_per_node)
    ENGINES[info.engine].check(profile, info)
    write_atomically(run.script, render(info, profile).encode())
    write_atomically(run.path / "run.json", json.dumps(dataclasses.asdict(info), indent=1).encode())
