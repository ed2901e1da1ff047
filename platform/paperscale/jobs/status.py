"""What a run is doing: its state, from its directory and its engine; ending it, saving it, reading its logs."""

from __future__ import annotations

import codecs
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperscale.errors import BAD_NODE, FAILED, HUNG, LOST, REQUEUE, UserError
from paperscale.jobs import queue
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.queue import JobState
from paperscale.jobs.run import Attempt, Run, RunInfo
from paperscale.jobs.words import ago

Asked = Callable[[Collection[str], Collection[int]], dict[str, JobState]]
"""Answers as :func:`queue.states` does."""

LIVE = ("running", "queued", "unknown")
STATES = ("running", "queued", "finished", "stopped", "failed", "cancelled", "unknown")
STALE_S = 30.0
"""Seconds after which a running job's last sign of life is worth a remark: agents and ranks give one every five."""

_RUN_AGAIN = (REQUEUE, LOST, HUNG, BAD_NODE)
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
    if job and job.state in ("running", "queued"):
        return RunStatus(job.state, job.detail, progress, results, job)
    attempts = run.attempts()
    if job and job.state == "unknown" and not _is_over(run, attempts):
        seen = last_sign(run, attempts, progress)
        detail = f"{job.detail}; last sign of life {ago(seen)}" if seen else job.detail
        return RunStatus("unknown", detail, progress, results, job)
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


def _is_over(run: Run, attempts: list[Attempt]) -> bool:
    """Return whether the directory alone says that nothing more will come, with no job submitted since."""
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
    return ""


def mark_cancelled(run: Run) -> None:
    """Keep the job script from running the job again; before any signal, so that it does not do so meanwhile."""
    (run.path / "cancelled").write_text("paperscale cancel\n")


def follow(
    run: Run,
    rank: int | None,
    attempt: int | None,
    forever: bool,
    *,
    node: int | None = None,
    tail: int | None = None,
    grep: str = "",
) -> Iterator[str]:
    """Yield the text of a run's logs, with ``forever`` as they grow, into later attempts, until the run ends.

    Args:
        run: the run.
        rank: the rank; ``None`` for all, each line with the rank in front.
        attempt: the attempt, by default the last.
        forever: go on until the run ends.
        node: with all ranks, only those of this node.
        tail: begin with this many lines from the end of each log.
        grep: only lines that this regular expression is found in.

    Raises:
        UserError: there is no such attempt, rank or node.
    """
    number = _first_attempt(run, rank, node, attempt, forever)
    reader = _Reader(_sources(run, number, rank, node), tail, grep)
    last_check, ended = time.monotonic(), False
    while True:
        if text := reader.read(flush=ended or not forever):
            yield text
        elif attempt is None and (run.path / "attempts" / f"{number + 1:04d}").exists():
            number += 1
            reader = _Reader(_sources(run, number, rank, node), None, grep)
            yield f"--- attempt {number}\n"
        elif not forever or ended:
            return
        else:
            time.sleep(0.2)
            if time.monotonic() - last_check > 2:
                ended = status(run).state not in LIVE
                last_check = time.monotonic()


def follow_job(run: Run, forever: bool, tail: int | None = None, grep: str = "") -> Iterator[str]:
    """Yield what the job script said, with ``forever`` as it goes on, until the run ends."""
    reader, ended = _Reader(lambda: {"": run.path / "job.log"}, tail, grep), False
    while True:
        if text := reader.read(flush=ended or not forever):
            yield text
        elif not forever or ended:
            return
        else:
            time.sleep(1)
            ended = status(run).state not in LIVE


def _first_attempt(run: Run, rank: int | None, node: int | None, attempt: int | None, forever: bool) -> int:
    """Return the attempt to begin with, having checked that it and the rank are there."""
    attempts = run.attempts()
    if not attempts and not forever:
        now = status(run)
        raise UserError(
            f"run '{run.name}' has not started: {now.detail or now.state}; `paperscale status {run.name}` says more"
        )
    if attempt is not None and attempt not in [a.number for a in attempts]:
        raise UserError(f"run '{run.name}' has attempts 1 to {len(attempts)}, not {attempt}; choose one of them")
    number = attempt or (attempts[-1].number if attempts else 1)
    ranks = Attempt(run.path / "attempts" / f"{number:04d}").ranks()
    if not forever and ranks and rank is not None and rank not in ranks:
        raise UserError(
            f"attempt {number} of run '{run.name}' has ranks 0 to {ranks[-1]}, not {rank}; `--rank all` shows all"
        )
    if node is not None and node >= run.info.nodes:
        raise UserError(f"run '{run.name}' has nodes 0 to {run.info.nodes - 1}, not {node}; choose one of them")
    return number


