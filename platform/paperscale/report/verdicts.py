"""Mean and spread over seeds, and whether a statement of the paper holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paperscale.report.runs import Members, finals
from paperscale.report.spec import Check

HOLDS, FAILS, OPEN, WAITS = "holds", "does not hold", "not decided", "no result"
_ERRORS = 2.0
"""Standard errors that a difference must reach: beyond that, chance alone rarely leads two equal means apart."""


@dataclass(frozen=True)
class Sample:
    """Numbers of the runs of a group.

    Attributes:
        values: the finite ones.
        broken: how many were NaN or infinite.
    """

    values: tuple[float, ...]
    broken: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Part the finite ones from the others."""
        finite = tuple(value for value in values if math.isfinite(value))
        return cls(finite, len(values) - len(finite))

    @property
    def mean(self) -> float:
        """Return the mean, NaN of none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float | None:
        """Return the sample standard deviation, ``None`` of fewer than two numbers."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """Return ``mean ± spread``."""
        digits = decimals(self.mean, self.spread)
        if self.spread is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.spread:.{digits}f}"


def decimals(mean: float, spread: float | None) -> int:
    """Return the decimal places of a mean: two, or more where the numbers are small."""
    least = min((abs(value) for value in (mean, spread or 0.0) if value and math.isfinite(value)), default=1.0)
    return min(6, max(2, 1 - math.floor(math.log10(least))))


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a statement.

    Attributes:
        claim: the statement.
        word: :data:`HOLDS`, :data:`FAILS`, :data:`OPEN` (there are numbers) or :data:`WAITS` (there are none).
        detail: the numbers it rests on.
        why: what leaves it open.
    """

    claim: str
    word: str
    detail: str
    why: str = ""


def judge(check: Check, members: Mapping[str, Members]) -> Verdict:
    """Return whether a statement holds for the finished runs.

    It waits while a group has no finite number. An order holds if each group's mean is greater than the one's before
    it by at least two standard errors of their difference, and does not if one is less by as much; else it is open.
    """
    names = check.order or [check.group]
    samples = [Sample.of(finals(members[name].counted, check.metric, check.unit, check.evaluation)) for name in names]
    labels = [members[name].group.label or name for name in names]
    missing = [label for label, sample in zip(labels, samples, strict=True) if not sample.values]
    if missing:
        return Verdict(check.claim, WAITS, f"missing: {', '.join(missing)}")
    unit = " %" if check.unit else ""
    told = [f"{label} {sample}{unit} ({len(sample.values)})" for label, sample in zip(labels, samples, strict=True)]
    told += [
        f"{sample.broken} of {label} not finite" for label, sample in zip(labels, samples, strict=True) if sample.broken
    ]
    (word, why), how = _ascends(samples) if check.order else _within(check, samples[0])
    return Verdict(check.claim, word, "; ".join([", ".join(told), *how]), why)


def _ascends(samples: Sequence[Sample]) -> tuple[tuple[str, str], list[str]]:
    """Return the word and its reason, and how far each mean is from the next."""
    compared = [_compare(lower, upper) for lower, upper in pairwise(samples)]
    words = [word for word, _ in compared]
    found = next((word for kind in (FAILS, OPEN) for word in words if word[0] == kind), (HOLDS, ""))
    return found, [text for _, text in compared]


def _compare(lower: Sample, upper: Sample) -> tuple[tuple[str, str], str]:
    difference = upper.mean - lower.mean
    text = f"{difference:+.{decimals(difference, None)}f}"
    if lower.spread is None or upper.spread is None:
        return (OPEN, "one seed"), text
    error = math.hypot(lower.spread / math.sqrt(len(lower.values)), upper.spread / math.sqrt(len(upper.values)))
    text += f", {abs(difference) / error:.1f} standard errors" if error else ""
    if not difference or abs(difference) < _ERRORS * error:
        return (OPEN, "within the spread"), text
    return (HOLDS if difference > 0 else FAILS, ""), text


def _within(check: Check, sample: Sample) -> tuple[tuple[str, str], list[str]]:
    holds, how = True, []
    if check.near is not None and check.tolerance is not None:
        holds &= abs(sample.mean - check.near) <= check.tolerance
        how.append(f"wanted {check.near:g} ± {check.tolerance:g}")
    if check.at_most is not None:
        holds &= sample.mean <= check.at_most
        how.append(f"wanted at most {check.at_most:g}")
    if check.at_least is not None:
        holds &= sample.mean >= check.at_least
        how.append(f"wanted at least {check.at_least:g}")
    return (HOLDS if holds else FAILS, ""), how
