"""What a run is doing: its state, from its directory and its engine; and ending it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from paperscale.errors import BAD_NODE, FAILED, HUNG, LOST, OUT_OF_MEMORY, REQUEUE, ROLLBACK, UserError
from paperscale.jobs import queue
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.queue import JobState
from paperscale.jobs.run import Attempt, Run, RunInfo, all_runs
from paperscale.jobs.words import ago

Asked = Callable[[Collection[str], Collection[int]], dict[str, JobState]]
"""Answers as :func:`queue.states` does."""

LIVE = ("running", "queued", "unknown")
STATES = ("running", "queued", "finished", "stopped", "failed", "cancelled", "unknown")
STALE_S = 30.0
"""Seconds after which a running job's last sign of life is worth a remark: agents and ranks give one every five."""

_RUN_AGAIN = (REQUEUE, LOST, HUNG, BAD_NODE, ROLLBACK, OUT_OF_MEMORY)
_PART = 100  # runs that one thread reads at a time
_SLOW_S = 0.002  # seconds to read a run: more, and it is a network file system, where threads wait side by side


@dataclass(frozen=True)
class RunStatus:
    """A run's state.

    Attributes:
        state: ``queued``, ``running``, ``finished``, ``stopped`` (can be resumed), ``failed``, ``cancelled``, or
            ``unknown`` where the scheduler does not answer.
        detail: why, in the engine's words or ours.
        progress: the content of ``progress.json``.
        results: the content of ``results.json``.
        job: what the engine says of its job; ``None`` where it need not be asked.
    """

    state: str
    detail: str
    progress: dict[str, Any]
    results: dict[str, Any]
    job: JobState | None = None


@dataclass(frozen=True)
class Facts:
    """What a run's directory says, read once.

    Attributes:
        run: the run.
        info: what was fixed when it was created.
        job: the id of its job; ``None`` if it has none or is finished.
        progress: the content of ``progress.json``.
        results: the content of ``results.json``.
    """

    run: Run
    info: RunInfo
    job: str | None
    progress: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def read(cls, run: Run) -> Facts:
        """Read a run's directory.

        Raises:
            UserError: it is not a run's.
        """
        results = run.read_json("results.json")
        return cls(run, run.info, None if results else run.job, run.read_json("progress.json"), results)


def status(run: Run) -> RunStatus:
    """Return a run's state."""
    facts = Facts.read(run)
    return _state(facts, ENGINES[facts.info.engine].state(facts.job) if facts.job else None)


def statuses(all_facts: Sequence[Facts], ask: Asked = queue.states) -> list[RunStatus]:
    """Return the states of runs: SLURM is asked once for all of them, and not at all if none can have a job."""
    in_slurm = [facts for facts in all_facts if facts.job and facts.info.engine == "slurm"]
    owners = {facts.run.path.stat().st_uid for facts in in_slurm}
    jobs = ask({facts.job for facts in in_slurm if facts.job}, owners)
    found = []
    for facts in all_facts:
        job = jobs.get(facts.job or "")
        if facts.job and job is None:
            job = ENGINES[facts.info.engine].state(facts.job)
        found.append(_state(facts, job))
    return found


def read_all(runs: Sequence[Run]) -> list[Facts]:
    """Read the directories of many runs; a folder whose ``run.json`` is damaged is left out."""
    started = time.monotonic()
    found = _readable(runs[:_PART])
    if time.monotonic() - started < _SLOW_S * _PART:
        return found + _readable(runs[_PART:])
    parts = [runs[start : start + _PART] for start in range(_PART, len(runs), _PART)]
    with ThreadPoolExecutor(16) as pool:
        return found + [facts for part in pool.map(_readable, parts) for facts in part]


def live_runs() -> list[Run]:
    """Return the runs that are queued, running or unknown, newest first."""
    facts = read_all(all_runs())
    return [of.run for of, now in zip(facts, statuses(facts), strict=True) if now.state in LIVE]


def _readable(runs: Iterable[Run]) -> list[Facts]:
    found = []
    for run in runs:
        try:
            found.append(Facts.read(run))
        except UserError:
            continue
    return found


