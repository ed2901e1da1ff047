"""Cluster profiles: one typed YAML file per cluster."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from paperscale import assets
from paperscale.errors import UserError, nearest

Engine = Literal["slurm", "local"]


@dataclass(frozen=True)
class Profile:
    """How jobs run on one cluster.

    Attributes:
        name: the file's name.
        engine: ``slurm``, or ``local`` for this machine without a scheduler.
        partition: SLURM partition.
        account: SLURM account.
        qos: SLURM quality of service.
        time: time limit of an attempt, as sbatch takes it (``1-00:00:00``).
        nodes: default nodes of a job.
        procs_per_node: default processes of a node; by default one per GPU, or one.
        gpus_per_node: GPUs asked for on each node; ``None`` asks for none.
        cpus_per_proc: CPU cores of each process.
        mem_per_node: memory of a node as sbatch takes it (``64G``).
        signal_before_end_s: seconds before the time limit at which the job is told to checkpoint.
        max_requeues: attempts after the first before a run is left stopped.
        max_stalled: attempts in a row without a new checkpoint before a run is left stopped.
        env: environment variables of the job.
        setup: shell lines before the job starts, such as ``module load cuda``.
        sbatch: further ``#SBATCH`` options, passed through as they are.
        python: interpreter of the job; by default the one that submits.
    """

    name: str
    engine: Engine = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "1-00:00:00"
    nodes: int = 1
    procs_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_proc: int = 1
    mem_per_node: str | None = None
    signal_before_end_s: int = 120
    max_requeues: int = 100
    max_stalled: int = 3
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    python: str | None = None

    def __post_init__(self) -> None:
        if self.procs_per_node is None:
            object.__setattr__(self, "procs_per_node", self.gpus_per_node or 1)
        if self.engine not in get_args(Engine):
            raise UserError(f"engine: '{self.engine}' is neither slurm nor local")
        for name in ("nodes", "procs_per_node", "cpus_per_proc", "signal_before_end_s"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name}: must be a whole number of at least 1, not {getattr(self, name)!r}")
        for name, kind in (("env", dict), ("setup", list), ("sbatch", list)):
            if not isinstance(getattr(self, name), kind):
                what = "a mapping of names to values" if kind is dict else "a list of lines"
                raise UserError(f"{name}: must be {what}, not {getattr(self, name)!r}")
        if not isinstance(self.time, str):  # YAML reads 1:00:00 as the number 3600, sbatch would take that for minutes
            raise UserError(f"time: {self.time!r} is a number; write the time limit in quotes, such as '01:00:00'")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise UserError(f"time: {self.time!r} is not a time limit; write '1-00:00:00' or '02:30:00'")

    @property
    def processes_per_node(self) -> int:
        """Return the processes of a node."""
        return self.procs_per_node or 1


def folders() -> list[Path]:
    """Return where profiles are looked for, the user's own first."""
    config = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return [Path("cluster/profiles"), config / "paperscale" / "profiles", assets.cluster_dir() / "profiles"]


def all_profiles() -> dict[str, Path]:
    """Return every profile's file by name."""
    return {path.stem: path for folder in reversed(folders()) for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Profile:
    """Read a profile.

    Raises:
        UserError: there is none of that name, or a field is unknown or wrong.
    """
    known = all_profiles()
    if name not in known:
        raise UserError(f"no cluster profile '{name}'{nearest(name, known)}; there are {', '.join(known)}")
    path = known[name]
    try:
        content: Any = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    fields = {f.name for f in dataclasses.fields(Profile)} - {"name"}
    for key in content:
        if key not in fields:
            raise UserError(f"{path}: unknown field '{key}'{nearest(key, fields)}; fields: {', '.join(sorted(fields))}")
    try:
        return Profile(name=name, **content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
