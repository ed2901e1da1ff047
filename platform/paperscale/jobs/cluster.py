"""A profile compared with the cluster that it describes: ``paperscale cluster check``."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from paperscale.errors import UserError, nearest
from paperscale.findings import Finding
from paperscale.jobs.facts import Cluster, Machine, Partition, ask
from paperscale.jobs.profile import Profile
from paperscale.jobs.render import render
from paperscale.jobs.run import RunInfo
from paperscale.jobs.units import seconds, size_bytes, size_text

_MODULE_S = 60


def problems(
    profile: Profile, nodes: int | None = None, procs_per_node: int | None = None, cluster: Cluster | None = None
) -> list[Finding]:
    """Return what of a job the profile's partition does not have; cheap enough to be asked at every submission.

    Args:
        profile: the profile, with the time and the GPUs that are asked for.
        nodes: nodes of the job, by default the profile's.
        procs_per_node: processes of each node, by default the profile's.
        cluster: what is known of the cluster already.

    Raises:
        UserError: this machine has no SLURM, or its controller does not answer.
    """
    profile = dataclasses.replace(
        profile, nodes=nodes or profile.nodes, procs_per_node=procs_per_node or profile.procs_per_node
    )
    if profile.engine == "local":
        return list(_local_problems(profile))
    cluster = cluster or Cluster()
    partition = _partition(profile, cluster)
    if isinstance(partition, Finding):
        return [partition]
    return [*_partition_problems(profile, partition), *_size_problems(profile, partition, cluster)]


def refuse(profile: Profile, nodes: int | None = None, procs_per_node: int | None = None) -> None:
    """Refuse what the cluster cannot run, before anything is written or queued.

    Raises:
        UserError: the first problem, with its fix.
    """
    for finding in problems(profile, nodes, procs_per_node):
        if finding.level == "FAIL":
            raise UserError(f"{finding.found}; {finding.fix}")


def not_asked(error: UserError) -> Finding:
    """Return the finding that a cluster could not be asked: it has no SLURM here, or a controller that is silent."""
    what, _, fix = str(error).rpartition("; ")
    if "not on PATH" in what:
        return Finding("FAIL", "SLURM", what, fix)
    fix = "ask the administrators, or wait until `scontrol ping` says that it is up: the runs go on"
    return Finding("FAIL", "SLURM", f"the controller does not answer ({what})", fix)


def _local_problems(profile: Profile) -> Iterator[Finding]:
    if profile.nodes != 1:
        yield Finding(
            "FAIL", "nodes", f"{profile.nodes} nodes asked for: the local cluster is one node", "use --nodes 1"
        )


def _partition(profile: Profile, cluster: Cluster) -> Partition | Finding:
    """Return the partition that the profile's jobs go to, or why there is none."""
    names = " ".join(cluster.partitions)
    if profile.partition is None:
        default = next((partition for partition in cluster.partitions.values() if partition.default), None)
        fix = f"set `partition:` in the profile to one of {names}"
        return default or Finding("FAIL", "partition", "this cluster has no default partition", fix)
    first = profile.partition.split(",")[0]
    if first not in cluster.partitions:
        hint = nearest(first, cluster.partitions)
        return Finding(
            "FAIL",
            "partition",
            f"cluster '{profile.name}': no partition '{first}'; this cluster has {names}",
            hint.removeprefix("; ") or "set `partition:` in the profile to one of them",
        )
    return cluster.partitions[first]


def _partition_problems(profile: Profile, partition: Partition) -> Iterator[Finding]:
    where = f"partition '{partition.name}' of cluster '{profile.name}'"
    if not partition.up:
        yield Finding("WARN", "partition", f"{where} is not up", "jobs wait until it is; `sinfo` shows when")
    if seconds(profile.time) > seconds(partition.max_time):
        limit = partition.max_time
        yield Finding(
            "FAIL", "time", f"time {profile.time} asked for, {where} allows {limit}", f"use --time {limit} or less"
        )
    for name, allowed in (("account", partition.accounts), ("qos", partition.qos)):
        value = getattr(profile, name)
        if value and allowed and value not in allowed:
            fix = f"set `{name}:` in the profile to one of {' '.join(allowed)}"
            yield Finding("FAIL", name, f"{where} does not admit {name} '{value}'", fix)


