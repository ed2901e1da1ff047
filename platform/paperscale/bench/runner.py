"""``python -m paperscale.bench.runner PEER``: one peer, in its own interpreter.

A command a line comes in, an answer a line goes out, both JSON objects. An answer with the field ``error`` says why
there is nothing to measure.

    {"command": "hello"}                              versions, seconds to import the peer after torch
    {"command": "write", "kind", "source", "out"}     the set in the peer's format; bytes written
    {"command": "rate", "view", "seconds"}            CPU and wall seconds, samples, first-batch seconds
    {"command": "first", "view", "state"}             seconds to the first batch, fresh or resumed
    {"command": "middle", "view", "samples"}          the state after that many samples
    {"command": "plan", "samples", "shards", "ranks"}  seconds and bytes to plan an epoch and to seek in it
    {"command": "decoders", "source", "own", "rounds"} images per second of the decoders, and their pictures' distance
    {"command": "identities", "view", "state", "keep", "epochs"}   numbers of the samples of each batch, and states
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import json
import os
import pickle
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.bench.meters import TreeClock
from paperscale.bench.registry import PEERS

if TYPE_CHECKING:
    from paperscale.bench.peers.base import Loader

_PATIENCE = 10  # times the seconds asked for
_PLAN_BYTES = 12 << 30
_Answer = dict[str, Any]


@dataclass
class _Count:
    """What passes over a set have cost."""

    samples: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    def add(self, loader: Loader, epoch: int, clock: TreeClock, ahead: bool) -> None:
        """Make a pass and count it: all of it, or what comes after the first batch."""
        cpu, wall = clock.read(), time.perf_counter()
        batches = loader.epoch(epoch)
        if not ahead:
            next(batches)
            cpu, wall = clock.read(), time.perf_counter()
        self.samples += sum(len(batch[0]) if isinstance(batch, (tuple, list)) else len(batch) for batch in batches)
        self.wall_seconds += time.perf_counter() - wall
        self.cpu_seconds += clock.read() - cpu


class Runner:
    """Answers commands for one peer.

    Args:
        name: a key of :data:`~paperscale.bench.registry.PEERS`.
    """

    def __init__(self, name: str):
        import torch

        torch.set_num_threads(1)
        self.entry = PEERS[name]
        started = time.perf_counter()
        module = importlib.import_module(f"paperscale.bench.peers.{self.entry.module}")
        self.import_seconds = time.perf_counter() - started
        self.peer = getattr(module, self.entry.peer)()

    def answer(self, command: _Answer) -> _Answer:
        """Return the answer to a command."""
        action: Callable[..., _Answer] = getattr(self, f"do_{command.pop('command')}")
        return action(**command)

    def do_hello(self) -> _Answer:
        """Return versions and what the imports took."""
        from paperscale.bench.works import decoder_name

        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *self.entry.distributions)}
        return {
            "versions": versions,
            "decoder": getattr(self.peer, "decoder", decoder_name)(),
            "import_seconds": self.import_seconds,
        }

    def do_write(self, kind: str, source: str, out: str) -> _Answer:
        """Write a set."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        self.peer.write(kind, Path(source), folder)
        return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}

    def do_rate(self, view: _Answer, source: str, out: str, seconds: float) -> _Answer:
        """Measure whole passes over the set for at least ``seconds``, after one that warms up.

        What a pass costs to begin is left out where nothing is read ahead of the first batch, since these passes are
        short ones. Loaders with workers, threads or a shuffle buffer read ahead: there everything counts.
        """
        started = time.perf_counter()
        loader = self._open(view, source, out)
        batches = loader.epoch(0)
        next(batches)
        first = time.perf_counter() - started
        for _ in batches:
            pass
        clock, ahead = TreeClock(os.getpid()), view["workers"] > 0 or getattr(loader, "reads_ahead", False)
        total, begun, epoch = _Count(), time.perf_counter(), 1
        while total.wall_seconds < seconds and time.perf_counter() - begun < _PATIENCE * seconds:
            total.add(loader, epoch, clock, ahead)
            epoch += 1
        return {**vars(total), "first_seconds": first}

    def do_first(self, view: _Answer, source: str, out: str, state: str | None) -> _Answer:
        """Measure the time from nothing but the imports to the first batch."""
        started = time.perf_counter()
        loader = self._open(view, source, out)
        if state is not None:
            loader.restore(_unpacked(state))
        next(loader.epoch(0))
        return {"first_seconds": time.perf_counter() - started, "import_seconds": self.import_seconds}

    def do_middle(self, view: _Answer, source: str, out: str, samples: int) -> _Answer:
        """Return the state in the middle of a pass."""
        loader = self._open(view, source, out)
        for number, _ in enumerate(loader.epoch(0), 1):
            if number * view["batch_size"] >= samples:
                break
        return {"state": _packed(loader.state())}

    def do_identities(
        self, view: _Answer, source: str, out: str, state: str | None = None, keep: int | None = None, epochs: int = 1
    ) -> _Answer:
        """Return the sample numbers of every batch, and the state after the first ``keep`` batches."""
        loader = self._open(view, source, out)
        if state is not None:
            loader.restore(_unpacked(state))
        kept, passes = None, []
        for epoch in range(epochs):
            batches: list[list[int]] = []
            for numbers, _ in loader.epoch(epoch):
                batches.append([int(number) for number in numbers])
                if len(batches) == keep and epoch == 0:
                    kept = _packed(loader.state())
            passes.append(batches)
        return {"passes": passes, "state": kept}

    def do_plan(self, samples: int, shards: int, ranks: int, folder: str) -> _Answer:
        """Plan an epoch of many samples, in bounded memory."""
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_PLAN_BYTES, before[1]))
        try:
            found: _Answer = self.peer.plan(samples, shards, ranks, Path(folder))
        except MemoryError:
            return {"error": f"needs more than {_PLAN_BYTES >> 30} GiB"}
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        return found

    def do_decoders(self, source: str, own: bool, rounds: int) -> _Answer:
        """Measure decoders alone."""
        from paperscale.bench.decoders import measure

        return {"decoders": measure(Path(source), own, rounds)}

    def _open(self, view: _Answer, source: str, out: str) -> Any:
        from paperscale.bench.works import View

        return self.peer.open(View(**view), Path(source), Path(out))


def _packed(state: Any) -> str:
    return base64.b64encode(pickle.dumps(state)).decode()


def _unpacked(state: str) -> Any:
    return pickle.loads(base64.b64decode(state))  # noqa: S301  our own, of a minute ago


def _started(name: str) -> tuple[Runner | None, _Answer]:
    """Return the runner, or the answer that says why there is none."""
    try:
        return Runner(name), {}
    except Exception as error:
        return None, _failed(error)


def _failed(error: Exception) -> _Answer:
    traceback.print_exc()
    last = (str(error).strip().splitlines() or [""])[-1].strip()  # of a worker process: its traceback's last line
    named = last.partition(":")[0].endswith("Error")
    return {"error": (last if named else f"{type(error).__name__}: {last}").strip(" :")[:300]}


def main() -> None:
    """Answer until the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    runner, failure = _started(sys.argv[1])
    for line in sys.stdin:
        answer = failure
        if runner is not None:
            try:
                answer = runner.answer(json.loads(line))
            except Exception as error:
                answer = _failed(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
