"""Cluster profiles: one typed YAML file per cluster."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from paperscale import assets
from paperscale.errors import UserError, nearest
from paperscale.jobs import typed_yaml
from paperscale.jobs.units import is_size, is_time, seconds, size_bytes, size_text

Engine = Literal["slurm", "local"]
GpuRequest = Literal["gpus-per-node", "gres", "none"]
Signal = Literal["USR1", "USR2", "TERM"]
RunAgain = Literal["requeue", "chain"]
Runtime = Literal["pyxis", "apptainer"]

OWNED = {
    "job-name": "--name of `paperscale submit`",
    "partition": "the field `partition`",
    "account": "the field `account`",
    "qos": "the field `qos`",
    "constraint": "the field `constraint`",
    "nodes": "the field `nodes`, or --nodes",
    "ntasks": "the field `procs_per_node`, or --procs-per-node",
    "ntasks-per-node": "the field `procs_per_node`, or --procs-per-node",
    "cpus-per-task": "the field `cpus_per_proc`",
    "gpus": "the field `gpus_per_node`, or --gpus-per-node",
    "gpus-per-node": "the field `gpus_per_node`, or --gpus-per-node",
    "gpus-per-task": "the field `gpus_per_node`, or --gpus-per-node",
    "cpus-per-gpu": "the field `cpus_per_gpu`",
    "mem": "the field `mem_per_node`",
    "mem-per-cpu": "the field `mem_per_node`",
    "mem-per-gpu": "the field `mem_per_node`",
    "time": "the field `time`, or --time",
    "signal": "the fields `signal` and `signal_before_end_s`",
    "requeue": "the fields `preempt` and `max_requeues`",
    "no-requeue": "the fields `preempt` and `max_requeues`",
    "array": "--sweep or --repeat of `paperscale submit`",
    "dependency": "--after of `paperscale submit`",
    "output": "nothing: what a job says is in its run's job.log",
    "error": "nothing: what a job says is in its run's job.log",
    "open-mode": "nothing: a run's job.log is always appended to",
    "chdir": "nothing: a job starts where it was submitted",
    "wrap": "the field `setup`",
    "wait": "`paperscale watch`",
    "test-only": "`paperscale cluster check`",
    "parsable": "nothing: `paperscale submit` prints the job's id",
}
"""Options of sbatch that a profile's ``sbatch`` must not carry, and what to use instead."""

