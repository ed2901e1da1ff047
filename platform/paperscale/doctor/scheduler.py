"""SLURM: commands, controller, munge, clocks, and the settings that decide whether a job comes back."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from paperscale.doctor.findings import Asked
from paperscale.errors import UserError
from paperscale.findings import Finding, Level

if TYPE_CHECKING:
    from paperscale.jobs.profile import Profile

_COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_LIMIT_S = 15.0
_TRIED = (22, 5)
_GPUS_PER_NODE = (19, 5)
_SHORT_KILL_S = 10
_SKEW_S = 5.0  # munge refuses credentials that are 300 s off; files and logs are confused long before


def slurm(asked: Asked) -> Iterator[Finding]:
    """Is there a SLURM, does it answer, and does it let jobs come back?"""
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if len(missing) < len(_COMMANDS):
        yield from _installed(missing, asked.slurm)
    elif asked.slurm:
        yield Finding(
            "FAIL", "SLURM", "no sbatch on PATH: --cluster local works", "run this on a login node of the cluster"
        )
    else:
        yield Finding("OK", "SLURM", "no sbatch on PATH: --cluster local works")


def _installed(missing: list[str], wanted: bool) -> Iterator[Finding]:
    bad: Level = "FAIL" if wanted else "WARN"
    if missing:
        found = f"not on PATH: {', '.join(missing)}"
        yield Finding(bad, "SLURM commands", found, "add SLURM's folder to PATH, or run this on a login node")
        return
    text = answer("sinfo", "--version") or ""
    version = re.match(r"slurm\D*(\d+)\.(\d+)", text)
    if version is None:  # without a configuration the commands do not say even this
        found = f"the commands do not work here ({(text.splitlines() or ['no answer'])[0]})"
        fix = "give SLURM_CONF the path of the cluster's slurm.conf, or run this on a login node"
        yield Finding(bad, "SLURM", found, fix)
        return
    yield _judge_version(text, (int(version[1]), int(version[2])))
    ping = answer("scontrol", "ping")
    if ping is None or " is UP" not in ping:
        said = (ping or "").replace("\n", "; ") or f"nothing for {_LIMIT_S:.0f} s"
        found = f"the controller does not answer ({said})"
        fix = "ask the administrators, or wait: runs go on, `paperscale status` reads their folders"
        yield Finding(bad, "SLURM", found, fix)
        return
    yield Finding("OK", "SLURM", ping.replace("\n", "; "))
    config = parse_config(answer("scontrol", "show", "config") or "")
    yield from _munge(config, bad)
    yield from _clock()
    yield from judge_config(config)
    yield from judge_partitions(answer("scontrol", "show", "partition", "--oneliner") or "", config)


def answer(*command: str) -> str | None:
    """Return what a SLURM command prints, its errors where it prints nothing, ``None`` without an answer in time."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout.strip() or result.stderr.strip()


def _judge_version(text: str, version: tuple[int, int]) -> Finding:
    if version < _GPUS_PER_NODE:
        return Finding("FAIL", "SLURM version", text, "Paperscale's scripts need SLURM 19.05 or later")
    if version < _TRIED:
        tried = ".".join(f"{part:02d}" for part in _TRIED)
        fix = f"nothing, unless a script is refused: Paperscale is tried with {tried} and later"
        return Finding("WARN", "SLURM version", text, fix)
    return Finding("OK", "SLURM version", text)


def parse_config(text: str) -> dict[str, str]:
    """Return the settings that ``scontrol show config`` prints."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(config: dict[str, str], name: str, default: int) -> int:
    match = re.match(r"\d+", config.get(name, ""))
    return int(match[0]) if match else default


def _munge(config: dict[str, str], bad: Level) -> Iterator[Finding]:
    """Does a credential that is made here come back whole?"""
    if config.get("AuthType", "auth/munge") != "auth/munge" or shutil.which("munge") is None:
        return
    socket = re.search(r"socket=([^,\s]+)", config.get("AuthInfo", ""))
    option = f"--socket={socket[1]}" if socket else ""
    command = ["bash", "-c", "set -o pipefail; munge -n $0 | unmunge $0", option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    if result.returncode == 0 and "Success" in result.stdout:
        yield Finding("OK", "munge", "credentials are made and read")
    else:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[0]
        yield Finding(bad, "munge", reason, "let an administrator start munged, with the cluster's key and clock")


def _clock() -> Iterator[Finding]:
    """Do this machine and the controller agree on the time?  ``sdiag`` prints the controller's."""
    began = time.time()
    match = re.search(r"sdiag output at .*\((\d+)\)", answer("sdiag") or "")
    if match is None:
        return
    skew = int(match[1]) - began
    found = f"the controller's is within {max(1, round(abs(skew)))} s of this machine's"
    if abs(skew) <= _SKEW_S:
        yield Finding("OK", "SLURM clock", found)
    else:
        found = f"the controller's is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        yield Finding("WARN", "SLURM clock", found, "let NTP set both clocks: munge refuses what is minutes off")


