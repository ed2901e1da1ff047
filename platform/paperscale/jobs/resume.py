"""Continuing a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from paperscale.data.writer import write_atomically
from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.submit import render, start


def resume(run: Run, asked: dict[str, Any]) -> int | None:
    """Submit the run's job again, or train here if it was begun with ``fit``.

    Args:
        run: the run.
        asked: ``nodes``, ``procs_per_node``, ``gpus_per_node`` and ``time`` where they are to change.

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
    changes = {name: value for name, value in asked.items() if value is not None}
    if "gpus_per_node" in changes:
        changes.setdefault("procs_per_node", changes["gpus_per_node"])
    (run.path / "cancelled").unlink(missing_ok=True)
    (run.path / "stalled").unlink(missing_ok=True)
    info = run.info
    if info.engine == "here":
        if changes:
            raise UserError(f"run '{run.name}' trains here in one process; submit it to a cluster for more")
        from paperscale.jobs.foreground import train_here

        return train_here(run)
    profile = dataclasses.replace(
        profiles.load(info.cluster), **{"nodes": info.nodes, "procs_per_node": info.procs_per_node, **changes}
    )
    if changes:
        info = dataclasses.replace(info, nodes=profile.nodes, procs_per_node=profile.processes_per_node)
        ENGINES[info.engine].check(profile, info)
        write_atomically(run.script, render(info, profile).encode())
        write_atomically(run.path / "run.json", json.dumps(dataclasses.asdict(info), indent=1).encode())
    start(run)
    return None
