"""What SLURM's queue says of jobs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class JobState:
    """What is known of a job.

    Attributes:
        state: ``queued``, ``running``, ``gone``, or ``unknown`` where the scheduler does not answer.
        detail: the engine's own words, with the reason of a wait.
    """

    state: str
    detail: str


def state(job: str) -> JobState:
    """Ask squeue for a job; no answer means unknown, not gone."""
    try:
        result = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T|%r"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return JobState("unknown", "squeue does not answer")
    if result.returncode and "Invalid job id" not in result.stderr:
        return JobState("unknown", (result.stderr.strip().splitlines() or ["no answer"])[-1])
    state, _, reason = result.stdout.strip().partition("|")
    if not state:
        return JobState("gone", "not in the queue")
    waiting = state in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED")
    return JobState("queued" if waiting else "running", state if reason == "None" else f"{state} ({reason})")
