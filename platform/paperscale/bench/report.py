"""What was measured, as tables on the terminal, in Markdown and in JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from paperscale.bench.measure import Row
from paperscale.bench.registry import PEERS

OURS = "ours"
Cell = Callable[[Row, "Results"], str]


@dataclass
class Results:
    """A run of the benchmark.

    Attributes:
        size: which sets.
        rounds: of every measurement.
        rows: what was measured, in the order of the works.
        facts: what the images are like.
        versions: peer to its packages' versions.
        decoders: peer to the JPEG decoder that its work was done with.
        day: when.
        hardware: where.
    """

    size: str
    rounds: int
    rows: list[Row]
    facts: dict[str, Any]
    versions: dict[str, dict[str, str]]
    decoders: dict[str, str]
    day: str = field(default_factory=lambda: date.today().isoformat())
    hardware: dict[str, str] = field(default_factory=lambda: hardware())

    def of(self, work: str, peer: str) -> Row | None:
        """Return a peer's first row of a work."""
        return next((row for row in self.rows if row.work == work and row.peer == peer), None)

    def works(self) -> list[str]:
        """Return the works that were measured, in order."""
        return list(dict.fromkeys(row.work for row in self.rows))

    def to_json(self) -> dict[str, Any]:
        """Return everything, with each round's figures."""
        return {**asdict(self), "goals": [asdict(goal) for goal in goals(self)]}


def hardware() -> dict[str, str]:
    """Return what the machine is."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    kilobytes = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{kilobytes / 2**20:.0f} GiB",
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# -- cells -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number with three significant digits, or all of its whole part."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """Return ``median [least..most]``."""
    if not values:
        return ""
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} [{number(min(values))}..{number(max(values))}]"


def ratios(row: Row, other: Row | None, figure: str) -> list[float]:
    """Return a figure as a multiple of another row's, round by round."""
    theirs = other.figures.get(figure, []) if other else []
    return [a / b for a, b in zip(row.figures.get(figure, []), theirs, strict=False) if b]


def _figure(name: str, scale: float = 1.0) -> Cell:
    return lambda row, results: spread([value * scale for value in row.figures.get(name, [])])


def _times_ours(name: str) -> Cell:
    return lambda row, results: spread(ratios(row, results.of(row.work, OURS), name))


def _text(name: str) -> Cell:
    return lambda row, results: row.texts.get(name, "")


def _note(row: Row, results: Results) -> str:
    entry = PEERS.get(row.peer)
    note = entry.note if entry else ""
    if row.work in ("first", "resume") or "resumed" not in note:
        return note
    return ""


def _decoder(row: Row, results: Results) -> str:
    return results.decoders.get(row.peer, "")


def title(row: Row) -> str:
    """Return a row's name for people."""
    return PEERS[row.peer].title if row.peer in PEERS else row.peer


@dataclass(frozen=True)
class Table:
    """How a work is shown.

    Attributes:
        title: a line.
        about: what a reader must know.
        columns: title to cell, after the peer's name.
    """

    title: str
    about: str
    columns: dict[str, Cell]


