"""Continuing a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

import yaml

from paperscale.atomic import write_atomically
from paperscale.errors import UserError, nearest
from paperscale.jobs import amends, snapshot
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.facts import Cluster
from paperscale.jobs.profile import Profile
from paperscale.jobs.render import render
from paperscale.jobs.run import EXCLUDED_S, Run, RunInfo
from paperscale.jobs.status import LIVE, RunStatus, status
from paperscale.jobs.submit import Options, Shape, say, start
from paperscale.jobs.validation import Place, Validated, Validator
from paperscale.recipes import RecipeArguments, split_override

_LENGTH = ("trainer.max_epochs", "trainer.max_steps")
_CHANGEABLE = (*_LENGTH, "trainer.strategy", "data.micro_batch_size")
Changes = tuple[tuple[str, str], ...]


def resume(run: Run, asked: Shape, words: Sequence[str] = ()) -> int | None:
    """Submit the run's job again, or train here if it was begun with ``fit``.

    Args:
        run: the run.
        asked: what is to change of the job; the cluster stays the run's.
        words: ``key=value`` of what is to change of the recipe: how long it trains, the strategy, the micro-batch.

    Returns:
        The exit code of training here; ``None`` for a job.

    Raises:
        UserError: the run is alive, or finished and not to be trained longer; the cluster cannot give what is asked,
            or the recipe cannot run there. Nothing has been changed then.
    """
    changes, now, info = _changes(run, words), status(run), run.info
    _refuse_alive(run, now)
    if now.state == "finished" and not any(key in _LENGTH for key, _ in changes):
        raise UserError(
            f"run '{run.name}' is finished; train it longer with `paperscale resume {run.name} trainer.max_epochs=N` "
            "(or trainer.max_steps), or submit the recipe again under another --name"
        )
    here = info.engine == "here"
    if here and dataclasses.replace(asked, cluster=info.cluster) != Shape(info.cluster):
        raise UserError(f"run '{run.name}' trains here in one process; submit it to a cluster for more")
    shape = _shape(info, asked)
    profile = None if here else shape.profile()
    validated = _validated(run, Place.of(profile) if profile else Place.here(), here, changes)
    if now.state == "finished":
        _refuse_nothing_left(run, now, validated)
    if profile:
        _write_script(run, info, shape, profile, validated)
    _write_recipe(run, validated, changes)
    for mark in ("cancelled", "stalled", "stop", "save"):
        (run.path / mark).unlink(missing_ok=True)
    say(validated.warnings)
    if here:
        from paperscale.jobs.foreground import train_here

        return train_here(run)
    start(run)
    return None


def _changes(run: Run, words: Sequence[str]) -> Changes:
    """Return the keys that are to change, with their values.

    Raises:
        UserError: one is not of those that a run can change, or comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, value = split_override(word) or (word, None)
        key = key.replace(".init_args.", ".")
        if value is None:
            raise UserError(
                f"'{word}' is not a key with a value; write for example `paperscale resume {run.name} "
                "trainer.max_epochs=20`"
            )
        if key not in _CHANGEABLE:
            raise UserError(
                f"{key}: a run keeps its recipe but for {', '.join(_CHANGEABLE)}{nearest(key, _CHANGEABLE)}; for "
                "another value submit the recipe under another --name"
            )
        if key in found:
            raise UserError(f"{key} is set twice (--strategy sets trainer.strategy); leave one of the two out")
        found[key] = value
    return tuple(found.items())


def _refuse_alive(run: Run, now: RunStatus) -> None:
    if now.state in LIVE:
        raise UserError(f"run '{run.name}' is {now.state} ({now.detail}); `paperscale cancel {run.name}` ends it first")
    if now.state == "cancelled" and now.job and now.job.slurm == "COMPLETING":  # its script would see the new run
        raise UserError(f"run '{run.name}': its cancelled job {run.job} has not ended yet; try again in a minute")


def _shape(info: RunInfo, asked: Shape) -> Shape:
    """Return the shape of the next job: the last one's but for what is asked."""
    return Shape(
        info.cluster,
        asked.nodes or info.nodes,
        asked.procs_per_node or asked.gpus_per_node or info.procs_per_node,
        asked.gpus_per_node or info.gpus_per_node or None,
        asked.time or info.time or None,
    )


def _validated(run: Run, place: Place, here: bool, changes: Changes) -> Validated:
    """Return the run's recipe with its changes, checked as at submission and with the code that it runs with."""
    begun = any(run.checkpoints.glob("step-*"))
    longer = begun and any(key in _LENGTH for key, _ in changes)
    check = Validator(place, without_memory=not here, lengthened=longer, begun=begun)
    imports = sys.path.copy()
    snapshot.use(run)
    try:
        return check(RecipeArguments(run.recipe, overrides=changes))
    finally:
        sys.path[:] = imports


def _refuse_nothing_left(run: Run, now: RunStatus, validated: Validated) -> None:
    """Refuse to train a finished run that stands at its new end already."""
    trainer = yaml.safe_load(validated.recipe)["trainer"]
    for key, what in (("max_epochs", "epoch"), ("max_steps", "step")):
        limit, done = trainer[key], now.progress.get(what, 0)
        if limit not in (None, -1) and limit <= done:
            raise UserError(
                f"run '{run.name}' has trained {done} {what}s and trainer.{key} is {limit}; raise that too, as in "
                f"`paperscale resume {run.name} trainer.{key}={done + 1}`"
            )


def _write_script(run: Run, info: RunInfo, shape: Shape, profile: Profile, validated: Validated) -> None:
    """Write the run's script anew, for what is asked and as this release writes it: one job for this run alone."""
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
    script = render(info, profile, _without_bad_nodes(run, profile), validated.data)
    write_atomically(run.script, script.encode())
    write_atomically(run.path / "run.json", json.dumps(dataclasses.asdict(info), indent=1).encode())


def _write_recipe(run: Run, validated: Validated, changes: Changes) -> None:
    """Write the recipe with its changes; the last attempt's folder keeps what it ran with, and what came of it."""
    attempts = run.attempts()
    results = run.path / "results.json"
    if attempts and results.exists():
        results.replace(attempts[-1].path / results.name)
    if changes:
        if attempts:
            write_atomically(attempts[-1].path / run.recipe.name, run.recipe.read_bytes())
        write_atomically(run.recipe, validated.recipe.encode())
    if any(key.startswith("data.") for key, _ in changes):
        amends.forget_data(run)


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
