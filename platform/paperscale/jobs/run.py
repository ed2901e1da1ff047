"""A run is a directory (contract 3). Everything about it is read from there.

::

    runs/<name>/
        run.json          identity: recipe, cluster, shape, W&B id; written once, at submission
        recipe.yaml       the resolved recipe
        code/             the code it runs, as it was at submission
        job.sh            the rendered job script
        job               engine and id of the job that carries the run now
        job.log           what the job script said
        attempts/0001/    rank-0.log ..., attempt.json, exit_code, error (of the rank that failed first)
        checkpoints/      step-00000400/ ...
        progress.json     where the training is
        metrics.jsonl     every logged row
        results.json      the final metrics; its presence means finished
        cancelled         present once the user has cancelled the run
        wandb/            W&B's files
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paperscale.data.writer import write_atomically
from paperscale.errors import UserError, nearest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunInfo:
    """What is fixed when a run is created.

    Attributes:
        name: of the run, its directory, its job and its W&B run.
        recipe: name of the recipe.
        cluster: name of the profile, or ``here`` for ``paperscale fit``.
        engine: ``slurm``, ``local`` or ``here``.
        nodes: nodes of the job.
        procs_per_node: processes of a node.
        wandb_id: the id of the W&B run.
        created: Unix time.
        command: what the user typed.
        workdir: the directory it was typed in.
        gpus_per_node: GPUs of each node, 0 for none.
        group: name of the sweep that the run belongs to, empty for none; its W&B group.
        after: name of the run whose end this one waits for, empty for none.
        repeat: jobs of the train that carries the run, one after another.
    """

    name: str
    recipe: str
    cluster: str
    engine: str
    nodes: int
    procs_per_node: int
    wandb_id: str
    created: float
    command: str
    workdir: str
    gpus_per_node: int = 0
    group: str = ""
    after: str = ""
    repeat: int = 1


@dataclass(frozen=True)
class Run:
    """A run's directory."""

    path: Path

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.path.name

    @property
    def info(self) -> RunInfo:
        """Return what was fixed when the run was created."""
        try:
            return RunInfo(**json.loads((self.path / "run.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is not a run: its run.json cannot be read ({error})") from error

    @property
    def recipe(self) -> Path:
        """Return the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def script(self) -> Path:
        """Return the job script."""
        return self.path / "job.sh"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Return the file of logged rows."""
        return self.path / "metrics.jsonl"

    def attempts(self) -> list[Attempt]:
        """Return the attempts, oldest first."""
        return [Attempt(path) for path in sorted((self.path / "attempts").glob("[0-9]*"))]

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the run, empty where it does not exist yet."""
        return read_json(self.path / name)

    @property
    def job(self) -> str | None:
        """Return the id of the job that carries the run now."""
        path = self.path / "job"
        return path.read_text().strip() if path.exists() else None

    def set_job(self, job: str) -> None:
        """Note the job that carries the run now."""
        write_atomically(self.path / "job", job.encode())

    @property
    def cancelled(self) -> bool:
        """Return whether the user has cancelled the run."""
        return (self.path / "cancelled").exists()


@dataclass(frozen=True)
class Attempt:
    """One start of a run's job."""

    path: Path

    @property
    def number(self) -> int:
        """Return the attempt's number, from 1."""
        return int(self.path.name)

    @property
    def exit_code(self) -> int | None:
        """Return the code that the job script recorded, ``None`` while the attempt lives (or if it was killed)."""
        try:
            return int((self.path / "exit_code").read_text())
        except (OSError, ValueError):
            return None

    @property
    def facts(self) -> dict[str, Any]:
        """Return what rank 0 recorded."""
        return read_json(self.path / "attempt.json")

    def record(self, **facts: Any) -> None:
        """Add facts to ``attempt.json``."""
        write_atomically(self.path / "attempt.json", json.dumps({**self.facts, **facts}, indent=1).encode())

    @property
    def error(self) -> str:
        """Return what ended the attempt, in the words of the rank that failed first; empty if none has."""
        try:
            return (self.path / "error").read_text().strip()
        except OSError:
            return ""

    def record_error(self, rank: int, error: str) -> None:
        """Note what made a rank fail, unless another rank failed before: what follows is mostly its consequence."""
        with contextlib.suppress(OSError), (self.path / "error").open("x") as file:
            file.write(f"rank {rank}: {error}\n")

    def log(self, rank: int = 0) -> Path:
        """Return the log of a rank."""
        return self.path / f"rank-{rank}.log"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's content, empty where it does not exist."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def runs_dir() -> Path:
    """Return the folder of runs: ``$PAPERSCALE_RUNS``, by default ``./runs``."""
    return Path(os.environ.get("PAPERSCALE_RUNS", "runs")).absolute()


def all_runs() -> list[Run]:
    """Return all runs, newest first."""
    found = [Run(path.parent) for path in runs_dir().glob("*/run.json")]
    return sorted(found, key=lambda run: (run.path / "run.json").stat().st_mtime, reverse=True)


def find_run(name: str) -> Run:
    """Return the run called ``name``, or the run at that path.

    Raises:
        UserError: there is none; suggests the nearest name.
    """
    path = Path(name) if "/" in name else runs_dir() / name
    if not (path / "run.json").exists():
        known = [run.name for run in all_runs()]
        raise UserError(f"no run '{name}' in {runs_dir()}{nearest(name, known)}; `paperscale runs` lists them")
    return Run(path.absolute())


def check_name(name: str) -> str:
    """Return a run's name if it can be one.

    Raises:
        UserError: it has characters that a shell, a file system or SLURM would stumble over.
    """
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "my-run"
        raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-', for example --name {better}")
    return name


def refuse_taken(name: str) -> None:
    """Check a name that the user has chosen for a new run.

    Raises:
        UserError: it cannot be a run's name, or is taken.
    """
    if (path := runs_dir() / check_name(name)).exists():
        raise UserError(
            f"run '{name}' exists at {path}; continue it with `paperscale resume {name}`, or choose another --name"
        )


def create(info: RunInfo, recipe: str) -> Run:
    """Make the directory of a new run.

    Raises:
        UserError: the name is taken, or the directory cannot be made.
    """
    run = Run(runs_dir() / check_name(info.name))
    try:
        run.path.mkdir(parents=True)
    except FileExistsError:
        refuse_taken(info.name)
    except OSError as error:
        raise UserError(f"cannot make {run.path}: {error.strerror}; set PAPERSCALE_RUNS to another folder") from error
    (run.path / "attempts").mkdir()
    run.checkpoints.mkdir()
    run.recipe.write_text(recipe)
    write_atomically(run.path / "run.json", json.dumps(asdict(info), indent=1).encode())
    return run


def free_name(base: str) -> str:
    """Return ``base``, or ``base-2``, ``base-3`` ... if that is taken."""
    number, name = 1, base
    while (runs_dir() / name).exists():
        number += 1
        name = f"{base}-{number}"
    return name