def _size_problems(profile: Profile, partition: Partition, cluster: Cluster) -> Iterator[Finding]:
    """Compare what is asked of each node with the nodes of the partition."""
    machines, share = cluster.of_partition(partition.name), profile.share
    where = f"partition '{partition.name}' of cluster '{profile.name}'"
    if profile.nodes > len(machines):
        fix = f"use --nodes {len(machines)} or fewer"
        yield Finding("FAIL", "nodes", f"{profile.nodes} nodes asked for, {where} has {len(machines)}", fix)
        return
    cpus, gpus, memory = (max(getattr(m, name) for m in machines) for name in ("cpus", "gpus", "memory_mb"))
    if share.cpus > cpus:
        yield Finding(
            "FAIL",
            "CPUs",
            f"{profile.procs_per_node} processes of {share.cpus_per_proc} CPUs on a node asked for, a node of {where} "
            f"has {cpus} CPUs",
            "lower --procs-per-node or the profile's cpus_per_proc",
        )
    elif share.gpus > gpus and profile.gpu_request != "none":
        fix = f"use --gpus-per-node {gpus} or fewer" if gpus else "leave gpus_per_node out, or choose another partition"
        yield Finding("FAIL", "GPUs", f"{share.gpus} GPUs on a node asked for, a node of {where} has {gpus}", fix)
    elif _megabytes(share.memory) > memory:
        yield Finding(
            "FAIL",
            "memory",
            f"{share.memory} of memory on a node asked for, a node of {where} has {size_text(memory)}",
            f"lower the profile's mem_per_node, or node.memory, to {size_text(memory)}",
        )
    else:
        yield from _fitting_problems(profile, machines, where)


def _fitting_problems(profile: Profile, machines: list[Machine], where: str) -> Iterator[Finding]:
    """Count the nodes that have all of what is asked for together."""
    share, kind = profile.share, profile.node.gpu_type
    fitting = [
        machine
        for machine in machines
        if machine.cpus >= share.cpus
        and machine.memory_mb >= _megabytes(share.memory)
        and (profile.gpu_request == "none" or machine.gpus >= share.gpus)
        and (not share.gpus or not kind or profile.gpu_request == "none" or machine.gpu_type == kind)
    ]
    if len(fitting) < profile.nodes:
        kinds = ", ".join(sorted({machine.gpu_type for machine in machines if machine.gpu_type})) or "none with a name"
        yield Finding(
            "FAIL",
            "nodes",
            f"{profile.nodes} nodes of {_text(profile)} asked for, {where} has {len(fitting)} such nodes of "
            f"{len(machines)} (types of GPU: {kinds})",
            "lower what the profile asks for on a node, or mend its node.gpu_type",
        )
    elif sum(machine.up for machine in fitting) < profile.nodes:
        up = sum(machine.up for machine in fitting)
        yield Finding("WARN", "nodes", f"{up} of {len(fitting)} fitting nodes of {where} are up", "jobs wait for them")


def _megabytes(memory: str | None) -> int:
    return size_bytes(memory) >> 20 if memory and memory != "0" else 0


def _text(profile: Profile) -> str:
    share = profile.share
    gpus = f"{share.gpus} {profile.node.gpu_type or ''} GPUs, ".replace("  ", " ") if share.gpus else ""
    memory = {None: "", "0": ", all memory"}.get(share.memory, f", {share.memory}")
    return f"{gpus}{share.cpus} CPUs{memory}"


def check(profile: Profile) -> Iterator[Finding]:
    """Yield all findings about a profile, cheap ones first."""
    yield Finding("OK", "profile", f"{profile.nodes} x {_text(profile)}, {profile.procs_per_node} processes a node")
    if profile.engine == "slurm":
        try:
            cluster = Cluster()
            found = problems(profile, cluster=cluster)
        except UserError as error:
            yield not_asked(error)
            return
        yield from found or [Finding("OK", "partition", _partition_text(profile, cluster))]
        yield from _accounts(profile, cluster)
        if not any(finding.level == "FAIL" for finding in found):
            yield _test_only(profile)
    yield from _modules(profile)
    yield _container(profile) if profile.container else _python(profile)
    if profile.scratch:
        yield _scratch(profile.scratch)


def _partition_text(profile: Profile, cluster: Cluster) -> str:
    partition = _partition(profile, cluster)
    assert isinstance(partition, Partition)  # noqa: S101  it had no problem
    machines = cluster.of_partition(partition.name)
    return f"{partition.name}: {len(machines)} nodes, {sum(m.up for m in machines)} up, limit {partition.max_time}"


def _accounts(profile: Profile, cluster: Cluster) -> Iterator[Finding]:
    """Compare account and QoS with those of the user."""
    if not profile.account and not profile.qos:
        return
    known = cluster.associations
    if known is None:
        yield Finding("WARN", "account", "no accounting answers: not checked", "ask `sacctmgr show assoc` elsewhere")
        return
    accounts = {association.account for association in known}
    if profile.account and profile.account not in accounts:
        fix = f"set `account:` in the profile to one of {' '.join(sorted(accounts)) or 'yours; you have none here'}"
        yield Finding("FAIL", "account", f"'{profile.account}' is not an account of yours", fix)
        return
    qos = {name for a in known if a.account == profile.account or not profile.account for name in a.qos}
    if profile.qos and profile.qos not in qos:
        fix = f"set `qos:` in the profile to one of {' '.join(sorted(qos)) or 'the names in `sacctmgr show qos`'}"
        yield Finding("FAIL", "qos", f"'{profile.qos}' is not a quality of service of yours", fix)
    else:
        yield Finding("OK", "account", " ".join(filter(None, (profile.account, profile.qos))))