_SHORT = {"J": "job-name", "p": "partition", "A": "account", "q": "qos", "C": "constraint", "N": "nodes",
          "n": "ntasks", "c": "cpus-per-task", "G": "gpus", "t": "time", "a": "array", "d": "dependency",
          "o": "output", "e": "error", "D": "chdir", "W": "wait"}  # fmt: skip
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _at_least(section: Any, minimum: int, *names: str, prefix: str = "") -> None:
    """Check whole numbers of a section; ``None`` stands for a default."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise UserError(f"{prefix}{name}: must be a whole number of at least {minimum}, not {value}; raise it")


def _sizes(section: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not is_size(value):
            raise UserError(f"{prefix}{name}: '{value}' is not a size; write a whole number with a unit, such as 64G")


@dataclass(frozen=True)
class Node:
    """A whole node of the cluster: a job asks for CPUs and memory in proportion to the GPUs that it takes of it.

    Attributes:
        gpus: GPUs.
        cpus: CPUs, as SLURM counts them.
        memory: memory that jobs may use (``1000G``).
        gpu_memory: memory of one GPU (``80G``).
        gpu_type: the GPUs' name in SLURM (``a100``, as in ``Gres=gpu:a100:8``); jobs ask for it if it is given.
    """

    gpus: int | None = None
    cpus: int | None = None
    memory: str | None = None
    gpu_memory: str | None = None
    gpu_type: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "gpus", "cpus", prefix="node.")
        _sizes(self, "memory", "gpu_memory", prefix="node.")
        if self.gpu_type and not re.fullmatch(r"[A-Za-z0-9._-]+", self.gpu_type):
            raise UserError(
                f"node.gpu_type: '{self.gpu_type}' is not a type of Gres; `sinfo -o %G` shows what there is"
            )


@dataclass(frozen=True)
class Container:
    """The container that a job's processes run in; the run's folder and the working directory are always mounted.

    Attributes:
        runtime: ``pyxis`` (options of srun) or ``apptainer``.
        image: a file, or a name that the runtime fetches; may hold ``$NAME``.
        mounts: ``SOURCE``, ``SOURCE:TARGET`` or ``SOURCE:TARGET:ro``; may hold ``$NAME``, expanded in the job.
        workdir: directory that processes start in; by default the one that the job was submitted in.
        options: further options of srun (pyxis) or of ``apptainer exec``, each a word of its own.
    """

    runtime: Runtime
    image: str
    mounts: list[str] = field(default_factory=list)
    workdir: str | None = None
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for mount in self.mounts:
            if "," in mount or not re.fullmatch(r"[/$][^:]*(:[/$][^:]*(:[^:/]+)?)?", mount, re.DOTALL):
                raise UserError(
                    f"container.mounts: '{mount}' is not a mount; write /source, /source:/target or /source:/target:ro"
                )


@dataclass(frozen=True)
class Network:
    """The network between nodes, as variables of NCCL and Gloo; what is not given is found when the job starts.

    Attributes:
        interface: name of the interface that nodes reach each other by (``ib0``).
        nccl_ib_hca: InfiniBand adapters that NCCL uses (``mlx5_0,mlx5_1``).
        nccl_ib_gid_index: index of the address on RoCE networks.
        nccl_ib_disable: whether NCCL must leave InfiniBand alone.
    """

    interface: str | None = None
    nccl_ib_hca: str | None = None
    nccl_ib_gid_index: int | None = None
    nccl_ib_disable: bool | None = None

    def __post_init__(self) -> None:
        for name in ("interface", "nccl_ib_hca"):
            value = getattr(self, name)
            if value is not None and re.search(r"\s", value):
                raise UserError(f"network.{name}: {value!r} holds a space; write names as `ip link` does, 'ib0,ib1'")

    def variables(self) -> dict[str, str]:
        """Return the environment variables."""
        found = {
            "NCCL_SOCKET_IFNAME": self.interface,
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_IB_HCA": self.nccl_ib_hca,
            "NCCL_IB_GID_INDEX": self.nccl_ib_gid_index,
            "NCCL_IB_DISABLE": None if self.nccl_ib_disable is None else int(self.nccl_ib_disable),
        }
        return {name: str(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Watchdog:
    """When a job that makes no progress is ended and run again.

    Attributes:
        hang_s: seconds without a step; by default derived from the time that steps take.
        start_s: seconds from a process's start to its first step.
    """

    hang_s: int | None = None
    start_s: int = 600

    def __post_init__(self) -> None:
        _at_least(self, 1, "hang_s", "start_s", prefix="watchdog.")


@dataclass(frozen=True)
class Share:
    """What a job takes of each of its nodes.

    Attributes:
        gpus: GPUs, 0 for none.
        cpus: CPUs of all processes together.
        cpus_per_proc: CPUs of each process.
        memory: memory as sbatch takes it (``0``: all of the node), ``None`` for the cluster's default.
        whole: whether that is the whole node.
    """

    gpus: int
    cpus: int
    cpus_per_proc: int
    memory: str | None
    whole: bool


@dataclass(frozen=True)
class Profile:
    """How jobs run on one cluster.

    Attributes:
        name: the file's name.
        engine: ``slurm``, or ``local`` for this machine without a scheduler.
        partition: SLURM partition.
        account: SLURM account.
        qos: SLURM quality of service.
        constraint: features that nodes must have (``a100&ib``).
        nodes: default nodes of a job.
        gpus_per_node: GPUs asked for on each node; ``None`` asks for none.
        procs_per_node: default processes of a node; by default one per GPU, or one.
        cpus_per_gpu: CPUs asked for with each GPU; by default the GPU's share of the node's.
        cpus_per_proc: CPUs of each process; wins over ``cpus_per_gpu`` and the share.
        mem_per_node: memory of a node as sbatch takes it (``64G``, ``0`` for all); by default the job's share.
        node: what a whole node has.
        gpu_request: how GPUs are asked for: ``--gpus-per-node``, ``--gres``, or not at all where nodes are given whole.
        time: time limit of an attempt, as sbatch takes it (``1-00:00:00``).
        max_time: the longest limit that the cluster allows.
        signal: the signal that tells the job to checkpoint before its time limit.
        signal_before_end_s: seconds before the time limit at which it is sent.
        preempt: how a job that has to go on is run again: ``requeue`` puts it back into the queue, ``chain`` submits
            its script anew, where a cluster forbids the first.
        max_requeues: attempts after the first before a run is left stopped.
        max_stalled: attempts in a row without a new checkpoint before a run is left stopped.
        watchdog: when a job that makes no progress is ended.
        modules: environment modules to load.
        setup: shell lines before the job starts, such as ``source env.sh``.
        env: environment variables of the job, literally.
        network: the network between nodes.
        scratch: folder on each node (``/scratch/$USER``) in which a job has a folder of its own, removed after it; its
            path is the processes' TMPDIR and PAPERSCALE_SCRATCH.
        container: the container of the job's processes; ``None`` for bare metal.
        python: interpreter of the job; by default the one that submits, or the container's ``python``.
        sbatch: further ``#SBATCH`` options, passed through as they are.
    """

    name: str
    engine: Engine = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    procs_per_node: int | None = None
    cpus_per_gpu: int | None = None
    cpus_per_proc: int | None = None
    mem_per_node: str | None = None
    node: Node = field(default_factory=Node)
    gpu_request: GpuRequest = "gpus-per-node"
    time: str = "1-00:00:00"
    max_time: str | None = None
    signal: Signal = "USR1"
    signal_before_end_s: int = 120
    preempt: RunAgain = "requeue"
    max_requeues: int = 100
    max_stalled: int = 3
    watchdog: Watchdog = field(default_factory=Watchdog)
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    network: Network = field(default_factory=Network)
    scratch: str | None = None
    container: Container | None = None
    python: str | None = None
    sbatch: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.procs_per_node is None:
            object.__setattr__(self, "procs_per_node", self.gpus_per_node or 1)
        _at_least(self, 1, "nodes", "procs_per_node", "cpus_per_gpu", "cpus_per_proc", "signal_before_end_s")
        _at_least(self, 1, "max_stalled")
        _at_least(self, 0, "gpus_per_node", "max_requeues")
        if self.mem_per_node != "0":
            _sizes(self, "mem_per_node")
        _check_time(self)
        _check_words(self)
        _check_scratch(self)
        for line in self.sbatch:
            _check_sbatch(line)
        if self.engine == "local":
            _check_local(self)
        _check_share(self)

    @property
    def processes_per_node(self) -> int:
        """Return the processes of a node."""
        return self.procs_per_node or 1

    @property
    def share(self) -> Share:
        """Return what a job takes of each of its nodes: CPUs and memory in proportion to its GPUs."""
        procs, gpus, node = self.processes_per_node, self.gpus_per_node or 0, self.node
        part = Fraction(gpus, node.gpus) if gpus and node.gpus else None
        if self.cpus_per_proc:
            cpus_per_proc = self.cpus_per_proc
        elif self.cpus_per_gpu and gpus:
            cpus_per_proc = max(1, self.cpus_per_gpu * gpus // procs)
        else:
            cpus_per_proc = max(1, int(node.cpus * part) // procs) if node.cpus and part else 1
        cpus = procs * cpus_per_proc
        if part is None and node.cpus:
            part = Fraction(cpus, node.cpus)
        memory = self.mem_per_node
        if memory is None and part == 1:
            memory = "0"
        elif memory is None and part and node.memory:
            memory = size_text(int(size_bytes(node.memory) * part) >> 20)
        return Share(gpus, cpus, cpus_per_proc, memory, whole=part == 1)

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables of the job; ``env`` wins over ``network``."""
        return {**self.network.variables(), **self.env}


