"""The two ways a job script is run: by SLURM, and by bash on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Protocol

from paperscale.errors import UserError
from paperscale.jobs import queue
from paperscale.jobs.profile import Profile
from paperscale.jobs.queue import JobState
from paperscale.jobs.run import Run, RunInfo


class EngineInterface(Protocol):
    """What a run needs of an engine."""

    def check(self, profile: Profile, info: RunInfo) -> None:
        """Refuse what this engine or cluster cannot run, before anything is written."""

    def submit(self, run: Run) -> str:
        """Start or queue the run's script; return the job's id."""

    def state(self, job: str) -> JobState:
        """Return what is known of a job."""

    def interrupt(self, run: Run, number: signal.Signals) -> None:
        """Send a signal to the job's processes, as a scheduler does before it takes the nodes away."""

    def cancel(self, run: Run) -> None:
        """End the job for good."""


class Slurm:
    """Jobs through sbatch, squeue and scancel."""

    def check(self, profile: Profile, info: RunInfo) -> None:
        """Compare what is asked for with what the partition has."""
        if shutil.which("sbatch") is None:
            raise UserError(
                f"cluster '{profile.name}' needs sbatch, which is not on PATH: run this on a login node of "
                "the cluster, or use --cluster local"
            )
        columns = "%R|%D|%c|%m|%l"
        chosen = ["-p", profile.partition] if profile.partition else []
        result = _run("sinfo", "-h", "-o", columns, *chosen)
        rows = [line.split("|") for line in result.stdout.splitlines()]
        if not rows and profile.partition:
            partitions = " ".join(_run("sinfo", "-h", "-o", "%R").stdout.split())
            raise UserError(
                f"cluster '{profile.name}': no partition '{profile.partition}'; this cluster has {partitions}"
            )
        if profile.partition:
            self._check_size(profile, info, rows)

    @staticmethod
    def _check_size(profile: Profile, info: RunInfo, rows: list[list[str]]) -> None:
        have_nodes = sum(int(row[1]) for row in rows)
        have_cpus = max(int(row[2].rstrip("+")) for row in rows)
        where = f"partition '{profile.partition}' of cluster '{profile.name}'"
        if info.nodes > have_nodes:
            raise UserError(
                f"{info.nodes} nodes asked for, {where} has {have_nodes}; use --nodes {have_nodes} or fewer"
            )
        need = info.procs_per_node * profile.cpus_per_proc
        if need > have_cpus:
            raise UserError(
                f"{info.procs_per_node} processes of {profile.cpus_per_proc} CPUs on a node asked for, a node of "
                f"{where} has {have_cpus} CPUs; lower --procs-per-node or the profile's cpus_per_proc"
            )
        longest = max(seconds(row[4]) for row in rows)
        if seconds(profile.time) > longest:
            raise UserError(f"time {profile.time} asked for, {where} allows {rows[0][4]}; use --time {rows[0][4]}")

    def submit(self, run: Run) -> str:
        """Queue the script."""
        result = _run("sbatch", "--parsable", str(run.script))
        return result.stdout.strip().split(";")[0]

    def state(self, job: str) -> JobState:
        """Ask squeue; no answer means unknown, not gone."""
        return queue.state(job)

    def interrupt(self, run: Run, number: signal.Signals) -> None:
        """Signal the job's steps."""
        _run("scancel", f"--signal={number.name.removeprefix('SIG')}", run.job or "")

    def cancel(self, run: Run) -> None:
        """Cancel the job."""
        _run("scancel", run.job or "")


class Local:
    """The script in the background of this machine, in a session of its own."""

    def check(self, profile: Profile, info: RunInfo) -> None:
        """There is one node here."""
        if info.nodes != 1:
            raise UserError(f"{info.nodes} nodes asked for: the local cluster is one node; use --nodes 1")

    def submit(self, run: Run) -> str:
        """Start the script."""
        with (run.path / "job.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", run.script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return process_id(process.pid)

    def state(self, job: str) -> JobState:
        """Look for the process."""
        pid, _, started = job.partition("@")
        alive = _started(int(pid)) == started
        return JobState("running", f"process {pid}") if alive else JobState("gone", "process ended")

    def interrupt(self, run: Run, number: signal.Signals) -> None:
        """Signal the launcher, which passes it on to every rank."""
        attempts = run.attempts()
        try:
            if run.info.engine == "here":
                os.kill(int((run.job or "").partition("@")[0]), number)
                return
            os.kill(int((attempts[-1].path / "launcher.pid").read_text()), number)
        except (OSError, IndexError, ValueError) as error:
            raise UserError(f"run '{run.name}' has no processes at the moment; try again") from error

    def cancel(self, run: Run) -> None:
        """Let the training checkpoint and end; end by force what does not."""
        with contextlib.suppress(UserError):
            self.interrupt(run, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while run.job and self.state(run.job).state == "running":
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    os.killpg(int(run.job.partition("@")[0]), signal.SIGKILL)
            time.sleep(0.1)


ENGINES: dict[str, EngineInterface] = {"slurm": Slurm(), "local": Local(), "here": Local()}


def process_id(pid: int) -> str:
    """Return an id of a process that a later process of the same number does not share."""
    return f"{pid}@{_started(pid)}"


def _started(pid: int) -> str:
    """Return when a process started, empty if it is not alive; tells a process from a later one of the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    result = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    stat, _, started = result.stdout.strip().partition(" ")
    return "" if not stat or stat.startswith("Z") else "-".join(started.split())


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command.

    Raises:
        UserError: it fails; carries its last line.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH: run this on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} has not answered for 60 s: is the controller up? Try `scontrol ping`") from error
    if result.returncode:
        raise UserError(f"{command[0]}: {_last_line(result.stderr)}; `paperscale doctor` checks the cluster")
    return result


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]


def seconds(limit: str) -> float:
    """Return a SLURM time limit in seconds (``minutes``, ``h:m:s``, ``d-h:m:s``, ``infinite``)."""
    if not re.fullmatch(r"[\d:-]+", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, [*parts, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs
