"""Noticing that ranks stand still, and which one the others wait for; naming slow ones. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paperscale.jobs.run import Attempt
from paperscale.training.pulse import PHASES, SLOW_PHASES, Reading

FACTOR = 10.0
"""Times the longest pause so far between two events of the loop, after which a rank is taken to hang."""
LEAST_S = 60.0
"""Seconds that a rank may always stand still."""
START_S = 600.0
"""Seconds for what may be slow: imports, compilation, the first batches, a checkpoint."""
STOPPED_S = 15.0
"""Seconds that a process may be stopped (SIGSTOP)."""
STALE_S = 20.0
"""Age of a node's report after which the node is taken to be lost."""
_WAIT_FOR_REPORTS_S = 3.0
_SLOWER = 1.5
_COLLECTIVE = re.compile(r"distributed_c10d|nn/parallel/distributed|_engine_run_backward|torch/distributed")


def rank_facts(rank: int, process: subprocess.Popen[bytes], reading: Reading, started: float) -> dict[str, Any]:
    """Return what a node's report says of a rank. ``started``: the ranks' start on the monotonic clock."""
    now = time.monotonic()
    return {
        "rank": rank,
        "pid": process.pid,
        "step": reading.step,
        "phase": reading.phase,
        "warm": reading.warm,
        "still_s": round(now - (reading.since or started), 2),
        "beat": time.time() - (now - reading.beat) if reading.beat else None,
        "longest_s": round(reading.longest_s, 4),
        "step_s": round(reading.step_s, 5),
        "local_s": round(reading.local_s, 5),
        "data_s": round(reading.data_s, 5),
        "state": _process_state(process.pid) if process.poll() is None else "gone",
    }