def _check_time(profile: Profile) -> None:
    for name in ("time", "max_time"):
        limit = getattr(profile, name)
        if limit is not None and not is_time(limit):
            raise UserError(f"{name}: '{limit}' is not a time limit; write '1-00:00:00' or '02:30:00'")
    if profile.max_time and seconds(profile.time) > seconds(profile.max_time):
        raise UserError(
            f"time: {profile.time} is longer than the cluster allows; use {profile.max_time} or less (max_time)"
        )
    if profile.engine == "slurm" and seconds(profile.time) <= profile.signal_before_end_s:
        raise UserError(
            f"time: a job of {profile.time} would be told to stop as it starts; "
            f"make it longer than signal_before_end_s ({profile.signal_before_end_s} s)"
        )


def _check_words(profile: Profile) -> None:
    """Check what goes into the script as names and words."""
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(profile, name)
        if value is not None and not re.fullmatch(r"[^\s\"'\\#]+", value):
            raise UserError(f"{name}: {value!r} holds a space, a quote or a '#'; write it as `sinfo` or `sacctmgr` do")
    for name, value in profile.env.items():
        if not _VARIABLE.fullmatch(name):
            raise UserError(f"env.{name}: not a name of a variable; use letters, digits and '_'")
        if "\0" in value:
            raise UserError(f"env.{name}: holds a NUL character, which no variable can; remove it")
    for module in profile.modules:
        if not re.fullmatch(r"[\w.+/@:=-]+", module):
            raise UserError(f"modules: {module!r} is not a module's name; write one per entry, as `module avail` does")


