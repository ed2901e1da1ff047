"""From a recipe and a cluster's profile to a job."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs import snapshot
from paperscale.jobs.checkpoints import keep_initial
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.profile import Profile
from paperscale.jobs.render import render
from paperscale.jobs.run import Run, RunInfo, create, find_run, free_name, refuse_taken, runs_dir
from paperscale.jobs.turns import start_queue
from paperscale.jobs.validation import Place, Validator
from paperscale.recipes import RecipeArguments
from paperscale.tracking.identity import new_id

Options = dict[str, "str | int"]


@dataclass(frozen=True)
class Shape:
    """What a submission asks for; ``None`` takes the profile's value."""

    cluster: str = "local"
    nodes: int | None = None
    procs_per_node: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None

    def profile(self) -> Profile:
        """Return the cluster's profile with what was asked for in place of its defaults.

        Raises:
            UserError: there is no such profile, or its engine has no use for what was asked.
        """
        profile = profiles.load(self.cluster)
        if profile.engine == "local" and (self.time or self.gpus_per_node):
            option = "--time" if self.time else "--gpus-per-node"
            raise UserError(f"{option}: the local cluster sets no limits and shares all of this machine; leave it out")
        asked: dict[str, Any] = {
            "nodes": self.nodes,
            "procs_per_node": self.procs_per_node or self.gpus_per_node,
            "gpus_per_node": self.gpus_per_node,
            "time": self.time,
        }
        return dataclasses.replace(profile, **{key: value for key, value in asked.items() if value is not None})


@dataclass(frozen=True)
class Turn:
    """When a run's job may start, and how many jobs carry it.

    Attributes:
        after: name of the run that must have finished before, ``None`` for none.
        repeat: jobs of a train that carries the run, one after another: for queues with short time limits.
    """

    after: str | None = None
    repeat: int = 1

    def options(self, profile: Profile) -> Options:
        """Return the options of sbatch that make it so.

        Raises:
            UserError: there is no such run, it cannot finish any more, or the cluster knows nothing of the kind.
        """
        options: Options = {}
        if self.repeat > 1:
            if profile.engine == "local":
                raise UserError("--repeat: the local cluster sets no time limit, one job will do; leave --repeat out")
            options["array"] = f"1-{self.repeat}%1"
        earlier = self.waits_for(profile)
        if earlier and profile.engine == "slurm":
            # The jobs of a train that are left over when its run finishes are cancelled: its script looks itself.
            kind = "afterany" if earlier.info.repeat > 1 else "afterok"
            options |= {"dependency": f"{kind}:{earlier.job}", "kill-on-invalid-dep": "yes"}
        return options

    def waits_for(self, profile: Profile) -> Run | None:
        """Return the run that is to finish first; ``None`` if it has, or there is none.

        Raises:
            UserError: there is no such run, it cannot finish any more, or it runs elsewhere.
        """
        from paperscale.jobs.status import LIVE, status

        if self.after is None:
            return None
        run = find_run(self.after)
        if run.path.parent != runs_dir():
            raise UserError(f"--after {self.after}: that run is not in {runs_dir()}; set PAPERSCALE_RUNS to its folder")
        now = status(run)
        if now.state == "finished":
            return None
        if run.info.cluster != profile.name:
            raise UserError(
                f"--after {run.name}: that run is on cluster '{run.info.cluster}', this one on '{profile.name}', and "
                f"neither knows of the other's jobs; use --cluster {run.info.cluster}, or submit when it has finished"
            )
        if now.state not in LIVE:
            raise UserError(
                f"--after {run.name}: that run is {now.state} ({now.detail}); continue it first with "
                f"`paperscale resume {run.name}`"
            )
        return run


def new_info(
    recipe: str, name: str | None, profile: Profile, command: str, turn: Turn | None = None, group: str = ""
) -> RunInfo:
    """Return the identity of a new run.

    Raises:
        UserError: the name cannot be a run's, or is taken.
    """
    turn = turn or Turn()
    if name:
        refuse_taken(name)
    return RunInfo(
        name=name or free_name(recipe),
        recipe=recipe,
        cluster=profile.name,
        engine=profile.engine,
        nodes=profile.nodes,
        procs_per_node=profile.processes_per_node,
        wandb_id=new_id(),
        created=time.time(),
        command=command,
        workdir=str(Path.cwd()),
        gpus_per_node=profile.gpus_per_node or 0,
        group=group,
        after=find_run(turn.after).name if turn.after else "",
        repeat=turn.repeat,
        time=profile.time if profile.engine == "slurm" else "",
    )


def resolve(arguments: RecipeArguments, world_size: int = 1) -> str:
    """Return the resolved recipe for training on this machine, checked.

    Raises:
        UserError: the recipe is wrong, its shards are missing, or it cannot run on this machine.
    """
    validated = Validator(Place.here(world_size), without_memory=False)(arguments)
    say(validated.warnings)
    return validated.recipe


def submit(
    arguments: RecipeArguments, shape: Shape, name: str | None, dry_run: bool, command: str, turn: Turn | None = None
) -> Run | str:
    """Create a run and hand it to its cluster; a dry run returns the script instead.

    Raises:
        UserError: anything is wrong; nothing has been queued and no run directory is left.
    """
    profile, turn = shape.profile(), turn or Turn()
    options = turn.options(profile)
    info = new_info(arguments.recipe.stem, name, profile, command, turn)
    earlier = turn.waits_for(profile)
    if dry_run:
        say(Validator(Place.of(profile), with_data=False, earlier=earlier)(arguments).warnings)
        return render(info, profile, options)
    ENGINES[profile.engine].check(profile, info)
    validated = Validator(Place.of(profile), earlier=earlier)(arguments)
    with new_run(info, validated.recipe) as run:
        run.script.write_text(render(info, profile, options, validated.data))
        earlier = turn.waits_for(profile) if profile.engine == "local" else None
        if earlier:
            start_queue([run], 1, earlier)
        else:
            start(run)
    say(validated.warnings)
    return run


@contextlib.contextmanager
def new_run(info: RunInfo, recipe: str) -> Iterator[Run]:
    """Create a run with its copy of the code; leave nothing of it behind if no job comes of it."""
    run = create(info, recipe)
    try:
        warning = snapshot.take(run.path / "code", Path.cwd())
        keep_initial(run, recipe)
        yield run
    except BaseException:
        if not run.job:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    say([warning] if warning else [])


def start(run: Run) -> None:
    """Hand the run's script to its engine and note the job."""
    run.set_job(ENGINES[run.info.engine].submit(run))


def say(warnings: Iterable[str]) -> None:
    """Print warnings, beside what a script may read."""
    for warning in warnings:
        print(f"WARNING {warning}", file=sys.stderr)
