"""What a run is doing, read from its directory and asked of its engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperscale.errors import FAILED, REQUEUE, UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run

LIVE = ("running", "queued", "unknown")


@dataclass(frozen=True)
class RunStatus:
    """A run's state.

    Attributes:
        state: ``queued``, ``running``, ``finished``, ``stopped`` (can be resumed), ``failed``, ``cancelled``, or
            ``unknown`` where the scheduler does not answer.
        detail: why, in the engine's words or ours.
        progress: the content of ``progress.json``.
        results: the content of ``results.json``.
    """

    state: str
    detail: str
    progress: dict[str, Any]
    results: dict[str, Any]


def status(run: Run) -> RunStatus:
    """Return a run's state."""
    progress, results = run.read_json("progress.json"), run.read_json("results.json")
    if results:
        return RunStatus("finished", "", progress, results)
    job = ENGINES[run.info.engine].state(run.job) if run.job else None
    if job and job.state in LIVE:
        return RunStatus(job.state, job.detail, progress, results)
    if run.cancelled:
        return RunStatus("cancelled", "by `paperscale cancel`", progress, results)
    attempts = run.attempts()
    code = attempts[-1].exit_code if attempts else None
    where = f"exit code {code}, attempt {len(attempts)}"
    if attempts and attempts[-1].error:
        where += f", {attempts[-1].error}"
    if code is None:
        detail = f"attempt {len(attempts)} was killed" if attempts else "its job left the queue before it started"
        return RunStatus("stopped", detail, progress, results)
    if code == REQUEUE or code >= 128:
        return RunStatus("stopped", where, progress, results)
    return RunStatus("failed" if code >= FAILED else "stopped", where, progress, results)


def cancel(run: Run) -> None:
    """End a run for good.

    Raises:
        UserError: it has already ended.
    """
    now = status(run)
    if now.state not in LIVE:
        raise UserError(f"run '{run.name}' is {now.state}: nothing to cancel")
    (run.path / "cancelled").touch()  # before the signal, so that the script does not run the job again
    ENGINES[run.info.engine].cancel(run)


def follow(run: Run, rank: int, attempt: int | None, forever: bool) -> Iterator[str]:
    """Yield the text of a rank's log; with ``forever`` as it grows, into later attempts, until the run ends."""
    attempts = run.attempts()
    if not attempts and not forever:
        raise UserError(f"run '{run.name}' has not started: {status(run).detail or status(run).state}")
    number = attempt or (attempts[-1].number if attempts else 1)
    if attempt is not None and attempt not in [a.number for a in attempts]:
        raise UserError(f"run '{run.name}' has attempts 1 to {len(attempts)}, not {attempt}")
    ranks = len(list((run.path / "attempts" / f"{number:04d}").glob("rank-*.log")))
    if not forever and 0 < ranks <= rank:
        raise UserError(f"attempt {number} of run '{run.name}' has ranks 0 to {ranks - 1}, not {rank}")
    offset, last_check, ended = 0, 0.0, False
    while True:
        text, offset = _read_from(run.path / "attempts" / f"{number:04d}" / f"rank-{rank}.log", offset)
        if text:
            yield text
        elif (run.path / "attempts" / f"{number + 1:04d}").exists() and attempt is None:
            number, offset = number + 1, 0
            yield f"--- attempt {number}\n"
        elif not forever or ended:
            return
        else:
            time.sleep(0.2)
            if time.monotonic() - last_check > 2:
                last_check, ended = time.monotonic(), status(run).state not in LIVE


def _read_from(path: Path, offset: int) -> tuple[str, int]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError:
        return "", offset
    return content.decode(errors="replace"), offset + len(content)


def print_log(run: Run, rank: int, attempt: int | None, forever: bool) -> None:
    """Print a rank's log, or what the job script said where it did not come to that."""
    if not forever and not list(run.path.glob("attempts/*/rank-*.log")) and (run.path / "job.log").exists():
        sys.stdout.write((run.path / "job.log").read_text())
        return
    for text in follow(run, rank, attempt, forever):
        sys.stdout.write(text)
        sys.stdout.flush()
    attempts = [a for a in run.attempts() if attempt in (None, a.number)]
    if attempts and attempts[-1].error:
        print(f"--- attempt {attempts[-1].number} failed first on {attempts[-1].error}")
