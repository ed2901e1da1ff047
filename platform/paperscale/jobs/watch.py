"""``paperscale watch``: runs as they train, on the terminal."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paperscale.jobs import queue
from paperscale.jobs.logs import follow
from paperscale.jobs.queue import JobState
from paperscale.jobs.report import lines, report
from paperscale.jobs.run import Run, dated_runs
from paperscale.jobs.status import LIVE, Facts, RunStatus, read_all, statuses
from paperscale.jobs.words import COLOURS, ago, curve, duration
from paperscale.tracking.metrics import read_metrics

REFRESH_S = 2.0
ASK_S = 10.0
"""Seconds between questions to SLURM: everybody's controller is the same one."""

_METRICS_BYTES = 4 << 20  # of the end of metrics.jsonl that the curve is drawn from
_PLAIN_LOG = 10  # lines of the log where the output is not a terminal
_HEAD = ("run", "state", "", "step", "loss", "samples/s", "left", "last sign")
_NO_RUN = "no run is alive; `paperscale runs` lists all"


class View:
    """What is shown, gathered anew each time it is asked for.

    Args:
        chosen: the runs; none for all that are alive.
    """

    def __init__(self, chosen: Sequence[Run]):
        self.chosen = list(chosen)
        self._over: set[str] = set()
        self._asked: tuple[float, frozenset[str], dict[str, JobState]] = (0.0, frozenset(), {})

    def show(self, width: int, height: int) -> RenderableType:
        """Return the screen: one run in detail, or a table of several."""
        found = self.found()
        if len(self.chosen) == 1 and found:
            return detail(found[0][0].run, found[0][1], width, height)
        return table(found, height)

    def plain(self) -> Iterator[str]:
        """Yield the same as lines for other programs: tabs between the columns, nothing drawn."""
        found = self.found()
        if len(self.chosen) == 1 and found:
            run, now = found[0][0].run, found[0][1]
            yield from (f"{name:14} {value}" for name, value in lines(report(run, now=now)))
            title, _ = _losses(run)
            yield from [title] if title else []
            title, log = _log(run, _PLAIN_LOG)
            yield from [title, *log] if title else []
        elif found:
            yield "\t".join(name for name in _HEAD if name)
            yield from ("\t".join(_cells(facts, now)) for facts, now in found)
        else:
            yield _NO_RUN

    def found(self) -> list[tuple[Facts, RunStatus]]:
        """Return the runs with their states."""
        facts = read_all(self.chosen or self._candidates())
        found = list(zip(facts, statuses(facts, self._ask), strict=True))
        if not self.chosen:
            self._over |= {f.run.name for f, now in found if now.state == "finished"}
            found = [(f, now) for f, now in found if now.state in LIVE]
        return found

    def _candidates(self) -> list[Run]:
        """Return the runs that may be alive: a finished one stays so, and is not read again."""
        return [run for _, run in dated_runs() if run.name not in self._over]

    def _ask(self, jobs: Collection[str], owners: Collection[int]) -> dict[str, JobState]:
        """Ask SLURM, unless it has just been asked for the same jobs."""
        asked, before, answer = self._asked
        if time.monotonic() - asked > ASK_S or not before >= set(jobs):
            answer = queue.states(jobs, owners)
            self._asked = time.monotonic(), frozenset(jobs), answer
        return answer