def _process_state(pid: int) -> str:
    """Return the letter that the kernel gives: R, S, D (waits for a disk), T (stopped) ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


class Watchdog:
    """The view that a node's agent has of an attempt.

    Args:
        attempt: the attempt's directory.
        node: number of this node.
    """

    def __init__(self, attempt: Attempt, node: int):
        self.attempt, self.node = attempt, node
        self.fixed = float(os.environ.get("PAPERSCALE_HANG_S") or 0) or None
        self.start_s = float(os.environ.get("PAPERSCALE_START_S") or START_S)
        self._slow: dict[int, int] = {}

    # -- hangs ---------------------------------------------------------------------------------------------

    def limit(self, rank: dict[str, Any]) -> float:
        """Return how long a rank may stand still where it is, in seconds."""
        if rank["phase"] in SLOW_PHASES or not rank["warm"]:
            return self.start_s
        return self.fixed or max(LEAST_S, FACTOR * rank["longest_s"])

    def hung(self, ranks: Sequence[dict[str, Any]]) -> float | None:
        """Return the limit in seconds that a rank of this node has passed, if one has."""
        for rank in ranks:
            limit = self.limit(rank)
            if rank["state"] == "T":
                limit = min(limit, self.fixed or STOPPED_S)
            if rank["state"] != "gone" and rank["still_s"] > limit:
                return limit
        return None

    def announced(self) -> bool:
        """Return whether some node's agent has found the ranks to hang."""
        return (self.attempt.path / "hang").exists()

    def announce(self) -> None:
        """Let the other nodes' agents report and keep their stacks too."""
        with contextlib.suppress(OSError):
            (self.attempt.path / "hang").touch()

    def name_the_cause(self, limit: float | None) -> str:
        """Return in a line which rank of which node is waited for; waits until the other nodes have reported.

        Args:
            limit: that was passed on this node; ``None`` where another node has found out.
        """
        time.sleep(_WAIT_FOR_REPORTS_S)
        reports = self.attempt.nodes()
        others = reports if self.attempt.verdict is None else []  # with a verdict, agents have ended by themselves
        lost = [report for report in others if report["node"] != self.node and not self._answers(report)]
        for report in lost if self.node == 0 else ():  # node 0 runs the batch script, which is still there
            self.attempt.suspect(report["host"], "lost: it does not answer node 0")
        ranks = [{**rank, "host": report["host"]} for report in reports for rank in report["ranks"]]
        text = self._waited_for(ranks)
        if lost:
            text = f"{socket.gethostname()} does not reach {', '.join(report['host'] for report in lost)}; {text}"
        after = f" for more than {limit:.0f} s" if limit else ""
        with contextlib.suppress(OSError):
            (self.attempt.path / "hang.json").write_text(json.dumps({"text": text, "ranks": ranks}, indent=1))
        return f"hung{after}: {text}; see stacks-rank-*.txt in {self.attempt.path}"

    @staticmethod
    def _answers(report: dict[str, Any]) -> bool:
        """Return whether a node's agent can be reached and reports."""
        if time.time() - report["time"] > STALE_S:
            return False
        try:
            socket.create_connection((report["host"], report["port"]), timeout=_WAIT_FOR_REPORTS_S).close()
        except OSError:
            return False
        return True

    def _waited_for(self, ranks: list[dict[str, Any]]) -> str:
        """Name the ranks that do not run, or else those that are behind, or else those that wait for no other."""
        stopped = [rank for rank in ranks if rank["state"] in ("T", "gone")]
        places = [(rank["step"], PHASES.index(rank["phase"])) for rank in ranks]
        behind = [rank for rank, place in zip(ranks, places, strict=True) if place == min(places)]
        busy = [rank for rank in behind if not self._waits_for_others(rank["rank"])]
        if not stopped and not busy and len(behind) == len(ranks) > 1:
            return f"all ranks wait for each other in '{ranks[0]['phase']}' of step {ranks[0]['step'] + 1}"
        how = {"T": "its process is stopped", "D": "its process waits for a disk", "gone": "its process is gone"}
        named = [
            f"rank {rank['rank']} on {rank['host']} stands in '{rank['phase']}' of step {rank['step'] + 1} for "
            f"{rank['still_s']:.0f} s" + (f" ({how[rank['state']]})" if rank["state"] in how else "")
            for rank in (stopped or busy or behind)[:4]
        ]
        return ", ".join(named)

    def _waits_for_others(self, rank: int) -> bool:
        """Return whether a rank's last stack shows it inside a collective operation."""
        try:
            stacks = (self.attempt.path / f"stacks-rank-{rank}.txt").read_text().rpartition("Current thread")[2]
        except OSError:
            return False
        return bool(_COLLECTIVE.search(stacks))

    # -- slow ranks ----------------------------------------------------------------------------------------

    def compare_ranks(self) -> list[dict[str, Any]]:
        """Write the ranks that are slower than the others to ``stragglers.json``; return those newly found."""
        ranks = [{**rank, "host": report["host"]} for report in self.attempt.nodes() for rank in report["ranks"]]
        timed = [rank for rank in ranks if rank["step_s"] > 0]
        if len(timed) < 2 or len(timed) < len(ranks):
            return []
        local = statistics.median_low(rank["local_s"] for rank in timed)
        data = statistics.median_low(rank["data_s"] for rank in timed)
        slow = [r for r in timed if r["local_s"] > _SLOWER * local and r["local_s"] - local > 0.1 * r["step_s"]]
        self._slow = {rank["rank"]: self._slow.get(rank["rank"], 0) + 1 for rank in slow}
        lasting = [rank for rank in slow if self._slow[rank["rank"]] >= 3]
        found = [
            {
                "rank": rank["rank"],
                "host": rank["host"],
                "slower": round(rank["local_s"] / local, 2) if local else None,
                "what": "data" if rank["data_s"] - data > (rank["local_s"] - local) / 2 else "compute",
                "seconds": round(rank["local_s"] - local, 4),
            }
            for rank in lasting
        ]
        with contextlib.suppress(OSError):
            (self.attempt.path / "stragglers.json").write_text(json.dumps(found))
        return [entry for entry in found if self._slow[entry["rank"]] == 3]
