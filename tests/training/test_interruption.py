"""All ranks stop at the same step boundary, whoever was told to and whenever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from processes import all_say, start_ranks

RANKS = 3


def stops(told: int, at: int, step_s: float) -> list[dict[str, Any]]:
    """Return where each of three real processes has stopped."""
    ranks = start_ranks(Path(__file__).with_name("agreement_rank.py"), RANKS, told, at, step_s)
    return [json.loads(said.splitlines()[-1]) for said in all_say(ranks, 60)]


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