def _sources(run: Run, number: int, rank: int | None, node: int | None) -> Callable[[], dict[str, Path]]:
    """Return how to find the logs that are wanted, each by what is put in front of its lines."""
    attempt = Attempt(run.path / "attempts" / f"{number:04d}")
    if rank is not None:
        return lambda: {"": attempt.log(rank)}

    def find() -> dict[str, Path]:
        chosen = attempt.ranks()
        if node is not None:
            told = [agent["ranks"] for agent in attempt.nodes() if agent["node"] == node]
            each = run.info.procs_per_node
            mine = [r["rank"] for r in told[0]] if told else range(node * each, (node + 1) * each)
            chosen = [r for r in chosen if r in mine]
        return {f"rank {r}: ": attempt.log(r) for r in chosen}

    return find


class _Reader:
    """Reads what has been added to logs since it last looked.

    Args:
        sources: finds the logs, by what is put in front of each of their lines.
        tail: lines to begin with, from the end; ``None`` for all.
        grep: regular expression of the lines that are wanted; empty for all.
    """

    def __init__(self, sources: Callable[[], dict[str, Path]], tail: int | None, grep: str):
        self.sources, self.tail = sources, tail
        try:
            self.pattern = re.compile(grep) if grep else None
        except re.error as error:
            raise UserError(f"--grep {grep}: {error}; write a regular expression, such as 'loss|error'") from error
        self._offsets: dict[Path, int] = {}
        self._decoders: dict[Path, codecs.IncrementalDecoder] = {}
        self._pending: dict[Path, str] = {}

    def read(self, flush: bool) -> str:
        """Return what is new; a line that is not complete yet only with ``flush``."""
        return "".join(self._read_one(prefix, path, flush) for prefix, path in self.sources().items())

    def _read_one(self, prefix: str, path: Path, flush: bool) -> str:
        try:
            with path.open("rb") as file:
                file.seek(self._offsets[path] if path in self._offsets else _start(path, self.tail))
                content = file.read()
                self._offsets[path] = file.tell()
        except OSError:
            return ""
        decoder = self._decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("replace"))
        text = self._pending.pop(path, "") + decoder.decode(content)
        if not prefix and self.pattern is None:
            return text
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n") and not flush:
            self._pending[path] = lines.pop()
        wanted = [line for line in lines if self.pattern is None or self.pattern.search(line)]
        return "".join(prefix + line.rstrip("\n") + "\n" for line in wanted)


def _start(path: Path, tail: int | None) -> int:
    """Return where the last ``tail`` lines of a file begin."""
    if tail is None:
        return 0
    size = path.stat().st_size
    end, lines = size, 0
    with path.open("rb") as file:
        while end > 0:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            content = file.read(end - begin)
            ends = [begin + match.start() for match in re.finditer(b"\n", content) if begin + match.start() != size - 1]
            if lines + len(ends) >= tail:
                return ends[len(ends) - (tail - lines)] + 1
            end, lines = begin, lines + len(ends)
    return 0


def print_log(run: Run, rank: int | None, attempt: int | None, forever: bool, **view: Any) -> None:
    """Print a run's log as :func:`follow` gives it, or what the job script said where it did not come to that."""
    if not forever and not list(run.path.glob("attempts/*/rank-*.log")) and (run.path / "job.log").exists():
        sys.stdout.write((run.path / "job.log").read_text(errors="replace"))
        return
    for text in follow(run, rank, attempt, forever, **view):
        sys.stdout.write(text)
        sys.stdout.flush()
    attempts = [a for a in run.attempts() if attempt in (None, a.number)]
    if attempts and attempts[-1].error:
        print(f"--- attempt {attempts[-1].number} failed first on {attempts[-1].error}")
