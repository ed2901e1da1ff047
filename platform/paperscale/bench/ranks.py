"""Starting the ranks of a benchmark on this machine, and collecting the lines that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paperscale.assets import PACKAGE
from paperscale.errors import UserError

_LIMIT_S = 120.0

Rows = list[dict[str, Any]]


def emit(folder: Path, row: dict[str, Any]) -> None:
    """Write a rank's line; called by the rank."""
    with (folder / f"{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def run_ranks(
    module: str,
    world_size: int,
    words: Sequence[str],
    threads: int,
    progress: Callable[[int], None] = lambda done: None,
    prepare: Callable[[Path], None] = lambda folder: None,
    limit_s: float = _LIMIT_S,
) -> list[Rows]:
    """Run ``python -m MODULE FOLDER WORDS...`` once for each rank; return each rank's lines.

    Args:
        module: of the ranks.
        world_size: their number.
        words: arguments after the folder that they share.
        threads: of each rank.
        progress: called with the number of rank 0's lines.
        prepare: called with the folder before they start.
        limit_s: of a training, or of the imports.

    Raises:
        UserError: a rank does not get to its end.
    """
    with tempfile.TemporaryDirectory(prefix="paperscale-bench-") as name:
        folder = Path(name)
        prepare(folder)
        ranks = [_start(module, folder, rank, world_size, words, threads) for rank in range(world_size)]
        try:
            _wait(ranks, folder, progress, limit_s)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [_rows(folder, rank) for rank in range(world_size)]


def _start(
    module: str, folder: Path, rank: int, world_size: int, words: Sequence[str], threads: int
) -> subprocess.Popen[bytes]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "OMP_NUM_THREADS": threads}
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}, "PYTHONPATH": path}
    command = [sys.executable, "-m", module, str(folder), *words]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], folder: Path, progress: Callable[[int], None], limit_s: float
) -> None:
    """Wait for all ranks; one that fails, or none that moves on, is the end."""
    done, deadline = 0, time.monotonic() + limit_s
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes) or time.monotonic() > deadline:
            number = next((rank for rank, code in enumerate(codes) if code), 0)
            lines = (folder / f"{number}.log").read_text().strip().splitlines() or ["no reason given"]
            what = f"ended with exit code {codes[number]}" if codes[number] else f"has not moved on for {limit_s:.0f} s"
            raise UserError(f"rank {number} of the benchmark {what}: {lines[-1]}; run it again, alone on the machine")
        if all(code == 0 for code in codes):
            return
        if (now := len(_rows(folder, 0))) > done:
            done, deadline = now, time.monotonic() + limit_s
            progress(done)
        time.sleep(0.1)


def _rows(folder: Path, rank: int) -> Rows:
    path = folder / f"{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
