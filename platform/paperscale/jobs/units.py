"""Times and sizes as SLURM writes them."""

from __future__ import annotations

import re

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}|unlimited|infinite", re.IGNORECASE)
_SIZE = re.compile(r"(\d+)([KMGT])", re.IGNORECASE)
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def is_time(text: str) -> bool:
    """Return whether a text is a time limit: ``30`` (minutes), ``02:30:00``, ``1-00:00:00``, ``unlimited``."""
    return bool(_TIME.fullmatch(text))


def seconds(limit: str) -> float:
    """Return a SLURM time limit in seconds (``minutes``, ``h:m:s``, ``d-h:m:s``, ``infinite``)."""
    if not re.fullmatch(r"[\d:-]+", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, [*parts, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs


def is_size(text: str) -> bool:
    """Return whether a text is a size with its unit: ``500M``, ``64G``."""
    return bool(_SIZE.fullmatch(text))


def size_bytes(size: str) -> int:
    """Return a size in bytes; ``G`` is 2**30, as in SLURM."""
    number, unit = _SIZE.fullmatch(size).groups()  # type: ignore[union-attr]
    return int(number) * _BYTES[unit.upper()]


def size_text(megabytes: int) -> str:
    """Return megabytes as SLURM takes them, in the largest unit that loses nothing."""
    return f"{megabytes // 1024}G" if megabytes % 1024 == 0 else f"{megabytes}M"
