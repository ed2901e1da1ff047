"""Reading ``metrics.jsonl``: every row that a run has logged."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` with each step once: the last attempt's, where a step was repeated.

    An attempt that was cut off and replaced may go on to write for a while: its rows do not displace those of the
    attempt that replaced it, however late they come.

    Args:
        path: the file.
        last_bytes: read no more than this from its end, by default all of it.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None and (start := file.seek(0, os.SEEK_END) - last_bytes) > 0:
            file.seek(start)
            file.readline()  # the rest of a line
        else:
            file.seek(0)
        return _each_step_once(parse_rows(file.read().splitlines()))


def parse_rows(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the rows in lines of JSON; what is no row, as the last line of a killed attempt may be, is left out."""
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # in half the time that each line by itself takes
    except ValueError:
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _each_step_once(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}
    for row in found:
        with contextlib.suppress(KeyError, TypeError):
            key = row["step"], tuple(sorted(row))
            if key not in rows or rows[key]["attempt"] <= row["attempt"]:
                rows[key] = row
    return sorted(rows.values(), key=lambda row: row["step"] or 0)
