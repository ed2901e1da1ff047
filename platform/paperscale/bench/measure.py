"""The works of the benchmark: what is asked of every peer, in interleaved rounds."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paperscale.bench import data, environments
from paperscale.bench.client import Client
from paperscale.bench.data import Size
from paperscale.bench.meters import PeakMemory, memory_of
from paperscale.bench.registry import NEEDS, PEERS
from paperscale.bench.shuffling import global_batches, random_shuffle, shuffle_of, verdict

IMAGE_BATCH, TOKEN_BATCH, MILLION_BATCH = 64, 8, 100
_START_LIMIT_S = 120.0
_PLAN_LIMIT_S = 120.0
Answer = dict[str, Any]


@dataclass
class Row:
    """What a peer did in a work.

    Attributes:
        work: name of the work.
        peer: name of the peer.
        figures: figure to its values, one for each round.
        texts: what is said in words.
        problem: why there are no figures.
    """

    work: str
    peer: str
    figures: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def add(self, answer: Answer, figures: Callable[[Answer], dict[str, float]] = lambda answer: {}) -> None:
        """Add a round's figures, made of the answer, or the reason why there are none."""
        if "error" in answer:
            self.problem = str(answer["error"])
            return
        for name, value in figures(answer).items():
            self.figures.setdefault(name, []).append(value)


@dataclass
class Bench:
    """A run of the benchmark.

    Attributes:
        cache: folder of data and environments.
        size: how many samples.
        peers: names of the peers.
        rounds: times that everything is measured.
        seconds: of a measurement.
        fresh: start a process for every measurement, so that none profits or suffers from another.
        step: called after each question with what was asked.
    """

    cache: Path
    size: Size
    peers: Sequence[str]
    rounds: int
    seconds: float
    fresh: bool = True
    step: Callable[[str], None] = lambda what: None
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    decoders: dict[str, str] = field(default_factory=dict)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)
    _kept: dict[str, Client] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def workers(self) -> int:
        """Return the worker processes or threads of the works that use every core."""
        return len(os.sched_getaffinity(0))

    # -- processes -----------------------------------------------------------------------------------------

    @contextmanager
    def process(self, peer: str, rank: int = 0, world: int = 1, port: int = 0) -> Iterator[Client]:
        """Give a process of a peer: a new one, or the peer's only one unless ``fresh``."""
        python = environments.interpreter(self.cache, peer)
        if python is None:
            raise LookupError(peer)
        if not self.fresh:
            yield self._kept[peer]
            return
        with Client(peer, self.cache, python, _ranks(rank, world, port)) as client:
            yield client

    def _start(self) -> None:
        for peer in self.peers:
            if python := environments.interpreter(self.cache, peer):
                self._kept[peer] = self._open.enter_context(Client(peer, self.cache, python))

    def close(self) -> None:
        """End the processes that were kept, all at the same time."""
        for client in self._kept.values():
            client.finish()
        self._open.close()

    def prepare(self, works: Iterable[str], say: Callable[[str], None]) -> None:
        """Make the samples and every peer's copy of them."""
        works = set(works)
        if not self.fresh:
            self._start()
        data.make_source(self.cache, self.size, say)
        for peer in self.peers:
            if environments.interpreter(self.cache, peer) is None:
                needs = NEEDS.get(PEERS[peer].environment)
                needs = f", which needs {needs}" if needs else ""
                self.problems[peer, ""] = f"not installed: `paperscale bench data --setup` installs it{needs}"
                continue
            with self.process(peer) as client:
                hello = client.ask("hello", limit_s=_START_LIMIT_S)
                if "error" in hello:
                    self.problems[peer, ""] = f"does not start: {hello['error']}"
                    continue
                self.versions[peer], self.decoders[peer] = hello["versions"], hello["decoder"]
                for kind in sorted({WORKS[work].kind for work in works & PEERS[peer].works} - {""}):
                    self.step(f"{PEERS[peer].title}: writing {kind}")
                    if problem := data.write(client, self.cache, self.size, peer, kind):
                        self.problems[peer, kind] = f"cannot write its format: {problem}"

    def rows(self, work: str) -> list[Row]:
        """Return a row for every peer that takes part in a work, with the problem of those that cannot."""
        rows = []
        for peer in self.peers:
            if work in PEERS[peer].works:
                problem = self.problems.get((peer, "")) or self.problems.get((peer, WORKS[work].kind)) or ""
                rows.append(Row(work, peer, problem=problem))
        return rows

    def where(self, peer: str, kind: str) -> dict[str, Any]:
        """Return the folders of a set, as a command has them."""
        out = data.written(self.cache, self.size, peer, kind)
        return {"source": str(self.cache / "data" / self.size.name / "source"), "out": str(out)}

    def interleaved(self, rows: list[Row]) -> Iterator[tuple[int, Row]]:
        """Yield round and row, round by round, each round beginning with another peer; rows with a problem drop out."""
        for number in range(self.rounds):
            turn = number % max(1, len(rows))
            for row in rows[turn:] + rows[:turn]:
                if not row.problem:
                    self.step(f"{row.work}, round {number + 1}: {PEERS[row.peer].title}")
                    yield number, row