_PASSES = (
    "What a pass costs to begin is left out, except where a buffer is filled before the first batch: WebDataset, "
    "Energon and Parquet streaming."
)
TABLES = {
    "raw": Table(
        "Raw read",
        f"Batches of 64 image files, in the process that asks for them; a byte of every 4 KiB page is read. {_PASSES}",
        {
            "CPU µs/sample": _figure("cpu_us"),
            "times ours": _times_ours("cpu_us"),
            "samples/s": _figure("per_s"),
        },
    ),
    "tokens": Table(
        "Tokens",
        f"Batches of 8 blocks of 512 tokens, delivered as int64 tensors in the process that asks for them. {_PASSES}",
        {
            "million tokens/s": _figure("per_s", 512 / 1e6),
            "CPU µs/block": _figure("cpu_us"),
            "CPU, times ours": _times_ours("cpu_us"),
            "note": _note,
        },
    ),
    "decode": Table(
        "Decode and augment",
        "Batches of 64: decode, RandomResizedCrop(224) with antialiased bilinear filter, mirror, uint8; as many "
        "workers (Paperscale, FFCV: threads) as cores; whole passes count. Peers without a decoder of their own "
        "use simplejpeg and torch's antialiased resize, the fastest that gives the same picture.",
        {
            "CPU µs/sample": _figure("cpu_us"),
            "times ours": _times_ours("cpu_us"),
            "samples/s": _figure("per_s"),
            "open + first batch, s": _figure("first_s"),
            "decoder": _decoder,
            "note": _note,
        },
    ),
    "first": Table(
        "First batch",
        "Seconds to the first batch of 100 of an epoch of 1,000,000 blocks of 8 tokens, from its start and resumed in "
        "its middle, in a process of its own that has imported torch and the library; then the import.",
        {
            "fresh, s": _figure("fresh_s"),
            "resumed, s": _figure("resumed_s"),
            "import after torch, s": _figure("import_s"),
            "note": _note,
        },
    ),
    "memory": Table(
        "Peak memory",
        "Proportional set size of the process tree that does the work above. Before it reads, a process holds what it "
        "has imported: torch and the library, Paperscale's also Lightning, which every training imports. Files that a "
        "process maps count while they are mapped, though they are page cache that the system takes back at need.",
        {
            "peak, MB": _figure("megabytes"),
            "of it imports": _figure("imports_mb"),
            "of it loading": _figure("growth_mb"),
            "of that not files": _figure("own_growth_mb"),
            "not files, times ours": _times_ours("own_growth_mb"),
        },
    ),
    "planning": Table(
        "Planning",
        "One of 1,024 ranks: opening a set that has only its manifest up to the numbers of the first batch, and "
        "doing so in the middle of the epoch; memory by which the process grows. Of the peers, the functions that "
        "draw and divide the order, at their defaults, within 12 GiB and 120 s.",
        {
            "samples in shards": _text("samples"),
            "open, s": _figure("open_s"),
            "seek, ms": _figure("seek_ms"),
            "MB": _figure("megabytes"),
        },
    ),
    "resume": Table(
        "Resume in the middle of an epoch",
        "Interrupted after half the epoch with two workers on one rank (or two), resumed as the columns say, by "
        "the numbers of the samples delivered before and after; `whole`: not interrupted. The global batch is 64 "
        "throughout; a rank that was not there before gets the first rank's state.",
        {
            name: _text(name)
            for name in (
                "same topology",
                "workers 2 -> 1",
                "2 ranks, whole",
                "ranks 2 -> 2",
                "ranks 1 -> 2",
                "ranks 2 -> 1",
            )
        }
        | {"note": _note},
    ),
    "shuffle": Table(
        "Shuffling",
        "Two workers, each library's defaults, batches of 64, samples in six shards. Span: mean standard deviation of "
        "a batch's sample numbers, as a share of the set. Near: share of consecutive samples written within 100. The "
        "set is smaller than Paperscale's window of 65,536 samples and MosaicML's block, which therefore shuffle all "
        "of it; of larger sets they shuffle as much at a time.",
        {
            "span": _figure("span"),
            "shards/batch": _figure("shards_per_batch"),
            "near": _figure("near"),
            "second epoch differs": _text("second epoch differs"),
        },
    ),
    "decoders": Table(
        "Decoders alone",
        "One thread: decode, the same crops, resize to 224, mirror; mean distance of the picture from Pillow's, in "
        "levels of 255.",
        {
            "CPU µs/image": _figure("cpu_us"),
            "images/s": _figure("per_s"),
            "levels from Pillow": _figure("levels_from_pillow"),
        },
    ),
}


def lines(work: str, results: Results) -> list[list[str]]:
    """Return a work's table, its heading first."""
    table = TABLES[work]
    rows = [["", *table.columns]]
    for row in results.rows:
        if row.work == work:
            cells = [cell(row, results) for cell in table.columns.values()]
            if row.problem:
                cells[next((at for at, cell in enumerate(cells) if not cell), -1)] = row.problem
            rows.append([title(row), *cells])
    return rows


