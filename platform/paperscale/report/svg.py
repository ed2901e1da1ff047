"""Pictures of lines over two axes as SVG: places, labels and marks, in colours that the page's stylesheet overrules."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paperscale.report.axes import Axis, tick_labels
from paperscale.report.curves import Line
from paperscale.report.runs import Floats

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 160, 10, 44
_LABEL = 14  # pixels between two labels
PALETTE = ("#0b6fb8", "#d1570a", "#1a8a5a", "#b03a84", "#7a6200", "#5b4fc4", "#a3302a", "#4d5964")
"""Colours of groups, which the page's stylesheet sets too; these are for programs that read no stylesheet."""
_INK, _RULE = "#5c6670", "#d9dee3"
_BROKEN = ("", "7 3", "2 3", "9 3 2 3")  # dashes, once the colours are used up


@dataclass(frozen=True)
class Trace:
    """A line with its band.

    Attributes:
        name: what it is called, empty for a line without a label.
        number: of its group, which has a colour.
        line: what is drawn.
        dots: whether its points are marked.
        faint: whether it is of a run that is not counted.
        names: of its points, for those who hover over them.
    """

    name: str
    number: int
    line: Line
    dots: bool = False
    faint: bool = False
    names: tuple[str, ...] = ()


def plot(traces: Sequence[Trace], x_title: str, y_title: str, log_x: bool, log_y: bool) -> str:
    """Return lines over two axes, empty where there are none."""
    if not traces:
        return ""
    lines = [trace.line for trace in traces]
    edges = [edge for line in lines for edge in (line.low, line.high) if edge is not None]
    x_axis = Axis.over((line.x for line in lines), LEFT, WIDTH - RIGHT, log_x, margin=0.0)
    y_axis = Axis.over([*(line.y for line in lines), *([] if log_y else edges)], HEIGHT - BOTTOM, TOP, log_y)
    parts = x_axis_marks(x_axis, TOP, HEIGHT - BOTTOM, x_title) + _y_axis_marks(y_axis, y_title)
    parts += [_band(trace, x_axis, y_axis) for trace in traces if trace.line.low is not None]
    parts += [_line(trace, x_axis, y_axis) for trace in sorted(traces, key=lambda trace: not trace.faint)]
    parts += _end_labels(traces, x_axis, y_axis)
    scale = (
        f'data-x="{x_axis.low!r} {x_axis.high!r} {x_axis.start} {x_axis.end} {int(log_x)}" '
        f'data-y="{y_axis.low!r} {y_axis.high!r} {y_axis.start} {y_axis.end} {int(log_y)}"'
    )
    return svg(parts, HEIGHT, f"{y_title} over {x_title}", scale)


def svg(parts: Iterable[str], height: float, title: str, scale: str = "") -> str:
    """Return a picture of :data:`WIDTH` by ``height`` pixels; ``scale`` holds its attributes beside."""
    label = html.escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'font-family="sans-serif" font-size="12" aria-label="{label}" {scale}>'
        f"{''.join(parts)}</svg>"
    )


def stroked(name: str, colour: str, width: float) -> str:
    """Return the attributes of a shape that is its outline alone, of a class."""
    return f'class="{name}" fill="none" stroke="{colour}" stroke-width="{width:g}"'


def coloured(name: str, number: int, width: float = 0.0) -> str:
    """Return the attributes of a shape in a group's colour: its outline of some width, or without one its inside."""
    name, colour = f"{name} s{number % len(PALETTE)}", PALETTE[number % len(PALETTE)]
    return stroked(name, colour, width) if width else f'class="{name}" fill="{colour}"'


