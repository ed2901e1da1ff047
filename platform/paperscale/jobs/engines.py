"""The two ways a job script is run: by SLURM, and by bash on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Protocol

from paperscale.errors import UserError
from paperscale.jobs import queue
from paperscale.jobs.facts import ask
from paperscale.jobs.profile import Profile
from paperscale.jobs.queue import JobState
from paperscale.jobs.run import Run, RunInfo

WAITING = "waiting:"
"""Opens the id of a job on this machine that another process will start when its turn comes."""
NEVER = "0@never"
"""The id of a job that was given up before it started."""

_DEFAULTS = ("account", "partition", "qos", "reservation", "constraint")  # that a user may set for all of their jobs


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
        from paperscale.jobs.cluster import refuse  # brings jinja, which looking at runs has no use for

        refuse(profile, info.nodes, info.procs_per_node)

    def submit(self, run: Run) -> str:
        """Queue the script."""
        return sbatch(run.script)

    def state(self, job: str) -> JobState:
        """Ask squeue; no answer means unknown, not gone."""
        return queue.state(job)

    def interrupt(self, run: Run, number: signal.Signals) -> None:
        """Signal the job's steps."""
        ask("scancel", f"--signal={number.name.removeprefix('SIG')}", run.job or "")

    def cancel(self, run: Run) -> None:
        """Cancel the job."""
        ask("scancel", run.job or "")


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
        """Look for the process, or for the one that will start the job when its turn comes."""
        pid, _, started = job.removeprefix(WAITING).partition("@")
        if _started(int(pid)) != started:
            return JobState("gone", "process ended")
        waits = job.startswith(WAITING)
        return JobState("queued", "waits for its turn") if waits else JobState("running", f"process {pid}")

    def interrupt(self, run: Run, number: signal.Signals) -> None:
        """Signal the node's agent, which passes it on to every rank."""
        attempts = run.attempts()
        host = attempts[-1].facts.get("host") if attempts else None
        if host not in (None, socket.gethostname()):
            raise UserError(f"run '{run.name}' trains on {host}; do this there")
        try:
            if run.info.engine == "here":
                os.kill(int((run.job or "").partition("@")[0]), number)
                return
            os.kill(int((attempts[-1].path / "agent-0.pid").read_text()), number)
        except (OSError, IndexError, ValueError) as error:
            raise UserError(f"run '{run.name}' has no processes at the moment; try again") from error

    def cancel(self, run: Run) -> None:
        """Let the training checkpoint and end; end by force what does not."""
        if (run.job or "").startswith(WAITING):
            run.set_job(NEVER)
            return
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


def sbatch(script: Path) -> str:
    """Queue a script; return the job's id.

    What the surrounding shell sets for its own job, or against the script, does not reach sbatch: variables win over
    the options of a script.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    given = set(re.findall(r"^#SBATCH --([\w-]+)", script.read_text(), re.MULTILINE))
    defaults = {f"SBATCH_{name.upper()}" for name in _DEFAULTS if name not in given}
    env = {
        name: value
        for name, value in os.environ.items()
        if name in kept or name in defaults or not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }
    return ask("sbatch", "--parsable", str(script), env=env).strip().split(";")[0]


def scancel(job: str) -> None:
    """Cancel a job, or all tasks of an array."""
    ask("scancel", job)