def _state(facts: Facts, job: JobState | None) -> RunStatus:
    """Decide, given what the engine says of the job."""
    run, progress, results = facts.run, facts.progress, facts.results
    if results:
        return RunStatus("finished", "", progress, results)
    if job and job.slurm == "COMPLETING" and run.cancelled:
        return RunStatus("cancelled", f"by `{run.cancelled_by}`, its nodes are being released", progress, results, job)
    if job and job.state in ("running", "queued"):
        return RunStatus(job.state, job.detail + _mark(run), progress, results, job)
    attempts = run.attempts()
    if job and job.state == "unknown" and not _is_over(run, attempts, progress):
        seen = last_sign(run, attempts, progress)
        detail = f"{job.detail}; last sign of life {ago(seen)}" if seen else job.detail
        return RunStatus("unknown", detail + _mark(run), progress, results, job)
    if facts.info.engine != "slurm" and (host := _alive_elsewhere(run, attempts, progress)):
        return RunStatus("running", f"on {host}", progress, results, job)
    state, detail = _ending(run, attempts)
    return RunStatus(state, detail, progress, results, job)


def _alive_elsewhere(run: Run, attempts: list[Attempt], progress: dict[str, Any]) -> str:
    """Return the machine that a run without a scheduler trains on, if it is another one that shares this folder."""
    if not attempts or attempts[-1].exit_code is not None:
        return ""
    host = str(attempts[-1].facts.get("host", ""))
    fresh = time.time() - last_sign(run, attempts, progress) < STALE_S
    return host if fresh and host != socket.gethostname() else ""


def _mark(run: Run) -> str:
    """Return the word that a run which is alive is marked as cancelled; empty if it is not."""
    return f"; marked as cancelled by `{run.cancelled_by}`" if run.cancelled else ""


def _is_over(run: Run, attempts: list[Attempt], progress: dict[str, Any]) -> bool:
    """Return whether the directory alone says that nothing more will come, with no job submitted since."""
    if run.cancel_taken and time.time() - last_sign(run, attempts, progress) > STALE_S:
        return True
    code = attempts[-1].exit_code if attempts else None
    if code is None or not (run.cancelled or _failed(code)):
        return False
    return (run.path / "job").stat().st_mtime <= (attempts[-1].path / "exit_code").stat().st_mtime


def _failed(code: int) -> bool:
    return FAILED <= code < 128 and code not in _RUN_AGAIN


def _ending(run: Run, attempts: list[Attempt]) -> tuple[str, str]:
    """Return state and detail of a run without a job."""
    if run.cancelled:
        return "cancelled", f"by `{run.cancelled_by}`"
    if not attempts:
        return "stopped", "its job left the queue before it started"
    last = attempts[-1]
    code = last.exit_code
    where = f"attempt {len(attempts)}" + (f", {last.error}" if last.error else "")
    if code is None:
        return "stopped", f"attempt {len(attempts)} was killed"
    if _failed(code):
        return "failed", f"exit code {code}, {where}"
    said = run.complaint()
    return "stopped", f"exit code {code}, {where}" + (f": {said}" if said else "")


def last_sign(run: Run, attempts: list[Attempt], progress: dict[str, Any]) -> float:
    """Return when a rank or an agent of a run was last heard of, in Unix time; 0 for never."""
    agents = [node["time"] for node in attempts[-1].nodes()] if attempts else []
    return max([progress.get("time", 0.0), *agents])


def cancel(run: Run, now: RunStatus | None = None) -> str:
    """End a run for good.

    Args:
        run: the run.
        now: its state, by default asked for.

    Returns:
        A warning; empty where all is well.

    Raises:
        UserError: it has already ended.
    """
    now = now or status(run)
    if now.state not in LIVE:
        raise UserError(f"run '{run.name}' is {now.state}: nothing to cancel")
    mark_cancelled(run)
    if now.state == "unknown":
        marked = f"{run.name} is marked as cancelled, which ends it at its next step and keeps it from starting"
        again = f"`paperscale cancel {run.name}` again once the controller answers takes it out of the queue"
        return f"{now.detail}: {marked}; {again}"
    if now.job and now.job.state == "gone":
        return f"{run.name} runs {now.detail}: it is marked as cancelled, which ends it at its next step"
    ENGINES[run.info.engine].cancel(run)
    run.note_cancel_taken()
    return ""


def mark_cancelled(run: Run) -> None:
    """Keep the job script from running the job again; before any signal, so that it does not do so meanwhile."""
    (run.path / "cancelled").write_text("paperscale cancel\n")
