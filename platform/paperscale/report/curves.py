"""Many runs' curves as one line and its band, of no more points than a picture shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paperscale.report.runs import Curve, Floats

BUCKETS = 240
"""Of a line's points along the x axis: in each its least and its greatest are drawn."""
_LONGEST = 20_000  # steps of a common grid


@dataclass(frozen=True)
class Line:
    """What is drawn of a group.

    Attributes:
        x: shape [N], ascending.
        y: the mean, shape [N].
        low: the band's lower edge, shape [M], ``None`` for no band.
        high: its upper edge, shape [M].
        band_x: where the edges are, shape [M].
    """

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    band_x: Floats | None = None


def window(curve: Curve, share: float) -> int:
    """Return the points of a moving mean that reaches over a share of the curve's steps."""
    return max(1, round(share * len(curve.steps)))


def smoothed(curve: Curve, share: float) -> Curve:
    """Return the curve with each value the mean of those around it, over ``share`` of its length.

    Near an end the window is cut off there, alike on both sides: the first and the last value stay as they are.
    """
    half = window(curve, share) // 2
    if half == 0:
        return curve
    count = len(curve.values)
    at = np.arange(count)
    reach = np.minimum(half, np.minimum(at, count - 1 - at))
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return Curve(curve.steps, means, curve.dropped)


def mean_line(curves: Sequence[Curve], log_x: bool = False) -> Line | None:
    """Return the mean over runs, with a band of one sample standard deviation on either side.

    It covers the steps that all of the runs have come to; between logged steps a run's curve is straight.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return None
    low, high = max(c.steps[0] for c in curves), min(c.steps[-1] for c in curves)
    grid = np.unique(np.concatenate([curve.steps for curve in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        return None
    if len(grid) > _LONGEST:
        grid = grid[np.linspace(0, len(grid) - 1, _LONGEST).astype(int)]
    values = np.stack([np.interp(grid, curve.steps, curve.values) for curve in curves])
    mean = values.mean(axis=0)
    x, y = thinned(grid, mean, log_x)
    if len(curves) == 1:
        return Line(x, y)
    spread = values.std(axis=0, ddof=1)
    starts = _starts(grid, log_x)
    low_edge, high_edge = np.minimum.reduceat(mean - spread, starts), np.maximum.reduceat(mean + spread, starts)
    last = slice(-1, None)  # a stretch's edge stands at its beginning; the band reaches to the end
    return Line(
        x,
        y,
        low=np.append(low_edge, low_edge[last]),
        high=np.append(high_edge, high_edge[last]),
        band_x=np.append(grid[starts], grid[last]),
    )


def thinned(x: Floats, y: Floats, log_x: bool = False) -> tuple[Floats, Floats]:
    """Return at most four points of each of :data:`BUCKETS` stretches: ends, least and greatest, in their order."""
    if len(x) <= 2 * BUCKETS:
        return x, y
    starts = _starts(x, log_x)
    ends = np.append(starts[1:], len(x))
    kept = [
        {start, start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end])), end - 1}
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    chosen = np.array(sorted(set().union(*kept)))
    return x[chosen], y[chosen]


def _starts(x: Floats, log_x: bool) -> np.ndarray:
    """Return where the stretches begin that a picture is divided into."""
    if len(x) <= BUCKETS:
        return np.arange(len(x))
    place = np.log(np.maximum(x, 1.0)) if log_x else x
    width = (place[-1] - place[0]) / BUCKETS or math.inf
    bucket = np.minimum(((place - place[0]) / width).astype(int), BUCKETS - 1)
    return np.flatnonzero(np.diff(bucket, prepend=-1))