def _ranks(rank: int, world: int, port: int) -> dict[str, str]:
    if world == 1:
        return {}
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "GLOBAL_RANK"), rank)
    worlds = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world)
    facts = {**ranks, **worlds, "NODE_RANK": 0, "NNODES": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in facts.items()}


def _view(work: str, kind: str, workers: int, batch_size: int = IMAGE_BATCH) -> Answer:
    return {"work": work, "kind": kind, "workers": workers, "batch_size": batch_size}


# -- rates -------------------------------------------------------------------------------------------------


def raw(bench: Bench) -> list[Row]:
    """Read every byte of the images, in the process that asks for them."""
    return _rates(bench, "raw", _view("raw", "images", 0))


def tokens(bench: Bench) -> list[Row]:
    """Deliver batches of 8 blocks of 512 tokens as int64 tensors, in the process that asks for them."""
    return _rates(bench, "tokens", _view("tokens", "tokens", 0, TOKEN_BATCH))


def decode(bench: Bench) -> list[Row]:
    """Decode, crop at random, resize to 224 and mirror, on every core."""
    return _rates(bench, "decode", _view("decode", "images", bench.workers))


def _rates(bench: Bench, work: str, view: Answer) -> list[Row]:
    rows = bench.rows(work)
    for _, row in bench.interleaved(rows):
        with bench.process(row.peer) as client:
            answer = client.ask("rate", view=view, seconds=bench.seconds, **bench.where(row.peer, view["kind"]))
        row.add(answer, _rate)
    return rows


def _rate(answer: Answer) -> dict[str, float]:
    return {
        "cpu_us": answer["cpu_seconds"] / answer["samples"] * 1e6,
        "per_s": answer["samples"] / answer["wall_seconds"],
        "first_s": answer["first_seconds"],
    }


def memory(bench: Bench) -> list[Row]:
    """Return the peak memory of the process tree that does the work ``decode``."""
    rows = bench.rows("memory")
    view = _view("decode", "images", bench.workers)
    for _, row in bench.interleaved(rows):
        with bench.process(row.peer) as client:
            client.ask("hello", limit_s=_START_LIMIT_S)
            imports = memory_of(client.pid)
            with PeakMemory(client.pid) as peak:
                answer = client.ask("rate", view=view, seconds=bench.seconds, **bench.where(row.peer, "images"))
        row.add({**answer, "imports": imports, "peak": peak}, _memory)
    return rows


def _memory(answer: Answer) -> dict[str, float]:
    peak, imports = answer["peak"], answer["imports"]
    return {
        "megabytes": peak.total / 1e6,
        "imports_mb": imports.total / 1e6,
        "growth_mb": (peak.total - imports.total) / 1e6,
        "own_growth_mb": (peak.own - imports.own) / 1e6,
    }


