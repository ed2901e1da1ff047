"""Ranks as processes of this machine, without a job around them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def start_ranks(script: Path, world_size: int, *words: object) -> list[subprocess.Popen[str]]:
    """Start ``SCRIPT WORDS...`` for each rank, which finds its place in its environment; what it says is kept."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *map(str, words)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def all_say(ranks: list[subprocess.Popen[str]], seconds: float = 280) -> list[str]:
    """Wait until all ranks have ended well; return what each has said."""
    said = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(said)[-4000:]
    return said