def judge_config(config: dict[str, str]) -> Iterator[Finding]:
    """Yield the findings on the cluster's settings.

    Args:
        config: as :func:`parse_config` returns them.
    """
    if not config:
        return
    yield _requeue(config)
    kill = _number(config, "KillWait", 30)
    found = f"processes have {kill} s after SIGTERM (KillWait)"
    fix = "raise the profile's signal_before_end_s; ask for KillWait=30 in slurm.conf"
    yield (
        Finding("WARN", "SLURM KillWait", found, fix)
        if kill < _SHORT_KILL_S
        else Finding("OK", "SLURM KillWait", found)
    )
    yield _arrays(config)
    off = "none" in config.get("AccountingStorageType", "none") or "null" in config["AccountingStorageType"]
    what = "off: sacct knows no past jobs, the runs' folders do" if off else config["AccountingStorageType"]
    yield Finding("OK", "SLURM accounting", what)
    if config.get("ProctrackType", "").endswith("pgid"):
        fix = "ask for ProctrackType=proctrack/cgroup in slurm.conf"
        found = "proctrack/pgid: what a killed process has started lives on, and holds its GPU"
        yield Finding("WARN", "SLURM proctrack", found, fix)


def _requeue(config: dict[str, str]) -> Finding:
    """After a requeue a job waits until its credential has expired; a node's death is noticed after SlurmdTimeout."""
    match = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    waits, noticed = int(match[1]) if match else 120, _number(config, "SlurmdTimeout", 300)
    found = f"a requeued job waits {waits + 1} s, a dead node is noticed after {noticed} s"
    if not _number(config, "JobRequeue", 1):
        found += "; only jobs that ask for it are requeued (JobRequeue=0), which ours do"
    return Finding("OK", "SLURM requeue", found)


def _arrays(config: dict[str, str]) -> Finding:
    size = _number(config, "MaxArraySize", 1001)
    if size < 2:
        fix = "ask for MaxArraySize=1001 in slurm.conf; until then submit the runs of a sweep one by one"
        return Finding("WARN", "SLURM arrays", f"off (MaxArraySize={size}): a sweep cannot be queued", fix)
    return Finding("OK", "SLURM arrays", f"a sweep has at most {size - 1} runs (MaxArraySize)")


def judge_partitions(text: str, config: dict[str, str]) -> Iterator[Finding]:
    """Yield the partitions, and what they do to the jobs that they preempt.

    Args:
        text: what ``scontrol show partition --oneliner`` prints.
        config: the cluster's settings.
    """
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if "PartitionName=" in line]
    if not partitions:
        yield Finding("WARN", "SLURM partitions", "none that you may use", "ask the administrators for one")
        return
    shown = [f"{p['PartitionName']} ({p.get('TotalNodes', '?')} nodes, {p.get('MaxTime', '?')})" for p in partitions]
    yield Finding("OK", "SLURM partitions", ", ".join(shown))
    if config.get("PreemptType", "preempt/none").endswith("none"):
        yield Finding("OK", "SLURM preemption", "off")
        return
    lost = [p["PartitionName"] for p in partitions if _mode(p) in ("CANCEL", "SUSPEND", "GANG")]
    modes = ", ".join(f"{p['PartitionName']}: {_mode(p)}, {p.get('GraceTime', '0')} s of grace" for p in partitions)
    if lost:
        fix = f"use another partition than {', '.join(lost)}, or ask for PreemptMode=REQUEUE there"
        yield Finding("WARN", "SLURM preemption", f"{modes}: a preempted job is cancelled or stopped", fix)
    else:
        yield Finding("OK", "SLURM preemption", modes)


def _mode(partition: dict[str, str]) -> str:
    return partition.get("PreemptMode", "OFF").split(",")[-1]


def _quick(wanted: Profile) -> list[Finding]:
    from paperscale.jobs import cluster

    try:
        return cluster.problems(wanted)
    except UserError as error:
        return [cluster.not_asked(error)]


def profile(asked: Asked) -> Iterator[Finding]:
    """Does the cluster have what the profile asks for?  The same as ``paperscale cluster check``."""
    from paperscale.jobs import cluster

    try:
        wanted = asked.profile
    except UserError as error:
        found, _, fix = str(error).partition("; ")
        yield Finding("FAIL", "profile", found, fix or "mend the profile")
        return
    if wanted is None or (wanted.engine == "slurm" and shutil.which("sbatch") is None):
        return
    for finding in _quick(wanted) if asked.quick else cluster.check(wanted):
        name = "profile" if finding.name == "profile" else f"profile: {finding.name}"
        yield Finding(finding.level, name, finding.found, finding.fix)
