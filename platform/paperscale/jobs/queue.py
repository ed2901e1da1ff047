"""What SLURM's queue says of jobs.

``squeue --json`` ignores ``-j`` and writes four kilobytes a job, so plain fields are asked for. A job that squeue does
not name is gone; where squeue does not answer, nothing is known.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from paperscale.jobs.units import seconds

ANSWER_S = 5.0
"""Seconds that the controller has for an answer."""

_FIELDS = ("JobArrayID", "State", "Reason", "RestartCnt", "TimeLeft", "StartTime", "NodeList")
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")

_REASONS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "waits for nodes to become free",
    "BeginTime": "its earliest start has not come; a requeued job waits for a while first",
    "Dependency": "waits for the job that it comes after",
    "DependencyNeverSatisfied": "the job that it comes after has failed; cancel this one",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "the partition starts no jobs at the moment",
    "PartitionInactive": "the partition takes no jobs at the moment",
    "PartitionNodeLimit": "more or fewer nodes than the partition allows; resume with another --nodes",
    "PartitionTimeLimit": "a longer time than the partition allows; resume with another --time",
    "PartitionConfig": "the partition does not allow what it asks for",
    "BadConstraints": "no node has what it asks for",
    "JobArrayTaskLimit": "as many jobs of its sweep run as may at once",
    "JobHeldUser": "held by you; `scontrol release JOB` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation to begin",
    "InvalidAccount": "the account may not use this cluster; see the profile's account",
    "InvalidQOS": "the QoS may not be used; see the profile's qos",
    "Prolog": "its nodes are being prepared",
    "Cleaning": "its previous attempt is being cleaned up",
}
_REASON_PATTERNS = (
    (r"QOS(Max\w*PerUser\w*|MaxSubmit\w*)", "you have as much running as the QoS allows a user"),
    (r"QOS(Grp|Max|Min)\w*", "a limit of the QoS is reached"),
    (r"AssocGrp\w*", "your account as a whole has reached its limit"),
    (r"(Assoc)?Max\w+PerAccount|AssocMax\w*", "your share of the account has reached its limit"),
    (r"launch[ _]failed.*", "its launch failed and it is held; `scontrol release JOB` lets it go"),
    (r".*[Hh]eld.*", "held; `scontrol release JOB` lets it go"),
)


@dataclass(frozen=True)
class JobState:
    """What is known of a job.

    Attributes:
        state: ``queued``, ``running``, ``gone``, or ``unknown`` where the scheduler does not answer.
        detail: the engine's own words, with the reason of a wait and what it means.
        slurm: SLURM's state, such as ``PENDING``; empty where it is not known.
        reason: SLURM's reason of a wait, such as ``Resources``; empty for none.
        restarts: how often SLURM has run the job again.
        left_s: seconds left of its time limit; ``None`` for no limit, or before it runs.
        start: Unix time of its start, estimated while it waits; ``None`` where SLURM has none.
        nodes: its nodes, as SLURM writes them (``n[1-4]``).
    """

    state: str
    detail: str
    slurm: str = ""
    reason: str = ""
    restarts: int = 0
    left_s: float | None = None
    start: float | None = None
    nodes: str = ""


_GONE = JobState("gone", "not in the queue")


def state(job: str) -> JobState:
    """Ask squeue for a job, whoever's it is; no answer means unknown, not gone."""
    return _lookup([job], "-j", job)[job]


def states(jobs: Collection[str], owners: Collection[int] = ()) -> dict[str, JobState]:
    """Ask squeue once for any number of jobs.

    Args:
        jobs: their ids: ``123``, or ``123_4`` for a task of an array; an array's own id gives its liveliest task.
        owners: user ids of those who have submitted them, by default oneself.
    """
    if not jobs:
        return {}
    return _lookup(jobs, *(("-u", ",".join(map(str, sorted(owners)))) if owners else ("--me",)))


def how_it_ended(job: str) -> str:
    """Return SLURM's final state of a job from its accounting (``TIMEOUT``); empty where there is none."""
    output, _ = _run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return output.strip().splitlines()[-1] if output.strip() else ""


def meaning(reason: str) -> str:
    """Return what a reason of SLURM's for letting a job wait means; empty if it is not one of the usual."""
    name = reason.partition(",")[0].strip("() ")
    if name in _REASONS:
        return _REASONS[name]
    return next((words for pattern, words in _REASON_PATTERNS if re.fullmatch(pattern, name)), "")


def _lookup(jobs: Collection[str], *which: str) -> dict[str, JobState]:
    output, problem = _run("squeue", "-h", "-r", *which, "-O", ",".join(f"{field}:|" for field in _FIELDS))
    if problem and "Invalid job id" not in problem:
        return dict.fromkeys(jobs, JobState("unknown", problem))
    found: dict[str, JobState] = {}
    for name, now in _rows(output):
        for known_as in {name, name.partition("_")[0]}:
            if known_as not in found or now.state == "running":
                found[known_as] = now
    return {job: found.get(job, _GONE) for job in jobs}


def _rows(output: str) -> Iterator[tuple[str, JobState]]:
    for line in output.splitlines():
        fields = line.split("|")
        if len(fields) > len(_FIELDS):
            name, slurm, reason, restarts, left, start, nodes = (field.strip() for field in fields[: len(_FIELDS)])
            reason = "" if reason == "None" else reason
            words = f"{reason}: {meaning(reason)}" if meaning(reason) else reason
            detail = f"{slurm} ({words})" if reason else slurm
            waiting = slurm in _WAITING
            yield (
                name,
                JobState(
                    "queued" if waiting else "running",
                    detail,
                    slurm,
                    reason,
                    int(restarts) if restarts.isdigit() else 0,
                    None if waiting else _left(left),
                    _unix_time(start),
                    nodes,
                ),
            )


def _left(text: str) -> float | None:
    """Return a time as squeue writes it (``29:59``, ``1-02:00:00``) in seconds, ``None`` for a word."""
    left = seconds(text)
    return left if math.isfinite(left) else None


def _unix_time(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _run(*command: str) -> tuple[str, str]:
    """Return a command's output, and the problem if it has not worked within :data:`ANSWER_S`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    env |= {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=env, errors="replace")
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} has not answered for {ANSWER_S:.0f} s"
    except OSError as error:
        return "", f"{command[0]} cannot be run here ({error.strerror})"
    if result.returncode == 0:
        return result.stdout, ""
    return "", (result.stderr.strip().splitlines() or [f"{command[0]} gave no answer"])[-1]
