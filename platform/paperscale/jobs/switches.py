"""Switches of a running job: files in the run's directory that its agents look for every second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paperscale.errors import UserError
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, RunStatus, cancel, last_sign, mark_cancelled, status
from paperscale.jobs.words import duration

_LOOK_S = 0.5
_ASK_S = 5.0  # seconds between questions to the scheduler


def save(run: Run, timeout_s: float, say: Callable[[str], None]) -> str:
    """Let a running job write a checkpoint at its next step; return the checkpoint's name once it is there.

    Args:
        run: the run.
        timeout_s: how long to wait for it, in seconds.
        say: is told now and then what is waited for.

    Raises:
        UserError: it is not running, or there is no checkpoint in time.
    """
    now = status(run)
    if now.state not in ("running", "unknown"):
        raise UserError(
            f"run '{run.name}' is {now.state}: only a running one can write a checkpoint; "
            f"`paperscale status {run.name}` says more"
        )
    if run.info.engine == "here":
        raise UserError(f"run '{run.name}' trains in a terminal: Ctrl-C there saves and stops it")
    before = newest(run)
    with _switch(run, "save", "paperscale checkpoint save"):
        for state in _wait(run, timeout_s, say):
            if newest(run) > before:
                return newest(run)
            if _attempt_ended(run) and state.state in LIVE and newest(run) == before:
                last = run.attempts()[-1]
                raise UserError(
                    f"run '{run.name}': attempt {last.number} has ended ({last.cause}), nothing trains at the moment; "
                    f"try again once `paperscale status {run.name}` shows the next attempt"
                )
            if state.state not in LIVE:
                raise UserError(
                    f"run '{run.name}' is {state.state} ({state.detail}) and has written no checkpoint since; "
                    f"see `paperscale logs {run.name}`"
                )
    raise UserError(
        f"run '{run.name}' has written no checkpoint within {duration(timeout_s)} (last sign of life: "
        f"{_last_seen(run)}), the request is withdrawn; see `paperscale logs {run.name}`, or wait with --timeout"
    )


def save_and_cancel(run: Run, now: RunStatus, timeout_s: float, say: Callable[[str], None]) -> str:
    """End a run for good after a checkpoint at its next step; return the name of its newest checkpoint.

    Args:
        run: the run.
        now: its state.
        timeout_s: how long to wait for the end, in seconds.
        say: is told now and then what is waited for.

    Raises:
        UserError: it has already ended, or does not end in time.
    """
    if now.state not in ("running", "unknown") or run.info.engine == "here":  # there, SIGTERM saves
        cancel(run, now)
        return newest(run)
    mark_cancelled(run)
    with _switch(run, "stop", "paperscale cancel --save"):
        for state in _wait(run, timeout_s, say):
            if state.state not in LIVE:
                return newest(run)
    raise UserError(
        f"run '{run.name}' has not ended within {duration(timeout_s)} (last sign of life: {_last_seen(run)}); it will "
        f"not be run again, and `paperscale cancel {run.name}` ends it without a checkpoint"
    )


def newest(run: Run) -> str:
    """Return the name of the newest checkpoint, empty if there is none."""
    return max((path.name for path in run.checkpoints.glob("step-*")), default="")


@contextmanager
def _switch(run: Run, name: str, by: str) -> Iterator[Path]:
    """Set a switch, and withdraw it in the end."""
    path = run.path / name
    path.write_text(f"{by}, {time.strftime('%F %T')}, process {os.getpid()}\n")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _wait(run: Run, timeout_s: float, say: Callable[[str], None]) -> Iterator[RunStatus]:
    """Yield the run's state until the time is over; the scheduler is asked less often than the directory."""
    now, started, asked = status(run), time.monotonic(), time.monotonic()
    while time.monotonic() - started < timeout_s:
        yield now
        time.sleep(_LOOK_S)
        if time.monotonic() - asked > _ASK_S or _attempt_ended(run):
            now, asked = status(run), time.monotonic()
            step = now.progress.get("step", "-")
            say(f"waiting for {run.name}, {now.state}, at step {step}, {duration(time.monotonic() - started)}")


def _attempt_ended(run: Run) -> bool:
    attempts = run.attempts()
    return bool(attempts) and attempts[-1].exit_code is not None


def _last_seen(run: Run) -> str:
    seen = last_sign(run, run.attempts(), run.read_json("progress.json"))
    return f"{duration(time.time() - seen)} ago" if seen else "never"
