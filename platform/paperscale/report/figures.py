"""Figures as SVG, drawn from the runs' numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from paperscale.report import curves
from paperscale.report.axes import Axis
from paperscale.report.runs import Curve, Members, Record, converted, finals, quantity
from paperscale.report.spec import MOMENTS, Figure
from paperscale.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Trace, coloured, plot, svg, words, x_axis_marks
from paperscale.report.verdicts import Sample

_ROW = 26  # pixels between two rows of dots


@dataclass(frozen=True)
class Drawn:
    """A figure that is ready.

    Attributes:
        title: of the figure.
        svg: the picture, empty where there is nothing to draw.
        notes: what a reader must know of it.
    """

    title: str
    svg: str
    notes: list[str]


def draw(figure: Figure, members: Mapping[str, Members]) -> Drawn:
    """Return a figure of a section.

    Args:
        figure: what is asked for.
        members: every group of the section, in order: a group has the same colour in all figures.
    """
    chosen = {name: members[name] for name in figure.groups or members}
    numbers = {name: number for number, name in enumerate(members)}
    if figure.kind == "dots":
        return _dots(figure, chosen, numbers)
    if figure.kind == "layers":
        return _layers(figure, chosen, numbers)
    return _curves(figure, chosen, numbers)


# -- a metric over the steps ---------------------------------------------------------------------------------------


def _curves(figure: Figure, chosen: Mapping[str, Members], numbers: Mapping[str, int]) -> Drawn:
    traces, dropped, banded = [], 0, False
    windows: set[int] = set()
    log_x = figure.x == "log"

    def prepared(records: Iterable[Record]) -> list[Curve]:
        nonlocal dropped
        raw = [record.curves[figure.metric] for record in records if figure.metric in record.curves]
        dropped += sum(curve.dropped for curve in raw)
        windows.update(curves.window(curve, figure.smooth) for curve in raw)
        in_unit = [Curve(c.steps, converted(c.values, figure.unit), c.dropped) for c in raw]
        return [curves.smoothed(curve, figure.smooth) for curve in in_unit]

    for name, of in chosen.items():
        if line := curves.mean_line(prepared(of.counted), log_x):
            banded |= line.low is not None
            traces.append(Trace(of.group.label or name, numbers[name], line))
    for name, of in chosen.items():
        for record, curve in zip(of.unfinished, map(prepared, ([r] for r in of.unfinished)), strict=True):
            if curve and (line := curves.mean_line(curve, log_x)):
                traces.append(Trace(f"{record.run.name} ({record.state})", numbers[name], line, faint=True))
    notes = ["band: ± 1 standard deviation over seeds"] if banded else []
    if max(windows, default=1) > 1:
        low, high = min(windows), max(windows)
        points = f"{low}" if low == high else f"{low} to {high}"
        notes.append(
            f"smoothed: each point is the mean of {points} logged values around it ({figure.smooth:.1%} of the run)"
        )
    notes += ["dashed: not finished"] if any(trace.faint for trace in traces) else []
    notes += [f"left out because they are not finite: {dropped:,}"] if dropped else []
    what = quantity(figure.metric, figure.unit)
    picture = plot(traces, "step", what, log_x, figure.y == "log")
    return Drawn(figure.title or what, picture, notes)


# -- metrics of layers ---------------------------------------------------------------------------------------------


def _layers(figure: Figure, chosen: Mapping[str, Members], numbers: Mapping[str, int]) -> Drawn:
    traces, banded = [], False
    for name, of in chosen.items():
        rows = [record.layers(figure.metric, figure.at) for record in of.counted]
        rows = [row for row in rows if row]
        layers = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
        if not layers:
            continue
        values = np.array([[row[layer] for layer in layers] for row in rows])
        mean = values.mean(axis=0)
        order = np.argsort(-mean) if figure.sort else np.arange(len(layers))
        x = np.arange(1.0, len(layers) + 1) if figure.sort else np.array([float(number) for number, _ in layers])
        spread = values.std(axis=0, ddof=1)[order] if len(rows) > 1 else None
        banded |= spread is not None
        mean = mean[order]
        band = (None, None, None) if spread is None else (mean - spread, mean + spread, x)
        names = tuple(layers[at][1] for at in order)
        traces.append(
            Trace(of.group.label or name, numbers[name], curves.Line(x, mean, *band), len(x) < 120, names=names)
        )
    notes = [MOMENTS[figure.at]]
    notes += ["band: ± 1 standard deviation over seeds"] if banded else []
    what = figure.metric.rstrip("/")
    x_title = "layers, by size" if figure.sort else "layer"
    picture = plot(traces, x_title, what, figure.x == "log", figure.y == "log")
    return Drawn(figure.title or what, picture, notes if picture else [])


# -- a number of each run ------------------------------------------------------------------------------------------


def _dots(figure: Figure, chosen: Mapping[str, Members], numbers: Mapping[str, int]) -> Drawn:
    samples = {
        name: Sample.of(finals(of.counted, figure.metric, figure.unit, figure.evaluation))
        for name, of in chosen.items()
    }
    what = quantity(figure.metric, figure.unit)
    title = figure.title or what
    if not any(sample.values for sample in samples.values()):
        return Drawn(title, "", [])
    bottom = TOP + _ROW * len(chosen)
    arrays = [np.array(sample.values, dtype=np.float64) for sample in samples.values()]
    axis = Axis.over(arrays, RIGHT, WIDTH - 20, figure.x == "log")
    parts = x_axis_marks(axis, TOP, bottom, what)
    for row, (name, sample) in enumerate(samples.items()):
        y = TOP + _ROW * (row + 0.5)
        parts.append(words("tick", RIGHT - 10, y + 4, chosen[name].group.label or name, "end"))
        if not sample.values:
            parts.append(words("tick", RIGHT + 6, y + 4, "no result"))
            continue
        mean, seed = coloured("mean", numbers[name], 3), coloured("seed", numbers[name], 1.5)
        at = axis.at(sample.mean)
        parts.append(f'<path {mean} d="M{at:.1f},{y - 8:.1f}v16"><title>mean {sample}</title></path>')
        for value in sample.values:
            place = f'cx="{axis.at(value):.1f}" cy="{y:.1f}" r="4"'
            parts.append(f"<circle {seed} {place}><title>{value:.5g}</title></circle>")
    notes = ["a dot for each run, a stroke for their mean"]
    broken = sum(sample.broken for sample in samples.values())
    notes += [f"left out because they are not finite: {broken}"] if broken else []
    return Drawn(title, svg(parts, bottom + BOTTOM, title), notes)
