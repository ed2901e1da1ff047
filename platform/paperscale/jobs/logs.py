"""The logs of a run: what its ranks and its job script have written, as it grows."""

from __future__ import annotations

import codecs
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paperscale.errors import UserError
from paperscale.jobs.run import Attempt, Run
from paperscale.jobs.status import LIVE, status


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
        tail: begin with this many of the lines that are wanted, from the end of each log.
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
        first = path not in self._offsets
        try:
            with path.open("rb") as file:
                file.seek(_start(path, None if self.pattern else self.tail) if first else self._offsets[path])
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
        if first and self.tail:
            wanted = wanted[-self.tail :]
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
        sys.stdout.writelines(follow_job(run, False, view.get("tail"), view.get("grep", "")))
        return
    for text in follow(run, rank, attempt, forever, **view):
        sys.stdout.write(text)
        sys.stdout.flush()
    attempts = [a for a in run.attempts() if attempt in (None, a.number)]
    if attempts and attempts[-1].error:
        print(f"--- attempt {attempts[-1].number} failed first on {attempts[-1].error}")
