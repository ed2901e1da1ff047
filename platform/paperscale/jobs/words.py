"""Times and figures as people write them."""

from __future__ import annotations

import datetime
import math
import re
import time
from collections.abc import Sequence

from paperscale.errors import UserError

COLOURS = {
    "running": "green",
    "queued": "cyan",
    "finished": "blue",
    "stopped": "yellow",
    "failed": "red",
    "cancelled": "magenta",
    "unknown": "yellow",
}
"""Of a run's states."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dots of a cell, row by row


def duration(seconds: float) -> str:
    """Return ``45 s``, ``12 min``, ``1 h 05 min`` or ``3 d 4 h``."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def ago(then: float, now: float | None = None) -> str:
    """Return how long ago a Unix time was."""
    return f"{duration((time.time() if now is None else now) - then)} ago"


def clock(then: float) -> str:
    """Return a Unix time as the clock on the wall shows it, with the date unless it is today's."""
    moment = datetime.datetime.fromtimestamp(then)
    today = moment.date() == datetime.date.today()
    return f"{moment:%H:%M:%S}" if today else f"{moment:%Y-%m-%d %H:%M}"


def since(text: str) -> float:
    """Return the Unix time that ``2d``, ``36h`` (ago) or a date names.

    Raises:
        UserError: it is neither.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text):
        return time.time() - float(found[1]) * _UNITS[found[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UserError(f"--since {text}: write 30m, 12h, 2d, 1w or a date such as 2026-01-31") from error


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """Return a curve drawn with braille dots: ``height`` lines of at most ``width`` characters.

    Args:
        values: of the curve, from left to right; those that are not finite leave a gap.
        width: characters of a line, of two dots each.
        height: lines, of four dots each.
    """
    columns = _binned(values, 2 * width)
    finite = [value for value in columns if value is not None]
    if not finite:
        return []
    low, high, dots = min(finite), max(finite), 4 * height - 1
    cells = [[0] * ((len(columns) + 1) // 2) for _ in range(height)]
    previous: int | None = None
    for x, value in enumerate(columns):
        if value is None:
            previous = None
            continue
        y = round((high - value) / (high - low) * dots) if high > low else dots
        for dot in range(min(y, y if previous is None else previous), max(y, y if previous is None else previous) + 1):
            cells[dot // 4][x // 2] |= _BRAILLE[dot % 4][x % 2]
        previous = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def _binned(values: Sequence[float], count: int) -> list[float | None]:
    """Return at most ``count`` means over equal parts of the values, ``None`` for a part without a finite one."""
    count = min(count, len(values))
    means: list[float | None] = []
    for number in range(count):
        part = values[number * len(values) // count : (number + 1) * len(values) // count]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    return means
