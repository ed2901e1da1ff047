"""What a SLURM cluster has, asked of its controller."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from paperscale.errors import UserError

_KEY = re.compile(r"(?:^|\s)([A-Za-z]\w*)=(\S*)")
_ANSWER_S = 60
_GONE = ("DOWN", "DRAIN", "FAIL", "FUTURE", "NOT_RESPONDING", "PLANNED_DOWN", "POWERED_DOWN", "UNKNOWN")


@dataclass(frozen=True)
class Machine:
    """A node.

    Attributes:
        name: its name.
        cpus: CPUs that jobs may use, as SLURM counts them.
        memory_mb: memory that jobs may use.
        gpus: GPUs.
        gpu_type: their type in SLURM, empty where it names none.
        up: whether jobs can start on it, now or later.
        partitions: those that it belongs to.
    """

    name: str
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str
    up: bool
    partitions: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """A partition.

    Attributes:
        name: its name.
        default: whether jobs without a partition go there.
        up: whether its jobs start.
        max_time: its longest time limit as SLURM writes it.
        default_time: the limit of a job that asks for none.
        preempt: what happens to its jobs when others need their nodes: ``REQUEUE``, ``CANCEL``, ``SUSPEND``, ``OFF``.
        grace_s: seconds between the notice and the end of a preempted job.
        accounts: accounts that may use it, empty for all.
        qos: qualities of service that may use it, empty for all.
    """

    name: str
    default: bool
    up: bool
    max_time: str
    default_time: str
    preempt: str
    grace_s: int
    accounts: tuple[str, ...]
    qos: tuple[str, ...]


@dataclass(frozen=True)
class Association:
    """An account that the user may charge, with its qualities of service."""

    account: str
    qos: tuple[str, ...]


class Cluster:
    """The cluster that this machine's SLURM commands speak to; each thing is asked once, when it is needed."""

    def __init__(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "no SLURM here: sbatch is not on PATH; run this on a login node of the cluster, or use --cluster local"
            )

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Return the partitions by name, the default first."""
        found = [_partition(_fields(line)) for line in ask("scontrol", "-o", "show", "partition").splitlines() if line]
        return {partition.name: partition for partition in sorted(found, key=lambda p: not p.default)}

    @cached_property
    def machines(self) -> list[Machine]:
        """Return the nodes."""
        lines = ask("scontrol", "-o", "show", "node").splitlines()
        return [_machine(_fields(line)) for line in lines if line.startswith("NodeName=")]

    @cached_property
    def config(self) -> dict[str, str]:
        """Return the controller's settings."""
        pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
        return {name.strip(): value.strip() for name, equals, value in pairs if equals}

    @cached_property
    def associations(self) -> list[Association] | None:
        """Return the accounts of the user, or ``None`` where no accounting answers."""
        command = ["sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos"]
        try:
            said = ask(*command).strip()
        except UserError:
            return None
        rows = [line.split("|") for line in said.splitlines() if "|" in line]
        if said and not rows:  # it says in words, with exit code 0, that there is no accounting
            return None
        return [Association(account, _names(qos)) for account, qos in rows]

    def of_partition(self, name: str) -> list[Machine]:
        """Return the nodes of a partition."""
        return [machine for machine in self.machines if name in machine.partitions]


def ask(*command: str, env: dict[str, str] | None = None) -> str:
    """Return what a SLURM command prints.

    Args:
        command: its words.
        env: its environment, by default this process's.

    Raises:
        UserError: it is not there, fails, or does not answer.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, env=env)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH; run this on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} has not answered for {_ANSWER_S} s; see with `scontrol ping` whether the controller is up"
        ) from error
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines() or ["no answer"]
        raise UserError(f"{' '.join(command[:3])}: {said[-1]}; `paperscale doctor` checks the cluster")
    return result.stdout


def gpus_of(gres: str) -> Iterator[tuple[str, int]]:
    """Yield type (empty for none) and number of the GPUs in a Gres, such as ``gpu:a100:8(S:0-1),nvme:1``."""
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.split(":")
        if name == "gpu":
            number = rest[-1] if rest and rest[-1].isdecimal() else "1"
            yield (rest[0] if rest and not rest[0].isdecimal() else "", int(number))


def _fields(line: str) -> dict[str, str]:
    return dict(_KEY.findall(line))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name and name not in ("ALL", "(null)", "N/A"))


def _partition(fields: dict[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        up=fields.get("State", "UP") == "UP",
        max_time=fields.get("MaxTime", "UNLIMITED"),
        default_time=fields.get("DefaultTime", "NONE"),
        preempt=fields.get("PreemptMode", "OFF"),
        grace_s=int(fields["GraceTime"]) if fields.get("GraceTime", "").isdecimal() else 0,
        accounts=_names(fields.get("AllowAccounts", "")),
        qos=_names(fields.get("AllowQos", "")),
    )


def _machine(fields: dict[str, str]) -> Machine:
    gpus = list(gpus_of(fields.get("Gres", "")))
    kept_back = fields.get("MemSpecLimit", "0")
    return Machine(
        name=fields["NodeName"],
        cpus=int(fields.get("CPUEfctv") or fields["CPUTot"]),
        memory_mb=int(fields["RealMemory"]) - (int(kept_back) if kept_back.isdecimal() else 0),
        gpus=sum(number for _, number in gpus),
        gpu_type=gpus[0][0] if gpus else "",
        up=not any(word in fields.get("State", "") for word in _GONE),
        partitions=_names(fields.get("Partitions", "")),
    )
