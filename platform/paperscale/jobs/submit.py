"""From a recipe and a cluster's profile to a job."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from paperscale import __version__, assets
from paperscale.errors import REQUEUE, UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs import snapshot
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.profile import Profile
from paperscale.jobs.run import Run, RunInfo, create, free_name, refuse_taken, runs_dir
from paperscale.recipes import RecipeArguments
from paperscale.tracking.identity import new_id


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


def new_info(recipe: str, name: str | None, profile: Profile, command: str) -> RunInfo:
    """Return the identity of a new run.

    Raises:
        UserError: the name cannot be a run's, or is taken.
    """
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
    )


def resolve(arguments: RecipeArguments, world_size: int) -> str:
    """Return the resolved recipe as YAML, after checking what can be checked before a job waits for hours.

    Raises:
        UserError: the recipe is wrong, its shards are missing, or its batch does not fit the world size.
    """
    from paperscale.training.recipe import RecipeCLI

    cli = RecipeCLI(arguments.to_cli())
    trainer = cli.config_init.trainer
    if trainer.devices not in ("auto", 1, "1") or trainer.num_nodes != 1:
        raise UserError(
            "trainer.devices and trainer.num_nodes are the job's: "
            "use --nodes and --procs-per-node of `paperscale submit`"
        )
    cli.datamodule.check()
    cli.datamodule.accumulate(world_size)
    if cli.datamodule.paths:
        paths = [path if "://" in path else str(Path(path).absolute()) for path in cli.datamodule.paths]
        cli.config.data.init_args.path = paths[0] if len(paths) == 1 else paths
    return cli.resolved()


def check_keys(arguments: RecipeArguments) -> None:
    """Check the recipe without its data: a dry run needs none.

    Raises:
        UserError: a key, a class or a value is wrong.
    """
    from paperscale.training.recipe import RecipeCLI

    RecipeCLI(arguments.to_cli(), build=False)


def submit(arguments: RecipeArguments, shape: Shape, name: str | None, dry_run: bool, command: str) -> Run | str:
    """Create a run and hand it to its cluster; a dry run returns the script instead.

    Raises:
        UserError: anything is wrong; nothing has been queued and no run directory is left.
    """
    profile = shape.profile()
    info = new_info(arguments.recipe.stem, name, profile, command)
    if dry_run:
        check_keys(arguments)
        return render(info, profile)
    ENGINES[profile.engine].check(profile, info)
    recipe = resolve(arguments, profile.nodes * profile.processes_per_node)
    with new_run(info, recipe) as run:
        run.script.write_text(render(info, profile))
        start(run)
    return run


@contextlib.contextmanager
def new_run(info: RunInfo, recipe: str) -> Iterator[Run]:
    """Create a run with its copy of the code; leave nothing of it behind if no job comes of it."""
    run = create(info, recipe)
    try:
        snapshot.take(run.path / "code", Path.cwd())
        yield run
    except BaseException:
        if not run.job:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def start(run: Run) -> None:
    """Hand the run's script to its engine and note the job."""
    run.set_job(ENGINES[run.info.engine].submit(run))


def render(info: RunInfo, profile: Profile) -> str:
    """Return the job script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path("cluster/templates"), assets.cluster_dir() / "templates"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  a shell script, quoted by the filter q
    )
    environment.filters["q"] = shlex.quote
    run_dir = runs_dir() / info.name
    return environment.get_template("job.sbatch.j2").render(
        run=info,
        profile=profile,
        run_dir=str(run_dir),
        options=options(info, profile, run_dir),
        python=profile.python or sys.executable,
        threads=profile.cpus_per_proc if profile.engine == "slurm" else max(1, _cores() // info.procs_per_node),
        requeue_code=REQUEUE,
        version=__version__,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def options(info: RunInfo, profile: Profile, run_dir: Path) -> list[str]:
    """Return the ``#SBATCH`` options of a job."""
    log = str(run_dir / "job.log").replace("%", "%%")
    chosen = {
        "job-name": info.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "nodes": info.nodes,
        "ntasks-per-node": info.procs_per_node,
        "cpus-per-task": profile.cpus_per_proc,
        "gpus-per-node": profile.gpus_per_node,
        "mem": profile.mem_per_node,
        "time": profile.time,
        "signal": f"USR1@{profile.signal_before_end_s}",
        "open-mode": "append",
        "output": f'"{log}"' if " " in log else log,
    }
    lines = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    return [*lines, "--requeue", *profile.sbatch]
