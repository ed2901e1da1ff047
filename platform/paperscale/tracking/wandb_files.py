"""Reading back the files that W&B wrote offline, through W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Segment:
    """What one attempt wrote: several segments of one id are one run once they are synced.

    Attributes:
        run_id: the W&B id.
        name: the run's name.
        history: the logged rows.
    """

    run_id: str
    name: str
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Return the number of logged rows."""
        return len(self.history)


def read_runs(folder: Path) -> list[Segment]:
    """Return the offline segments in a ``wandb`` folder, oldest first."""
    return [read_segment(path) for path in sorted(folder.glob("offline-run-*"))]


def read_segment(folder: Path) -> Segment:
    """Return what is in one ``offline-run-...`` folder."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in output.splitlines()]
    run: dict[str, Any] = next((record["run"] for record in records if record["type"] == "run"), {})
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return Segment(run.get("run_id", ""), run.get("display_name", ""), history)
