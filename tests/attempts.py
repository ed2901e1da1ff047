"""Attempts of runs in the test's own process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paperscale.jobs.run import Run, RunInfo, create
from paperscale.jobs.submit import resolve
from paperscale.jobs.worker import main as work
from paperscale.recipes import RecipeArguments
from paperscale.training import signals


@contextmanager
def own_signals() -> Iterator[None]:
    """Handle signals as a rank does, and as before afterwards."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.install()
    signals.received = None
    try:
        yield
    finally:
        signals.received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(name: str, *words: str) -> Run:
    """Make a run of one process; W&B is left out."""
    resolved = resolve(RecipeArguments.parse([*words, "tracking.enabled=false"]), world_size=1)
    return create(
        RunInfo(name, "tiny", "here", "here", 1, 1, "abcd1234", time.time(), "test", str(Path.cwd())), resolved
    )


def attempt(run: Run) -> int:
    """Run one attempt in this process; return its exit code."""
    signals.received = None
    number = len(run.attempts()) + 1
    (run.path / "attempts" / f"{number:04d}").mkdir()
    return work(str(run.path), number)