def _check_scratch(profile: Profile) -> None:
    if profile.scratch and not profile.scratch.startswith(("/", "$")):
        raise UserError(f"scratch: '{profile.scratch}' is not an absolute path; start it with / or $NAME")


def _check_sbatch(line: str) -> None:
    """Refuse what would be another option, or one that the script depends on."""
    match = re.fullmatch(r"(?:--([a-z][a-z0-9-]*)|-([A-Za-z]))(?:[= ]?(.*))?", line)
    if not match:
        raise UserError(f"sbatch: {line!r} is not an option; write one per entry, such as --reservation=mine")
    option = match[1] or _SHORT.get(match[2], match[2])
    full = [option] if option in OWNED else [name for name in OWNED if len(option) > 1 and name.startswith(option)]
    if full:  # sbatch takes the beginning of an option's name for the option
        raise UserError(f"sbatch: {line!r} is not for a profile to say; use {OWNED[full[0]]}")
    if option == "gres" and "gpu" in (match[3] or ""):
        raise UserError(f"sbatch: {line!r} is not for a profile to say; use gpus_per_node with `gpu_request: gres`")


def _check_local(profile: Profile) -> None:
    """Refuse what would be without effect on this machine."""
    for name in ("partition", "account", "qos", "constraint", "container", "scratch", "max_time", "sbatch"):
        if getattr(profile, name):
            raise UserError(f"{name}: the local engine has no use for it; leave it out, or use `engine: slurm`")


def _check_share(profile: Profile) -> None:
    """Refuse more than a node has."""
    gpus, node = profile.gpus_per_node or 0, profile.node
    if node.gpus and gpus > node.gpus:
        raise UserError(
            f"gpus_per_node: {gpus} asked for, a node of '{profile.name}' has {node.gpus} (node.gpus); "
            f"use {node.gpus} or fewer"
        )
    if node.cpus and profile.engine == "slurm" and profile.share.cpus > node.cpus:
        raise UserError(
            f"procs_per_node: {profile.procs_per_node} processes of {profile.share.cpus_per_proc} CPUs asked for, a "
            f"node of '{profile.name}' has {node.cpus} (node.cpus); lower procs_per_node or cpus_per_proc"
        )


def folders() -> list[Path]:
    """Return where profiles are looked for, the user's own first."""
    return [Path("cluster/profiles"), config_dir() / "profiles", assets.cluster_dir() / "profiles"]


def config_dir() -> Path:
    """Return the user's own folder of profiles and templates."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "paperscale"


def all_profiles() -> dict[str, Path]:
    """Return every profile's file by name."""
    return {path.stem: path for folder in reversed(folders()) for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Profile:
    """Read a profile, with those that it extends.

    Raises:
        UserError: there is none of that name, or a field is unknown or wrong.
    """
    values = _values(name, ())
    try:
        return typed_yaml.build(Profile, values, name=name)
    except UserError as error:
        raise UserError(f"{_find(name)}: {error}") from error


def _find(name: str) -> Path:
    known = all_profiles()
    if name not in known:
        raise UserError(f"no cluster profile '{name}'{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def _values(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of a profile's fields, laid over those of the profile that it extends."""
    path = _find(name)
    content = typed_yaml.read(path)
    base = content.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: extends: must be the name of one profile, not {base!r}; write `extends: NAME`")
    if base in (*above, name):
        raise UserError(f"{path}: extends: '{base}' leads back to this profile; extend another, or copy what you need")
    try:
        values = typed_yaml.convert(Profile, content, OWNED)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return typed_yaml.merge(_values(base, (*above, name)), values) if base else values