def example(profile: Profile, name: str = "check") -> RunInfo:
    """Return a run of the profile's own shape that is never created."""
    return RunInfo(
        name=name,
        recipe="example",
        cluster=profile.name,
        engine=profile.engine,
        nodes=profile.nodes,
        procs_per_node=profile.processes_per_node,
        wandb_id="",
        created=time.time(),
        command="",
        workdir=str(Path.cwd()),
        gpus_per_node=profile.gpus_per_node or 0,
    )


def _test_only(profile: Profile) -> Finding:
    """Let sbatch judge the rendered script without queueing it."""
    try:
        script = render(example(profile), profile)
        result = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60)
    except UserError as error:
        return Finding("FAIL", "script", *str(error).rsplit("; ", 1))
    except subprocess.TimeoutExpired:
        return Finding("FAIL", "script", "sbatch has not answered for 60 s", "try `scontrol ping`")
    said = [line.removeprefix("sbatch: ") for line in result.stderr.strip().splitlines()] or ["no answer"]
    if result.returncode:
        why = "; ".join(line.removeprefix("error: ").removeprefix("allocation failure: ") for line in said)
        return Finding("FAIL", "script", f"sbatch refuses it: {why}", "mend what it names in the profile")
    return Finding("OK", "script", "sbatch accepts it: " + said[-1])


def _modules(profile: Profile) -> Iterator[Finding]:
    """Load the modules in a shell like the job's."""
    if not profile.modules:
        return
    names = shlex.join(profile.modules)
    script = (
        f"type -t module >/dev/null || source /etc/profile; type -t module >/dev/null || exit 99; module load {names}"
    )
    try:
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=_MODULE_S)
    except subprocess.TimeoutExpired:
        yield Finding("WARN", "modules", f"loading takes more than {_MODULE_S} s", "try `module load` by hand")
        return
    if result.returncode == 99:
        yield Finding("WARN", "modules", "no `module` here: not checked", "run this on a login node of the cluster")
    elif result.returncode or re.search(r"\berror\b", result.stderr, re.IGNORECASE):
        said = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        yield Finding("FAIL", "modules", f"`module load {names}` fails: {said}", "take the names from `module avail`")
    else:
        yield Finding("OK", "modules", names)


def _python(profile: Profile) -> Finding:
    python = profile.python or sys.executable
    found = shutil.which(python)
    if found is None and not (profile.setup or profile.modules):
        return Finding("FAIL", "python", f"{python} is not there", "set `python:` in the profile, or leave it out")
    if found is None:
        return Finding("WARN", "python", f"{python} is not here; `setup` may bring it", "see the first job's log")
    if found.startswith("/tmp/") and profile.engine == "slurm":  # noqa: S108  a question, not a use
        return Finding(
            "WARN", "python", f"{found} is on this machine only", "install on a file system that nodes share"
        )
    return Finding("OK", "python", found)


def _container(profile: Profile) -> Finding:
    container = profile.container
    assert container  # noqa: S101  asked only where there is one
    image = os.path.expandvars(container.image)
    if container.runtime == "pyxis" and "--container-image" not in ask("srun", "--help"):
        fix = "ask the administrators for pyxis, or use `runtime: apptainer`"
        return Finding("FAIL", "container", "this cluster's srun has no --container-image", fix)
    is_file = image.startswith(("/", "./")) or image.endswith((".sif", ".sqsh"))
    if is_file and not Path(image).exists():
        return Finding("FAIL", "container", f"no image at {image}", "mend container.image, or make the image")
    if container.runtime == "apptainer" and shutil.which("apptainer") is None and not profile.modules:
        fix = "if the nodes lack it too, add its module to `modules`"
        return Finding("WARN", "container", "no apptainer on PATH here", fix)
    return Finding("OK", "container", f"{container.runtime}, {image}" + ("" if is_file else ", fetched by the job"))


def _scratch(scratch: str) -> Finding:
    """Look for the part of the path that is there before a job; nodes may have what this machine has not."""
    path = Path(os.path.expandvars(scratch))
    fixed = next((Path(*path.parts[:i]) for i, part in enumerate(path.parts) if "$" in part), path.parent)
    if str(fixed) == ".":
        return Finding("WARN", "scratch", f"{scratch} has a meaning only in a job", "see TMPDIR in the first job's log")
    there = next(parent for parent in (fixed, *fixed.parents) if parent.exists())
    if there == Path("/"):
        return Finding("WARN", "scratch", f"no {fixed} on this machine", "make sure that the nodes have it")
    if not os.access(there, os.W_OK):
        return Finding("WARN", "scratch", f"{there} cannot be written to here", "make sure that it can on the nodes")
    return Finding("OK", "scratch", f"{there} is there and can be written to")
