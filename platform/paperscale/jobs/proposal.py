"""``paperscale cluster init``: a profile proposed from what SLURM tells of the cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from paperscale.errors import UserError, nearest
from paperscale.jobs.facts import Association, Cluster, Machine, Partition
from paperscale.jobs.profile import config_dir
from paperscale.jobs.units import seconds, size_text

_SHORT_S = 4 * 3600
_SHAPE = tuple[int, int, int, str]


def propose(name: str | None, partition: str | None) -> tuple[str, str]:
    """Return the name and the text of a profile for one partition of this cluster.

    Args:
        name: the profile's name, by default the cluster's.
        partition: by default the cluster's default partition, or else its first.

    Raises:
        UserError: this machine has no SLURM, its controller does not answer, or it has no such partition.
    """
    cluster = Cluster()
    known = cluster.partitions
    if not known:
        raise UserError("this cluster shows you no partition; ask its administrators for access")
    if partition is not None and partition not in known:
        raise UserError(f"no partition '{partition}'{nearest(partition, known)}; this cluster has {' '.join(known)}")
    chosen = known[partition] if partition else next(iter(known.values()))
    machines = cluster.of_partition(chosen.name)
    if not machines:
        raise UserError(f"partition '{chosen.name}' has no nodes; choose another with --partition")
    name = name or cluster.config.get("ClusterName", "cluster")
    shape, alike = Counter(map(_shape, machines)).most_common(1)[0]
    lines = [
        *_head(name, chosen, cluster),
        "engine: slurm",
        f"partition: {chosen.name}",
        *_charge(chosen, cluster.associations),
        *_times(chosen),
        *_size(shape, alike, machines),
        *_end(chosen, cluster.config),
    ]
    return name, "\n".join(lines) + "\n"


def write(name: str, text: str, out: Path | None, force: bool) -> Path:
    """Write a profile where ``--cluster NAME`` finds it, or to ``out``; return the file.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    path = out or config_dir() / "profiles" / f"{name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{path} exists; choose another name or --out, or replace it with --force") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose a file that you may write with --out") from error
    return path


def _shape(machine: Machine) -> _SHAPE:
    return machine.gpus, machine.cpus, machine.memory_mb, machine.gpu_type


def _describe(shape: _SHAPE) -> str:
    gpus, cpus, memory, kind = shape
    cards = f"{gpus} {kind + ' ' if kind else ''}GPUs, " if gpus else ""
    return f"{cards}{cpus} CPUs, {size_text(memory)}"


def _head(name: str, chosen: Partition, cluster: Cluster) -> list[str]:
    """Say what the cluster has, so that a reader can choose otherwise."""
    version = cluster.config.get("SLURM_VERSION", "")
    lines = [
        f"# Cluster {cluster.config.get('ClusterName', name)} (SLURM {version}), partition {chosen.name}; proposed by",
        f"# `paperscale cluster init`. Look it over, then run `paperscale cluster check {name}`.",
        "# Partitions:",
    ]
    for partition in cluster.partitions.values():
        machines = cluster.of_partition(partition.name)
        kinds = Counter(map(_shape, machines)).most_common(2)
        shapes = "; ".join(f"{number} x {_describe(shape)}" for shape, number in kinds) or "no nodes"
        mark = " (default)" if partition.default else ""
        lines.append(f"#   {partition.name}{mark}: {shapes}; at most {partition.max_time}")
    return lines


def _charge(chosen: Partition, associations: list[Association] | None) -> list[str]:
    """Propose an account where there is no choice, else show the choice."""
    if not associations:
        why = "no accounting answers" if associations is None else "you have no account"
        return [f"# account: my-lab            # {why} here"]
    accounts = sorted({a.account for a in associations if not chosen.accounts or a.account in chosen.accounts})
    qos = sorted({name for a in associations for name in a.qos if not chosen.qos or name in chosen.qos})
    lines = [f"account: {accounts[0]}"] if len(accounts) == 1 else [f"# account: ...   # one of {', '.join(accounts)}"]
    return [*lines, f"# qos: ...   # one of {', '.join(qos)}"] if qos else lines


def _times(chosen: Partition) -> list[str]:
    """Propose the longest limit, up to a day: a run goes on in the next attempt, and short jobs start sooner."""
    unlimited = seconds(chosen.max_time) == float("inf")
    longest = seconds(chosen.max_time)
    time = "1-00:00:00" if unlimited or longest > 86400 else chosen.max_time
    lines = [f'time: "{time}"   # of an attempt; the run goes on in the next one']
    return lines if unlimited else [*lines, f'max_time: "{chosen.max_time}"']


def _size(shape: _SHAPE, alike: int, machines: list[Machine]) -> list[str]:
    """Describe a whole node, and say so where nodes differ."""
    gpus, cpus, memory, kind = shape
    lines = []
    if alike < len(machines):
        lines.append(f"# {alike} of the {len(machines)} nodes are like this one; use `constraint` to stay on them.")
    if gpus:
        node = f"gpus: {gpus}, cpus: {cpus}, memory: {size_text(memory)}" + (f", gpu_type: {kind}" if kind else "")
        return [
            *lines,
            f"gpus_per_node: {gpus}   # one process per GPU",
            f"node: {{{node}}}   # CPUs and memory go with GPUs",
            "# node.gpu_memory: 80G lets `paperscale submit` compare a recipe's memory with the GPU's",
        ]
    return [
        *lines,
        f"node: {{cpus: {cpus}, memory: {size_text(memory)}}}   # memory is asked for in proportion to CPUs",
        f"cpus_per_proc: {cpus}   # one process per node, with all of it",
    ]


def _end(chosen: Partition, config: dict[str, str]) -> list[str]:
    """Say what happens to jobs that others push aside."""
    notice = f"after {chosen.grace_s} s" if chosen.grace_s else "without notice (GraceTime=0)"
    lines = []
    if chosen.preempt not in ("OFF", ""):
        lines.append(f"# Jobs here may be preempted (PreemptMode={chosen.preempt}): ended {notice}, and run again.")
    lines.append(f"# KillWait is {config.get('KillWait', 'unknown')}: what a job has after its limit to end by itself.")
    return [*lines, "# Network interfaces are found when a job starts; to choose: `network: {interface: ib0}`."]
