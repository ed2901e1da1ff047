"""Axes: from numbers to places in a picture, and the numbers that are written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paperscale.report.runs import Floats

_MARGIN = 0.04  # of an axis, free on either side of the data


@dataclass(frozen=True)
class Axis:
    """One axis of a picture.

    Attributes:
        low: number at its beginning.
        high: number at its end.
        start: place of its beginning, in pixels.
        end: place of its end.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, arrays: Iterable[Floats], start: float, end: float, log: bool = False, margin: float = _MARGIN
    ) -> Axis:
        """Return an axis on which all finite numbers (of a logarithmic one, all positive) have a place."""
        parts = [array[np.isfinite(array) & ((array > 0) | (not log))] for array in arrays]
        numbers = np.concatenate([part for part in parts if len(part)] or [np.array([1.0])])
        low, high = float(numbers.min()), float(numbers.max())
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)
        if log:
            more = (high / low) ** margin
            return cls(low / more, high * more, start, end, True)
        more = (high - low) * margin
        return cls(0.0 if 0 <= low < more else low - more, high + more, start, end)

    def place(self, values: Floats) -> Floats:
        """Return where numbers are, in pixels; those beyond the axis are at its ends."""
        if self.log:
            share = np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (values - self.low) / (self.high - self.low)
        return self.start + np.clip(share, 0, 1) * (self.end - self.start)

    def at(self, value: float) -> float:
        """Return where a number is, in pixels."""
        return float(self.place(np.array([value]))[0])

    def ticks(self, about: int = 6) -> list[float]:
        """Return some ``about`` round numbers within the axis."""
        if not self.log:
            return _round_numbers(self.low, self.high, about)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [number for number in found if self.low <= number <= self.high]
            if len(found) <= about + 2:
                break
        found = found[:: math.ceil(len(found) / (about + 2))]
        return found if len(found) > 2 else [n for n in _round_numbers(self.low, self.high, about) if n > 0]


def _round_numbers(low: float, high: float, about: int) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(numbers: Sequence[float]) -> list[str]:
    """Return numbers as an axis shows them: all with as many decimals as tell them apart, thousands as ``k``."""
    largest = max((abs(number) for number in numbers), default=0.0)
    if largest >= 10_000:
        factor, letter = next((f, c) for f, c in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= f)
        return [f"{number / factor:.4g}{letter}" if number else "0" for number in numbers]
    return [f"{number:.6g}" if abs(number) >= 1e-4 or not number else f"{number:.0e}" for number in numbers]
