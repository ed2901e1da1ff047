"""Continuing a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import time

import yaml

from paperscale.atomic import write_atomically
from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.facts import Cluster
from paperscale.jobs.profile import Profile
from paperscale.jobs.render import render
from paperscale.jobs.run import EXCLUDED_S, Run, RunInfo
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.submit import Options, Shape, say, start


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
    if now.state == "cancelled" and now.job and now.job.slurm == "COMPLETING":  # its script would see the new run
        raise UserError(f"run '{run.name}': its cancelled job {run.job} has not ended yet; try again in a minute")
    if now.state == "finished":
        raise UserError(f"run '{run.name}' is finished; submit the recipe again under another --name")
    info = run.info
    changed = dataclasses.replace(asked, cluster=info.cluster) != Shape(info.cluster)
    if info.engine == "here" and changed:
        raise UserError(f"run '{run.name}' trains here in one process; submit it to a cluster for more")
    if info.engine != "here":
        _write_script(run, info, asked)
    for mark in ("cancelled", "stalled", "stop", "save"):
        (run.path / mark).unlink(missing_ok=True)
    if info.engine == "here":
        from paperscale.jobs.foreground import train_here

        return train_here(run)
    start(run)
    return None


def _write_script(run: Run, info: RunInfo, asked: Shape) -> None:
    """Write the run's script anew, for what is asked and as this release writes it: one job for this run alone."""
    shape = Shape(
        info.cluster,
        asked.nodes or info.nodes,
        asked.procs_per_node or asked.gpus_per_node or info.procs_per_node,
        asked.gpus_per_node or info.gpus_per_node or None,
        asked.time or info.time or None,
    )
    profile = shape.profile()
    info = dataclasses.replace(
        info,
        nodes=profile.nodes,
        procs_per_node=profile.processes_per_node,
        gpus_per_node=profile.gpus_per_node or 0,
        time=shape.time or "",
        after="",
        repeat=1,
    )
    ENGINES[info.engine].check(profile, info)
    write_atomically(run.script, render(info, profile, _without_bad_nodes(run, profile), _data(run)).encode())
    write_atomically(run.path / "run.json", json.dumps(dataclasses.asdict(info), indent=1).encode())


def _without_bad_nodes(run: Run, profile: Profile) -> Options:
    """Return the option that leaves out the nodes that were found bad, as long as enough others are there."""
    hosts = list(dict.fromkeys(node["host"] for node in run.excluded if time.time() - node["time"] < EXCLUDED_S))
    if not hosts or profile.engine != "slurm":
        return {}
    cluster = Cluster()
    machines = cluster.of_partition(profile.partition or next(iter(cluster.partitions)))
    if len({machine.name for machine in machines} - set(hosts)) < profile.nodes:
        say([f"without {', '.join(hosts)}, found bad lately, too few nodes would be left: they are tried again"])
        return {}
    return {"exclude": ",".join(hosts)}


def _data(run: Run) -> list[str]:
    """Return the folders of the run's shards."""
    paths = yaml.safe_load(run.recipe.read_text())["data"]["init_args"].get("path") or []
    return [path for path in ([paths] if isinstance(paths, str) else paths) if "://" not in path]
