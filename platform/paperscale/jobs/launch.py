"""``python -m paperscale.jobs.launch PROCS LOGS COMMAND...``: srun for one machine.

Starts one process per rank with its log, passes signals on to all of them, ends the others soon after one has
failed, and exits with the largest exit code (128 + signal for a killed process), as ``srun --kill-on-bad-exit`` does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

GRACE_S = 30.0


def main(arguments: list[str]) -> int:
    """Run the command once per rank; return the exit code."""
    count, logs, command = int(arguments[0]), Path(arguments[1]), arguments[2:]
    (logs / "launcher.pid").write_text(str(os.getpid()))
    port = _free_port()
    ranks = [_start(command, rank, count, port, logs) for rank in range(count)]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(ranks)


def _start(command: list[str], rank: int, count: int, port: int, logs: Path) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    with (logs / f"rank-{rank}.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    while any(process.poll() is None for process in ranks):
        if failed_at is None and any(process.returncode for process in ranks):
            failed_at = time.monotonic()
            _signal_all(ranks, signal.SIGTERM)
        if failed_at and time.monotonic() - failed_at > GRACE_S:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.05)
    return max(128 - process.returncode if process.returncode < 0 else process.returncode for process in ranks)


def _signal_all(ranks: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