def watch(chosen: Sequence[Run], once: bool) -> None:
    """Show runs until ``q`` or Ctrl-C; where the output is not a terminal, or with ``once``, as they are now."""
    view, console = View(chosen), Console()
    if not sys.stdout.isatty():
        for line in view.plain():
            print(line)
        return
    if once:
        console.print(view.show(console.width, console.height))
        return
    screen = _Screen(view, console)
    with _keys() as pressed, Live(screen.content, console=console, screen=True, auto_refresh=False) as live:
        threading.Thread(target=screen.keep_up_to_date, name="watch", daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            while pressed(0.2) not in ("q", "Q"):
                if screen.error:
                    raise screen.error
                live.update(screen.content, refresh=True)


class _Screen:
    """The newest view, gathered beside the keyboard: a file system or SLURM may take its time to answer."""

    def __init__(self, view: View, console: Console):
        self.view, self.console = view, console
        self.content: RenderableType = Text("looking ...", style="dim")
        self.error: Exception | None = None

    def keep_up_to_date(self) -> None:
        while True:
            try:
                shown = self.view.show(self.console.width, self.console.height)
            except Exception as error:
                self.error = error
                return
            hint = Text(f"{time.strftime('%T')}   q ends this; the runs go on", style="dim")
            self.content = Group(hint, shown)
            time.sleep(REFRESH_S)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield what waits for a key, at most so many seconds, and returns it, empty for none."""
    if not sys.stdin.isatty():
        nothing = threading.Event()
        yield lambda seconds: "q" if nothing.wait(seconds) else ""
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield lambda seconds: os.read(descriptor, 1).decode() if select.select([descriptor], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def table(found: Sequence[tuple[Facts, RunStatus]], height: int) -> RenderableType:
    """Return the runs, one a line."""
    if not found:
        return Text(_NO_RUN)
    rows = Table(box=None, pad_edge=False)
    for name in _HEAD:
        rows.add_column(name, overflow="fold", no_wrap=name not in ("run", "last sign"))
    room = max(3, height - 5)
    for facts, now in found[:room]:
        rows.add_row(*_row(facts, now))
    more = len(found) - room
    return Group(rows, Text(f"... and {more} more", style="dim")) if more > 0 else rows


def _row(facts: Facts, now: RunStatus) -> list[RenderableType]:
    total = now.progress.get("total_steps")
    bar: RenderableType = ProgressBar(total, now.progress["step"], width=20) if total else ""
    name, state, *others, sign = _cells(facts, now)
    last = sign if now.progress else Text(sign, style="dim")
    return [escape(name), Text(state, style=COLOURS[state]), bar, *others, last]


def _cells(facts: Facts, now: RunStatus) -> list[str]:
    """Return a row's text, without the bar."""
    progress = now.progress
    if not progress:
        return [facts.run.name, now.state, "-", "-", "-", "-", now.detail]
    left = (progress.get("eta_s") or None) if now.state == "running" else None
    return [
        facts.run.name,
        now.state,
        f"{progress['step']}/{progress['total_steps'] or '?'}",
        "-" if progress["loss"] is None else f"{progress['loss']:.4f}",
        f"{progress['samples_per_s']:,.0f}",
        "-" if left is None else duration(left),
        ago(progress["time"]),
    ]


def detail(run: Run, now: RunStatus, width: int, height: int) -> RenderableType:
    """Return one run: its facts, the curve of its loss and the end of its log."""
    facts = report(run, now=now)
    head = Table.grid(padding=(0, 2))
    for name, value in lines(facts):
        style = COLOURS[now.state] if name == "state" else "red" if "STALE" in value or name == "DAMAGED" else ""
        head.add_row(Text(name, style="dim"), Text(value, style=style, no_wrap=True, overflow="ellipsis"))
    parts: list[RenderableType] = [head]
    if total := now.progress.get("total_steps"):
        parts += ["", ProgressBar(total, now.progress["step"], width=width - 2)]
    rest = max(8, height - head.row_count - 6)
    parts += _curve_of_loss(run, width - 2, max(3, rest // 2 - 2))
    parts += _end_of_log(run, width, max(3, rest - rest // 2))
    return Group(*parts)


def _losses(run: Run) -> tuple[str, list[float]]:
    """Return the losses that were logged last, and a title for them; empty where there is no curve to draw."""
    rows = [row for row in read_metrics(run.metrics, _METRICS_BYTES) if row.get("train/loss") is not None]
    values = [float(row["train/loss"]) for row in rows]
    finite = [value for value in values if math.isfinite(value)]
    if len(values) < 2 or not finite:
        return "", []
    span = f"steps {rows[0]['step']} to {rows[-1]['step']}"
    return f"loss, {span}: last {values[-1]:.4f}, least {min(finite):.4f}", values


def _curve_of_loss(run: Run, width: int, height: int) -> list[RenderableType]:
    title, values = _losses(run)
    if not title:
        return []
    drawn = curve(values, width, height)
    return ["", Text(title, style="dim"), Text("\n".join(drawn), style="cyan", no_wrap=True)]


def _log(run: Run, height: int) -> tuple[str, list[str]]:
    """Return the end of the log of the rank that matters, and a title for it; empty where there is none yet."""
    attempts = run.attempts()
    rank = attempts[-1].first_rank if attempts else 0
    if not attempts or not attempts[-1].log(rank).exists():
        return "", []
    text = "".join(follow(run, rank, None, False, tail=height))
    kept: deque[str] = deque(text.splitlines(), maxlen=height)
    return f"log of rank {rank}, attempt {attempts[-1].number}", list(kept)


def _end_of_log(run: Run, width: int, height: int) -> list[RenderableType]:
    title, kept = _log(run, height)
    if not title:
        return []
    return ["", Text(title, style="dim"), *(Text(line[: width - 1], no_wrap=True) for line in kept)]
