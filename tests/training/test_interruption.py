"""All ranks stop at the same step boundary, whoever was told to and whenever."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANKS = 3


def stops(told: int, at: int, step_s: float) -> list[dict[str, Any]]:
    """Return where each of three real processes has stopped."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("agreement_rank.py")
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(
            [*command, *map(str, (rank, RANKS, port, told, at, step_s))], stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    return [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]


@pytest.mark.parametrize(("told", "at"), [(2, 31), pytest.param(0, 300, marks=pytest.mark.slow)])
def test_all_ranks_stop_at_the_same_boundary_soon_after_one_was_told(told, at):
    found = stops(told, at, step_s=0.001)
    (boundary,) = {row["boundary"] for row in found}
    (every,) = {row["every"] for row in found}
    assert at < boundary <= at + max(1, every)
    assert every > 1, "short steps are not slowed by a look at each"


@pytest.mark.slow
def test_steps_that_last_are_followed_by_a_look_each():
    found = stops(told=1, at=34, step_s=0.06)
    assert {row["boundary"] for row in found} <= set(range(35, 60))
    assert {row["every"] for row in found} <= set(range(4, 21)), "half a second at most between two looks"