def words(name: str, x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    """Return a text in the axes' colour."""
    return (
        f'<text class="{name}" fill="{_INK}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
        f"{html.escape(text)}</text>"
    )


def x_axis_marks(axis: Axis, top: float, bottom: float, title: str) -> list[str]:
    """Return an x axis below a plot that reaches from ``top`` to ``bottom``, and its grid."""
    numbers = axis.ticks(7)
    parts = [f'<path {stroked("grid", _RULE, 1)} d="M{axis.at(n):.1f},{top}V{bottom}"/>' for n in numbers]
    parts += [
        words("tick", axis.at(n), bottom + 16, label, "middle")
        for n, label in zip(numbers, tick_labels(numbers), strict=True)
    ]
    parts.append(words("axis", (axis.start + axis.end) / 2, bottom + 36, title, "middle"))
    return [*parts, f'<path {stroked("frame", _INK, 1)} d="M{axis.start},{bottom}H{axis.end}"/>']


def _y_axis_marks(axis: Axis, title: str) -> list[str]:
    numbers = axis.ticks()
    parts = [f'<path {stroked("grid", _RULE, 1)} d="M{LEFT},{axis.at(n):.1f}H{WIDTH - RIGHT}"/>' for n in numbers]
    parts += [
        words("tick", LEFT - 7, axis.at(n) + 4, label, "end")
        for n, label in zip(numbers, tick_labels(numbers), strict=True)
    ]
    middle = (axis.start + axis.end) / 2
    return [*parts, words("axis", 13, middle, title, "middle", f' transform="rotate(-90 13 {middle:.0f})"')]


def _style(trace: Trace) -> str:
    dashes = "3 3" if trace.faint else _BROKEN[trace.number // len(PALETTE) % len(_BROKEN)]
    line = coloured("line faint", trace.number, 1) if trace.faint else coloured("line", trace.number, 1.7)
    return f'{line} stroke-dasharray="{dashes}"' if dashes else line


def _line(trace: Trace, x_axis: Axis, y_axis: Axis) -> str:
    xs, ys = x_axis.place(trace.line.x), y_axis.place(trace.line.y)
    names = f' data-names="{html.escape("|".join(trace.names))}"' if trace.names else ""
    name = html.escape(trace.name)
    points = _points(xs, ys)
    path = f'<path {_style(trace)} data-name="{name}"{names} d="M{points}"><title>{name}</title></path>'
    if not trace.dots and len(xs) > 1:
        return path
    dot = coloured("dot", trace.number)
    circles = (f'<circle {dot} cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in zip(xs, ys, strict=True))
    return path + "".join(circles)


def _band(trace: Trace, x_axis: Axis, y_axis: Axis) -> str:
    line = trace.line
    if line.low is None or line.high is None or line.band_x is None:
        return ""
    xs, lows, highs = x_axis.place(line.band_x), y_axis.place(line.low), y_axis.place(line.high)
    outline = f"{_points(xs, highs)}L{_points(xs[::-1], lows[::-1])}"
    return f'<path {coloured("band", trace.number)} opacity="0.16" d="M{outline}Z"/>'


def _points(xs: Floats, ys: Floats) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))


def _end_labels(traces: Sequence[Trace], x_axis: Axis, y_axis: Axis) -> list[str]:
    """Return the lines' names beside their ends, kept apart; of too many, as many as there is room for."""
    room = int((HEIGHT - BOTTOM - TOP) // _LABEL)
    chosen = sorted(traces, key=lambda trace: trace.faint)[:room]
    chosen.sort(key=lambda trace: y_axis.at(trace.line.y[-1]))
    places = [y_axis.at(trace.line.y[-1]) for trace in chosen]
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + _LABEL)
    limit = HEIGHT - BOTTOM + 4.0
    for at in reversed(range(len(places))):
        places[at] = min(places[at], limit)
        limit = places[at] - _LABEL
    parts = []
    for trace, y in zip(chosen, places, strict=True):
        x = WIDTH - RIGHT
        name = trace.name if len(trace.name) <= 23 else f"{trace.name[:22]}…"
        true = y_axis.at(trace.line.y[-1])
        end = x_axis.at(trace.line.x[-1])
        lead = f'{coloured("lead", trace.number, 1)} stroke-dasharray="1 3"'
        parts.append(f'<path {lead} d="M{end:.1f},{true:.1f}H{x}L{x + 8},{y:.1f}"/>')
        label = coloured("label", trace.number)
        parts.append(f'<text {label} x="{x + 11}" y="{y + 4:.1f}">{html.escape(name)}</text>')
    return parts