# -- goals -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A goal of ours.

    Attributes:
        work: where it is measured.
        goal: what is wanted.
        measured: what was found.
        met: whether it is what was wanted.
    """

    work: str
    goal: str
    measured: str
    met: bool


def goals(results: Results) -> list[Goal]:
    """Return the goals whose works were measured for Paperscale."""
    makers = {
        "raw": _goal_raw,
        "tokens": _goal_tokens,
        "decode": _goal_decode,
        "first": _goal_first,
        "memory": _goal_memory,
        "planning": _goal_planning,
        "resume": _goal_resume,
    }
    found = []
    for work, make in makers.items():
        row = results.of(work, OURS)
        if row is not None:
            problem = Goal(work, TABLES[work].title, row.problem, False)
            found.append(problem if row.problem else make(row, results))
    return found


def _goal_raw(row: Row, results: Results) -> Goal:
    values = row.figures["cpu_us"]
    return Goal("raw", "at most 8 µs of CPU a sample", f"{spread(values)} µs", median(values) <= 8)


def _goal_tokens(row: Row, results: Results) -> Goal:
    values = ratios(row, results.of("tokens", "memmap"), "per_s")
    met = bool(values) and median(values) >= 0.9
    return Goal("tokens", "at least 0.9 times a bare memmap behind DataLoader", f"{spread(values)} times", met)


def _goal_decode(row: Row, results: Results) -> Goal:
    peers = [r for r in results.rows if r.work == "decode" and r.peer != OURS and r.figures]
    goal = "at least 1.25 times the fastest peer, FFCV included"
    if not peers:
        return Goal("decode", goal, "no peer", False)
    fastest = min(peers, key=lambda peer: median(peer.figures["cpu_us"]))
    values = ratios(fastest, row, "cpu_us")
    per_s = ratios(row, max(peers, key=lambda peer: median(peer.figures["per_s"])), "per_s")
    measured = f"{spread(values)} times {title(fastest)} by CPU; {spread(per_s)} times the fastest by samples/s"
    return Goal("decode", goal, measured, median(values) >= 1.25)


def _goal_first(row: Row, results: Results) -> Goal:
    fresh, resumed = row.figures["fresh_s"], row.figures["resumed_s"]
    met = max(median(fresh), median(resumed)) < 0.15
    return Goal("first", "fresh and resumed below 0.15 s", f"{spread(fresh)} s, {spread(resumed)} s", met)


def _goal_memory(row: Row, results: Results) -> Goal:
    folder = results.of("memory", "folder")
    names = {"megabytes": "in all", "growth_mb": "without the imports", "own_growth_mb": "and without mapped files"}
    values = {what: ratios(row, folder, name) for name, what in names.items()}
    measured = ", ".join(f"{spread(found)} {what}" for what, found in values.items())
    met = bool(values["in all"]) and median(values["in all"]) < 1
    return Goal("memory", "below the plain folder's", f"{measured} (times the folder's)", met)


def _goal_planning(row: Row, results: Results) -> Goal:
    opened, seek, size = (median(row.figures[name]) for name in ("open_s", "seek_ms", "megabytes"))
    measured = f"{number(opened)} s, {number(size)} MB, {number(seek)} ms"
    met = opened < 2 and size < 500 and seek < 50
    return Goal("planning", "10^9 samples: open in 2 s and 500 MB, seek in 50 ms", measured, met)


def _goal_resume(row: Row, results: Results) -> Goal:
    texts = [row.texts.get(name, "") for name in TABLES["resume"].columns if name != "note"]
    exact = sum(text.startswith("exact") for text in texts)
    return Goal("resume", "exact on any workers and ranks", f"{exact} of {len(texts)} exact", exact == len(texts))


# -- Markdown ----------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Return the report."""
    parts = ["# Data loading, measured", "", *_preamble(results), "", *_goal_lines(results)]
    for work in results.works():
        parts += ["", f"## {TABLES[work].title}", "", TABLES[work].about, "", *_as_markdown(lines(work, results))]
    parts += ["", "## Versions", ""]
    for peer, versions in results.versions.items():
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f"* {PEERS[peer].title}: {packages}")
    return "\n".join(parts) + "\n"


def _preamble(results: Results) -> list[str]:
    machine, facts = results.hardware, results.facts
    sizes = ", ".join(f"p{p} {int(size) / 1000:.0f}" for p, size in facts["percentile_bytes"].items())
    return [
        f"{results.day}: {machine['cores']} cores of {machine['cpu']}, {machine['memory']}, Linux {machine['kernel']}, "
        f"Python {machine['python']}. Made by `paperscale bench data`; every round's figures are in the JSON beside.",
        "",
        f"Every peer stores the same {facts['images']:,} JPEGs (mean {facts['mean_bytes'] / 1000:.0f} KB, {sizes}; "
        f"mean {facts['mean_width']:.0f} x {facts['mean_height']:.0f}, made from photographs) and the same real text. "
        "The files are in the page cache: this is the cost of the software, not of a disk.",
        f"Figures are `median [least..most]` of {results.rounds} rounds, in which the peers take turns, each "
        "measurement in a process of its own. CPU time is that of the whole process tree.",
    ]


def _goal_lines(results: Results) -> list[str]:
    rows = [["", "goal", "measured", "met"]]
    rows += [[TABLES[g.work].title, g.goal, g.measured, "yes" if g.met else "no"] for g in goals(results)]
    return _as_markdown(rows)


def _as_markdown(rows: list[list[str]]) -> list[str]:
    heading, *rest = rows
    cells = [heading, ["---"] * len(heading), *rest]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
