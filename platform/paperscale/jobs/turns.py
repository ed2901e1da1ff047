"""``python -m paperscale.jobs.turns AT_MOST AFTER RUN...``: starts runs of this machine when their turn comes.

What SLURM's arrays and dependencies do on a cluster: the runs are started in order, at most AT_MOST at once, once the
run AFTER has finished (``-`` for none). A run that was cancelled while it waited is passed over.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from paperscale.jobs.engines import ENGINES, NEVER, WAITING, process_id
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, status

_LOOK_S = 0.5


def start_queue(runs: list[Run], at_most: int, earlier: Run | None) -> None:
    """Start the process that starts the runs, and note in each that it waits."""
    words = [str(at_most), str(earlier.path) if earlier else "-", *(str(run.path) for run in runs)]
    code = runs[0].path / "code"  # of now, as the runs themselves
    process = subprocess.Popen(
        [sys.executable, "-m", "paperscale.jobs.turns", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    waiting = f"{WAITING}{process_id(process.pid)}"
    for run in runs:
        run.set_job(waiting)
    assert process.stdin  # noqa: S101  a pipe
    process.stdin.close()  # that all are noted: it may begin


def main(words: list[str]) -> int:
    """Start the runs; return the exit code."""
    at_most, after, *paths = words
    sys.stdin.read()
    runs = [Run(Path(path)) for path in paths]
    reason = "" if after == "-" else _wait_for(Run(Path(after)))
    if reason:
        for run in runs:
            with (run.path / "job.log").open("a") as log:
                log.write(f"{time.strftime('%FT%T')} stopped: {reason}\n")
            run.set_job(NEVER)
        return 1
    engine, going = ENGINES["local"], list[Run]()
    while runs or going:
        going = [run for run in going if engine.state(run.job or NEVER).state == "running"]
        while runs and len(going) < int(at_most):
            run = runs.pop(0)
            if not run.cancelled:
                run.set_job(engine.submit(run))
                going.append(run)
        time.sleep(_LOOK_S)
    return 0


def _wait_for(earlier: Run) -> str:
    """Wait until a run has finished; return why that will not be, empty if it has."""
    while (now := status(earlier)).state in LIVE:
        time.sleep(_LOOK_S)
    if now.state == "finished":
        return ""
    return f"run '{earlier.name}', which it comes after, is {now.state} ({now.detail}); resume both in this order"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
