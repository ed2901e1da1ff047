"""Making a fault happen to a running job, so that users test their cluster before it tests them."""

from __future__ import annotations

import signal

from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run
from paperscale.jobs.status import status


def preempt(run: Run) -> str:
    """Send SIGTERM to the job's processes, as a scheduler does that wants its nodes back.

    Raises:
        UserError: the run is not running.
    """
    now = status(run)
    if now.state != "running" or run.info.engine == "here":
        raise UserError(f"run '{run.name}' is {now.state} on '{run.info.cluster}'; a drill needs a job that is running")
    ENGINES[run.info.engine].interrupt(run, signal.SIGTERM)
    return f"sent SIGTERM to the processes of {run.name}; follow it with `paperscale logs {run.name} -f`"