def first(bench: Bench) -> list[Row]:
    """Return the seconds to the first batch of an epoch of a million samples, from its start and from its middle."""
    rows = bench.rows("first")
    view = _view("tokens", "million", 0, MILLION_BATCH)
    states: dict[str, str] = {}
    for row in rows:
        if not row.problem:
            bench.step(f"first: {PEERS[row.peer].title}: going to the middle of the epoch")
            answer = _middle(bench, row.peer, view)
            row.add(answer)
            states[row.peer] = answer.get("state", "")
    for _, row in bench.interleaved(rows):
        where = bench.where(row.peer, "million")
        for state in (None, states[row.peer]):
            with bench.process(row.peer) as client:
                answer = client.ask("first", view=view, state=state, **where)
            row.add(answer, _first if state is None else _resumed)
    return rows


def _first(answer: Answer) -> dict[str, float]:
    return {"fresh_s": answer["first_seconds"], "import_s": answer["import_seconds"]}


def _resumed(answer: Answer) -> dict[str, float]:
    return {"resumed_s": answer["first_seconds"]}


def _middle(bench: Bench, peer: str, view: Answer) -> Answer:
    half = bench.size.counts["million"] // 2 // MILLION_BATCH * MILLION_BATCH
    with bench.process(peer) as client:
        return client.ask("middle", view=view, samples=half, **bench.where(peer, "million"))


# -- planning ----------------------------------------------------------------------------------------------

PLANS = ((10**9, 10**5), (10**8, 10**4), (10**7, 10**3))  # samples in shards
QUICK_PLANS = ((10**6, 10**3),)
RANKS = 1024


def planning(bench: Bench) -> list[Row]:
    """Plan epochs of a billion samples, and of fewer where that is too many, for one rank of 1,024."""
    rows = []
    for samples, shards in PLANS if bench.fresh else QUICK_PLANS:
        for row in bench.rows("planning"):
            row.texts["samples"] = f"{samples:.0e} in {shards:.0e}".replace("e+0", "e")
            if not row.problem:
                bench.step(f"planning {samples:,} samples: {PEERS[row.peer].title}")
                _plan(bench, row, samples, shards)
            rows.append(row)
    return rows


def _plan(bench: Bench, row: Row, samples: int, shards: int) -> None:
    folder = bench.cache / "data" / "planning" / f"{row.peer}-{shards}"
    with bench.process(row.peer) as client:
        sizes = {"samples": samples, "shards": shards, "ranks": RANKS}
        answer = client.ask("plan", folder=str(folder), limit_s=_PLAN_LIMIT_S, **sizes)
    row.add(answer, _planned)


def _planned(answer: Answer) -> dict[str, float]:
    return {
        "open_s": answer["open_seconds"],
        "seek_ms": answer["seek_seconds"] * 1e3,
        "megabytes": answer["bytes"] / 1e6,
    }


# -- identities --------------------------------------------------------------------------------------------


