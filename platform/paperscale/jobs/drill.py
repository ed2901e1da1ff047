"""Making a fault happen to a running job, so that users test their cluster before it tests them.

The faults are real: the agent of the rank's node kills or stops the process, or lets the kernel refuse its writes.
What follows is what would follow if the fault had come by itself.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from paperscale.atomic import write_atomically
from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.faults import BAD_NODE_ORDER, FAULTS, FULL_S, ORDER
from paperscale.jobs.run import Attempt, Run
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.switches import save

_TAKEN_S = 30.0
_CHECKPOINT_S = 300.0


def drill(run: Run, fault: str, rank: int | None = None, node: str | None = None) -> str:
    """Make a fault happen.

    Args:
        run: a run whose job is running.
        fault: one of :data:`~paperscale.jobs.faults.FAULTS`.
        rank: that is hit; by default the last, for ``fill-disk`` rank 0, which writes the most.
        node: for ``bad-node``; by default the last.

    Returns:
        What was done.

    Raises:
        UserError: the run is not running, or has no such rank or node.
    """
    now = status(run)
    agents_alone = now.state == "unknown" and fault not in ("preempt", "bad-node")  # need no scheduler
    if (now.state != "running" and not agents_alone) or run.info.engine == "here":
        raise UserError(f"run '{run.name}' is {now.state} on '{run.info.cluster}'; a drill needs a job that is running")
    if fault == "fill-disk" and not sys.platform.startswith("linux"):
        raise UserError("fill-disk: only Linux can refuse a process its writes; drill another fault here")
    if fault == "preempt":
        return preempt(run)
    if fault == "bad-node":
        if run.info.engine == "local":
            raise UserError("bad-node: the local cluster has no other node to go to; drill this on a SLURM cluster")
        return _bad_node(run, node)
    ranks = run.info.nodes * run.info.procs_per_node
    rank = (0 if fault == "fill-disk" else ranks - 1) if rank is None else rank
    if rank >= ranks:
        raise UserError(f"run '{run.name}' has ranks 0 to {ranks - 1}; use --rank {ranks - 1} or less")
    order = run.path / ORDER
    write_atomically(order, json.dumps({"fault": fault, "rank": rank}).encode())
    deadline = time.monotonic() + _TAKEN_S
    while order.exists():
        if time.monotonic() > deadline:
            order.unlink(missing_ok=True)
            raise UserError(f"no agent of '{run.name}' has answered; try again once `paperscale status` shows steps")
        time.sleep(0.1)
    return f"{fault} at rank {rank}: {FAULTS[fault]}"


def preempt(run: Run) -> str:
    """Send SIGTERM to the job's processes, as a scheduler does that wants its nodes back."""
    ENGINES[run.info.engine].interrupt(run, signal.SIGTERM)
    return f"sent SIGTERM to the processes of {run.name}"


def full_disk(run: Run) -> Iterator[str]:
    """See a checkpoint fail on the disk that :func:`drill` has filled, and the next one succeed.

    Args:
        run: the run.

    Raises:
        UserError: the run has ended, or no checkpoint has succeeded in time.
    """
    since, log = time.time(), run.attempts()[-1].log()
    (run.path / "save").touch()
    yield "waiting for a checkpoint to fail"
    while "not written" not in (text := log.read_text(errors="replace")):
        state = status(run)
        if state.state not in LIVE or time.time() - since > _CHECKPOINT_S:
            raise UserError(
                f"no checkpoint has failed: run '{run.name}' is {state.state}; `paperscale logs {run.name}` says more"
            )
        time.sleep(0.5)
    line = next(line for line in reversed(text.splitlines()) if "not written" in line)
    yield f"after {time.time() - since:.1f} s: {line}"
    yield f"the disk has room again {FULL_S:.0f} s after it was full"
    time.sleep(max(0.0, since + FULL_S + 2 - time.time()))
    written = save(run, _CHECKPOINT_S, lambda line: None)
    yield f"after {time.time() - since:.1f} s: {written} is written; no step was lost, no attempt spent"


def _bad_node(run: Run, node: str | None) -> str:
    hosts = [report["host"] for report in run.attempts()[-1].nodes()]
    if not hosts or (node and node not in hosts):
        raise UserError(f"run '{run.name}' is on {', '.join(hosts) or 'no node yet'}; use one of these as --node")
    chosen = node or hosts[-1]
    write_atomically(run.path / BAD_NODE_ORDER, chosen.encode())
    return f"{chosen} will not pass the next preflight; {preempt(run)}"


@dataclass(frozen=True)
class Recovery:
    """What came of a fault.

    Attributes:
        attempt: number of the attempt that the fault ended.
        cause: its cause, in a word.
        error: what failed first, in its words.
        detected_s: seconds from the fault to the attempt's verdict or checkpoint.
        running_s: seconds from the fault to the first batch of the next attempt.
        resumed_from: the checkpoint that it continued from.
    """

    attempt: int
    cause: str
    error: str
    detected_s: float
    running_s: float
    resumed_from: str | None

    def __str__(self) -> str:
        what = f"attempt {self.attempt} ended after {self.detected_s:.1f} s ({self.cause})"
        what += f": {self.error}" if self.error else ""
        return f"{what}\ntraining again after {self.running_s:.1f} s, from {self.resumed_from or 'the start'}"


def recovery(run: Run, attempt: int, since: float, timeout_s: float = 600) -> Iterator[str | Recovery]:
    """Wait until a run trains again; yield what is seen on the way, and the :class:`Recovery` in the end.

    Args:
        run: the run.
        attempt: number of the attempt that the fault struck.
        since: Unix time of the fault.
        timeout_s: seconds to wait.

    Raises:
        UserError: the run does not go on, or not in time.
    """
    struck, following = (Attempt(run.path / "attempts" / f"{number:04d}") for number in (attempt, attempt + 1))
    told = False
    while "first_batch" not in following.facts:
        if struck.exit_code is not None and not told:
            told = True
            yield f"attempt {attempt} has ended: {struck.cause}"
        state = status(run)
        if state.state not in LIVE:
            raise UserError(f"run '{run.name}' does not go on: it is {state.state}, {state.detail}")
        if time.time() - since > timeout_s:
            raise UserError(f"run '{run.name}' has not gone on within {timeout_s:.0f} s; see `paperscale status`")
        time.sleep(0.2)
    traces = [struck.path / "error", struck.path / "exit_code", following.path]  # the last: where nobody was left
    ended = next(path for path in traces if path.exists())
    yield Recovery(
        attempt,
        struck.cause,
        struck.error,
        ended.stat().st_mtime - since,
        following.facts["first_batch"] - since,
        following.facts["resumed_from"],
    )
