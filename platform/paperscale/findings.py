"""What a check has found: OK, WARN or FAIL, each with its fix."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        level: ``OK``, ``WARN`` or ``FAIL``.
        name: what was looked at.
        found: what was found.
        fix: what to do, unless ``OK``.
    """

    level: Level
    name: str
    found: str
    fix: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 if all is well, 1 with warnings, 2 with failures."""
    levels = {finding.level for finding in findings}
    return 2 if "FAIL" in levels else 1 if "WARN" in levels else 0


def print_findings(findings: Iterable[Finding], as_json: bool) -> int:
    """Print findings as they come, or as JSON; return the exit code."""
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            fix = f"\n      -> {finding.fix}" if finding.fix else ""
            print(f"{finding.level:5} {finding.name:18} {finding.found}{fix}", flush=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    return exit_code(found)