def shuffle(bench: Bench) -> list[Row]:
    """Return how well an epoch is shuffled, with two workers and the peer's own defaults."""
    rows = bench.rows("shuffle")
    samples = bench.size.counts["images"]
    shard = -(-samples // 6)
    ideal = random_shuffle(samples, IMAGE_BATCH, shard)
    for row in rows:
        if row.problem:
            continue
        bench.step(f"shuffle: {PEERS[row.peer].title}")
        answer = _identities(bench, row.peer, workers=2, epochs=2)[0]
        if "error" in answer:
            row.problem = answer["error"]
            continue
        first_pass, second_pass = answer["passes"]
        found = shuffle_of(first_pass, samples, shard)
        row.figures = {name: [value] for name, value in vars(found).items()}
        row.texts["second epoch differs"] = "yes" if first_pass != second_pass else "no"
    return [*rows, Row("shuffle", "random", {name: [value] for name, value in vars(ideal).items()})]


def resume(bench: Bench) -> list[Row]:
    """Interrupt an epoch in the middle and resume it, on the same and on other numbers of workers and ranks."""
    rows = bench.rows("resume")
    for row in rows:
        if not row.problem:
            _resume(bench, row)
    return rows


def _resume(bench: Bench, row: Row) -> None:
    samples = bench.size.counts["images"]
    keep = -(-samples // IMAGE_BATCH) // 2
    for world, topologies in _TOPOLOGIES.items():
        bench.step(f"resume: {PEERS[row.peer].title}, interrupted on {world} rank{'s' if world > 1 else ''}")
        answers = _identities(bench, row.peer, workers=2, world=world, keep=keep)
        problem = _problem(answers)
        whole = [] if problem else global_batches([answer["passes"][0] for answer in answers])
        if world > 1:
            row.texts[f"{world} ranks, whole"] = problem or verdict([], whole, whole, samples).split(", same")[0]
        for name, (workers, ranks) in topologies.items():
            if problem:
                row.texts[name] = problem
                continue
            states = [answers[min(rank, world - 1)]["state"] for rank in range(ranks)]
            resumed = _identities(bench, row.peer, workers=workers, world=ranks, states=states)
            after = _problem(resumed)
            rest = [] if after else global_batches([answer["passes"][0] for answer in resumed])
            row.texts[name] = after or verdict(whole[:keep], rest, whole, samples)


_TOPOLOGIES = {
    1: {"same topology": (2, 1), "workers 2 -> 1": (1, 1), "ranks 1 -> 2": (2, 2)},
    2: {"ranks 2 -> 1": (2, 1), "ranks 2 -> 2": (2, 2)},
}
"""Ranks of the interrupted run to what it is resumed on: workers and ranks."""


def _problem(answers: list[Answer]) -> str:
    return next((str(answer["error"]) for answer in answers if "error" in answer), "")


def _identities(
    bench: Bench, peer: str, *, workers: int, world: int = 1, states: list[str] | None = None, **asked: Any
) -> list[Answer]:
    """Return the sample numbers that each rank delivers; the ranks run at the same time."""
    where, port = bench.where(peer, "images"), _free_port()

    def rank_answers(rank: int) -> Answer:
        view = {**_view("identities", "images", workers, IMAGE_BATCH // world), "rank": rank, "world": world}
        state = states[rank] if states else None
        with bench.process(peer, rank, world, port) as client:
            return client.ask("identities", view=view, state=state, limit_s=_START_LIMIT_S, **where, **asked)

    if not bench.fresh:
        return [rank_answers(rank) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank_answers, range(world)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- decoders ----------------------------------------------------------------------------------------------


def decoders(bench: Bench) -> list[Row]:
    """Decode, crop, resize and mirror on one thread, by each decoder, and compare the pictures with Pillow's."""
    rows: list[Row] = []
    for peer in ("ours", "folder"):  # in Paperscale's own interpreter, and in that of the peers
        if peer not in bench.peers or (peer, "") in bench.problems:
            continue
        bench.step(f"decoders, beside {PEERS[peer].title}")
        with bench.process(peer) as client:
            source = bench.where(peer, "images")["source"]
            answer = client.ask("decoders", source=source, own=peer == "ours", rounds=bench.rounds)
        if "error" in answer:
            rows.append(Row("decoders", peer, problem=answer["error"]))
            continue
        for name, found in answer["decoders"].items():
            problem = found.get("error", "")
            rows.append(Row("decoders", name, found.get("figures", {}), {}, problem))
    return rows


@dataclass(frozen=True)
class Work:
    """A work: how it is measured, and which set it needs (none, if empty)."""

    measure: Callable[[Bench], list[Row]]
    kind: str


WORKS = {
    "raw": Work(raw, "images"),
    "tokens": Work(tokens, "tokens"),
    "decode": Work(decode, "images"),
    "first": Work(first, "million"),
    "memory": Work(memory, "images"),
    "planning": Work(planning, ""),
    "resume": Work(resume, "images"),
    "shuffle": Work(shuffle, "images"),
    "decoders": Work(decoders, ""),
}
