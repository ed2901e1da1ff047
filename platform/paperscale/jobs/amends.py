"""What an attempt has found out that those after it must heed: samples to pass over, a smaller forward pass.

Each attempt writes its own ``amends.json``, once; rank 0 of the next one reads them all and tells the other ranks.
"""

from __future__ import annotations

import contextlib
import json
from typing import TypedDict

from paperscale.atomic import write_atomically
from paperscale.jobs.run import Attempt, Run, read_json

FILE = "amends.json"


class Amends(TypedDict):
    """What is changed about a run.

    Attributes:
        passed_over: ranges of consumed samples that are not trained on, one for each time that the run went back.
        data: attributes of the DataModule.
    """

    passed_over: list[tuple[int, int]]
    data: dict[str, int]


def note(attempt: Attempt, amends: Amends) -> None:
    """Leave what the next attempt must heed. Of several ranks that find the same, the first writes it."""
    with contextlib.suppress(FileExistsError), (attempt.path / FILE).open("x") as file:
        json.dump(amends, file)


def collect(run: Run) -> Amends:
    """Return what all attempts have found out."""
    found = Amends(passed_over=[], data={})
    for attempt in run.attempts():
        one = read_json(attempt.path / FILE)
        found["passed_over"] += [(start, stop) for start, stop in one.get("passed_over", [])]
        found["data"] |= one.get("data", {})
    return found


def forget_data(run: Run) -> None:
    """Let what the recipe says of the DataModule count again."""
    for attempt in run.attempts():
        if (content := read_json(attempt.path / FILE)).get("data"):
            write_atomically(attempt.path / FILE, json.dumps({**content, "data": {}}).encode())
