"""A run is a directory (contract 3). Everything about it is read from there.

::

    runs/<name>/
        run.json          identity: recipe, cluster, shape, W&B id; written once, at submission
        recipe.yaml       the resolved recipe
        code/             the code it runs, as it was at submission
        job.sh            the rendered job script
        job               engine and id of the job that carries the run now
        job.log           what the job script said
        attempts/0001/    rank-0.log ..., node-0.json ..., attempt.json, preflight.json, stragglers.json, error (what
                          failed first) and verdict (its exit code), exit_code and cause (by the job script), suspects
                          (nodes), hang.json and stacks-rank-0.txt ... (of a hang), amends.json (what the next
                          attempts heed: samples to pass over, a smaller forward pass); recipe.yaml and results.json
                          (those that held until a later `resume` changed the recipe, or trained on)
        checkpoints/      step-00000400/ ...
        init/             the weights that it began with, where the recipe names some
        progress.json     where the training is
        metrics.jsonl     every logged row
        results.json      the final metrics; its presence means finished
        evaluations/      what `validate` and `test` have found since, a file for each
        media/            pictures that were logged, each with what it shows
        cancelled         present once the run has been cancelled; says by whom
        cancel-taken      newer than that once the scheduler has been told
        stop, save        present while the user wants the run to end, or to write a checkpoint, at the next step
        excluded          nodes that the job avoids: host, Unix time, reason
        wandb/            W&B's files
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paperscale.atomic import write_atomically
from paperscale.errors import (
    BAD_NODE,
    FINISHED,
    HUNG,
    LOST,
    OUT_OF_MEMORY,
    REQUEUE,
    ROLLBACK,
    UserError,
    nearest,
)

_CAUSES = {
    FINISHED: "finished",
    REQUEUE: "signal",
    LOST: "lost",
    HUNG: "hang",
    BAD_NODE: "bad-node",
    ROLLBACK: "rollback",
    OUT_OF_MEMORY: "out-of-memory",
}
EXCLUDED_S = 12 * 3600
"""Seconds that a node which was found bad is left out."""
LONGEST_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")


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
        time: time limit of an attempt as SLURM takes it, empty for none.
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
    time: str = ""


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
            return RunInfo(**json.loads(_content(f"{self.path}/run.json")))
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
    def exists(self) -> bool:
        """Return whether the folder is a run's."""
        return (self.path / "run.json").exists()

    @property
    def evaluations(self) -> Path:
        """Return the folder of what ``validate`` and ``test`` have found."""
        return self.path / "evaluations"

    @property
    def metrics(self) -> Path:
        """Return the file of logged rows."""
        return self.path / "metrics.jsonl"

    def attempts(self) -> list[Attempt]:
        """Return the attempts, oldest first."""
        return [Attempt(path) for path in sorted((self.path / "attempts").glob("[0-9]*"))]

    @property
    def attempt_count(self) -> int:
        """Return the number of attempts, quicker than :meth:`attempts` does."""
        try:
            return sum(name[:1].isdigit() for name in os.listdir(f"{self.path}/attempts"))  # noqa: PTH208
        except OSError:
            return 0

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the run, empty where it does not exist yet."""
        return read_json(f"{self.path}/{name}")

    @property
    def job(self) -> str | None:
        """Return the id of the job that carries the run now."""
        try:
            return _content(f"{self.path}/job").decode().strip()
        except FileNotFoundError:
            return None

    def set_job(self, job: str) -> None:
        """Note the job that carries the run now."""
        _write(self.path / "job", job)

    @property
    def cancelled(self) -> bool:
        """Return whether the run has been cancelled."""
        return (self.path / "cancelled").exists()

    @property
    def cancelled_by(self) -> str:
        """Return who has cancelled the run: ``paperscale cancel`` or ``scancel``; empty if nobody has."""
        return _read(self.path / "cancelled") or "paperscale cancel" if self.cancelled else ""

    def note_cancel_taken(self) -> None:
        """Note that the scheduler has been told to cancel the run."""
        (self.path / "cancel-taken").touch()

    @property
    def cancel_taken(self) -> bool:
        """Return whether the scheduler has been told of the cancellation that the run is marked with."""
        with contextlib.suppress(OSError):
            return (self.path / "cancel-taken").stat().st_mtime >= (self.path / "cancelled").stat().st_mtime
        return False

    @property
    def excluded(self) -> list[dict[str, Any]]:
        """Return the nodes that the job avoids, each with ``host``, ``time`` and ``reason``."""
        rows = re.findall(r"^(\S+) (\d+(?:\.\d+)?)(?: (.*))?$", _read(self.path / "excluded"), re.MULTILINE)
        return [{"host": host, "time": float(found), "reason": reason.strip()} for host, found, reason in rows]

    @property
    def max_attempts(self) -> int | None:
        """Return how many attempts the job script makes before it leaves the run stopped."""
        found = re.search(r"^max_requeues=(\d+)", _read(self.script), re.MULTILINE)
        return int(found[1]) + 1 if found else None

    def complaint(self) -> str:
        """Return why the job script made no further attempt, in its own words; empty where it has not said so."""
        text = _read(self.path / "job.log")[-(1 << 16) :]
        since_start = re.split(r"^\S+ attempt \d+ on .*$", text, flags=re.MULTILINE)[-1]
        said = re.findall(r"^\S+ (?:stopped|failed for good)[: ]+(.*)", since_start, re.MULTILINE)
        return said[-1].strip() if said else ""


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
        _write(self.path / "attempt.json", json.dumps({**self.facts, **facts}, indent=1))

    @property
    def error(self) -> str:
        """Return what ended the attempt, in the words of the rank that failed first; empty if none has."""
        return _read(self.path / "error")

    @property
    def first_rank(self) -> int:
        """Return the rank that failed first, 0 where none is named."""
        found = re.match(r"rank (\d+)", self.error)
        return int(found[1]) if found else 0

    @property
    def cause(self) -> str:
        """Return why the attempt ended, in a word; empty while it lives."""
        word = _read(self.path / "cause")
        if word or self.exit_code is None:
            return word
        return _CAUSES.get(self.exit_code, "signal" if self.exit_code >= 128 else "failed")

    @property
    def started(self) -> float:
        """Return when the attempt started, in Unix time."""
        return self.facts.get("started") or self.path.stat().st_mtime

    @property
    def ended(self) -> float | None:
        """Return when the attempt ended, in Unix time, ``None`` while it lives (or if its job script was killed)."""
        try:
            return (self.path / "exit_code").stat().st_mtime
        except OSError:
            return self.facts.get("ended")

    @property
    def stragglers(self) -> list[dict[str, Any]]:
        """Return the slow ranks, each with ``rank``, ``host``, ``slower`` (times the others' step) and ``what``."""
        found: Any = read_json(self.path / "stragglers.json")
        return found or []

    def nodes(self) -> list[dict[str, Any]]:
        """Return what each node's agent wrote last: ``node``, ``host``, ``time`` and ``ranks``."""
        found = [read_json(path) for path in self.path.glob("node-*.json")]
        return sorted((node for node in found if "time" in node), key=lambda node: node["node"])

    def ranks(self) -> list[int]:
        """Return the ranks that have a log."""
        return sorted(int(path.stem[5:]) for path in self.path.glob("rank-*.log") if path.stem[5:].isdigit())

    @property
    def verdict(self) -> int | None:
        """Return the exit code of what failed first, ``None`` where nothing has."""
        try:
            return int((self.path / "verdict").read_text())
        except (OSError, ValueError):
            return None

    def fail(self, code: int, error: str) -> None:
        """Note what ends the attempt, unless something else failed before: what follows is mostly its consequence.

        That a rank was lost is what the others see of any failure: it gives way to the failure itself.
        """
        with contextlib.suppress(OSError):
            with (self.path / "error").open("w" if self.verdict == LOST != code else "x") as file:
                file.write(f"{error}\n")
            (self.path / "verdict").write_text(f"{code}\n")

    def suspect(self, host: str, reason: str) -> None:
        """Name a node that the next attempt should do without."""
        with contextlib.suppress(OSError), (self.path / "suspects").open("a") as file:
            file.write(f"{host} {int(time.time())} {reason}\n")

    def log(self, rank: int = 0) -> Path:
        """Return the log of a rank."""
        return self.path / f"rank-{rank}.log"


def read_json(path: Path | str) -> dict[str, Any]:
    """Return a JSON file's content, empty where it does not exist."""
    try:
        return json.loads(_content(path))
    except (OSError, ValueError):
        return {}


def _content(path: Path | str) -> bytes:
    """Return a file's content, in a third of the time that pathlib takes: there may be ten thousand runs."""
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _write(path: Path, content: str) -> None:
    write_atomically(path, content.encode())


def runs_dir() -> Path:
    """Return the folder of runs: ``$PAPERSCALE_RUNS``, by default ``./runs``."""
    return Path(os.environ.get("PAPERSCALE_RUNS", "runs")).absolute()


def all_runs() -> list[Run]:
    """Return all runs, newest first by when ``run.json`` was written."""
    return [run for _, run in dated_runs()]


def dated_runs() -> list[tuple[float, Run]]:
    """Return all runs with when their ``run.json`` was written (no sooner than they were created), newest first."""
    folder, found = runs_dir(), []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                written = os.stat(f"{entry.path}/run.json").st_mtime  # noqa: PTH116  there may be ten thousand
                found.append((written, Run(folder / entry.name)))
    return sorted(found, key=lambda pair: pair[0], reverse=True)


def find_run(name: str) -> Run:
    """Return the run called ``name``, or the run at that path.

    Raises:
        UserError: there is none; suggests the nearest name.
    """
    path = Path(name) if "/" in name else runs_dir() / name
    if not (path / "run.json").exists():
        if (path / "sweep.json").exists():
            raise UserError(
                f"'{path.name}' is a sweep, not a run: `paperscale runs --group {path.name}` lists its runs, "
                f"`paperscale cancel --group {path.name}` ends them"
            )
        known = [run.name for run in all_runs()]
        raise UserError(f"no run '{name}' in {runs_dir()}{nearest(name, known)}; `paperscale runs` lists them")
    return Run(path.absolute())


def check_name(name: str) -> str:
    """Return a run's name if it can be one.

    Raises:
        UserError: it has characters that a shell, a file system or SLURM would stumble over.
    """
    if len(name) > LONGEST_NAME:
        raise UserError(f"--name: {len(name)} letters, a name has at most {LONGEST_NAME}; shorten it")
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:LONGEST_NAME] or "my-run"
        raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-', for example --name {better}")
    return name


def refuse_taken(name: str) -> None:
    """Check a name that the user has chosen for a new run.

    Raises:
        UserError: it cannot be a run's name, or is taken.
    """
    if (path := runs_dir() / check_name(name)).exists():
        if not any((path / file).exists() for file in ("run.json", "sweep.json")):
            raise UserError(
                f"{path} holds what is left of something else; remove that folder, or choose another --name"
            )
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
    return fill(run, info, recipe)


def fill(run: Run, info: RunInfo, recipe: str) -> Run:
    """Write what a new run's directory holds; return the run."""
    (run.path / "attempts").mkdir(parents=True)
    run.checkpoints.mkdir()
    run.recipe.write_text(recipe)
    _write(run.path / "run.json", json.dumps(asdict(info), indent=1))
    return run


def free_name(base: str) -> str:
    """Return ``base``, or ``base-2``, ``base-3`` ... if that is taken."""
    number, name = 1, base
    while (runs_dir() / name).exists():
        number += 1
        name = f"{base}-{number}"
    return name
