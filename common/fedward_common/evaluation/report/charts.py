"""Draw the report's charts as inline SVG: no library, no script, colours from the page's style sheet.

Every text goes through `Markup.format`, which escapes it. Charts are 440 units wide, so that their text
stays readable when a phone shows them at 360 pixels. Lines differ in dash as well as colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_WIDTH, _HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 12, 38
_MAX_DISTINCT = 6
_MAX_MARKED = 30

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart; a point without a y value leaves a gap.

    Attributes:
        style: class that gives colour and dash, see `line_style`.
    """

    name: str
    points: tuple[Point, ...]
    style: str


@dataclass(frozen=True)
class Pair:
    """Two values of one site to compare: before (its own model) and after (the federated one)."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class _Axes:
    """Maps data to the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        along = (value - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + along * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        along = (value - self.y_low) / (self.y_high - self.y_low)
        return round(_HEIGHT - _BOTTOM - along * (_HEIGHT - _TOP - _BOTTOM), 1)


def line_style(index: int, count: int) -> str:
    """Class of one of `count` thin lines: distinct while colours can be told apart, else all alike."""
    return f"s{index}" if count <= _MAX_DISTINCT else "many"


def line_chart(
    lines: Sequence[Line], *, label: str, y_label: str, marked_round: int | None, y_max: float | None = None
) -> Markup:
    """Draw values per round, the first line on top of the others.

    Args:
        lines: what to draw; the first is the federation's.
        label: what the chart shows, read aloud by screen readers.
        y_label: name of the y axis.
        marked_round: round to mark as the selected one.
        y_max: the values' upper end, if they have one.

    Returns:
        An SVG element; empty when no line has a value.
    """
    values = [y for line in lines for _, y in line.points if y is not None]
    rounds = [x for line in lines for x, _ in line.points]
    if not values:
        return Markup("")
    y_ticks = ticks(min(values), max(values), y_max)
    x_ticks = _round_ticks(int(min(rounds)), int(max(rounds)))
    axes = _Axes(min(x_ticks[0], min(rounds)), max(x_ticks[-1], max(rounds)), y_ticks[0], y_ticks[-1])
    if axes.x_low == axes.x_high:
        axes = _Axes(axes.x_low - 1, axes.x_high + 1, axes.y_low, axes.y_high)
    parts = [_frame(axes, x_ticks, y_ticks, "Round", y_label)]
    if marked_round is not None and axes.x_low <= marked_round <= axes.x_high:
        parts.append(_marker(axes, marked_round))
    parts += [_polyline(axes, line) for line in reversed(lines)]
    return _svg(_HEIGHT, label, parts)


def roc_chart(curves: Sequence[Line], *, label: str, operating_point: tuple[float, float] | None) -> Markup:
    """Draw ROC curves over the diagonal of chance, and the point of the plan's threshold."""
    if not any(curve.points for curve in curves):
        return Markup("")
    axes = _Axes(0, 1, 0, 1)
    even = (0.0, 0.25, 0.5, 0.75, 1.0)
    parts = [_frame(axes, even, even, "1 − specificity", "Sensitivity")]
    parts.append(
        Markup('<line class="chance" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            axes.x(0), axes.y(0), axes.x(1), axes.y(1)
        )
    )
    parts += [_polyline(axes, curve, marked=False) for curve in reversed(curves)]
    if operating_point is not None:
        x, y = operating_point
        parts.append(
            Markup('<circle class="operating" cx="{}" cy="{}" r="6"><title>{}</title></circle>').format(
                axes.x(x), axes.y(y), f"at the threshold: sensitivity {y:.3f}, specificity {1 - x:.3f}"
            )
        )
    return _svg(_HEIGHT, label, parts)


def curve_chart(lines: Sequence[Line], *, label: str, x_label: str, y_label: str) -> Markup:
    """Draw curves over a quantity, the first line on top; empty when no line has a point."""
    points = [(x, y) for line in lines for x, y in line.points if y is not None]
    if not points:
        return Markup("")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(0.0, max(y for _, y in points))
    axes = _Axes(x_low, x_high if x_high > x_low else x_low + 1, y_ticks[0], y_ticks[-1])
    x_ticks = [mark for mark in ticks(axes.x_low, axes.x_high) if axes.x_low <= mark <= axes.x_high]
    parts = [_frame(axes, x_ticks, y_ticks, x_label, y_label)]
    parts += [_polyline(axes, line, marked=False) for line in reversed(lines)]
    return _svg(_HEIGHT, label, parts)


def pair_chart(pairs: Sequence[Pair], *, label: str) -> Markup:
    """Draw one row a site: an open circle for its own model, a filled one for the federated model."""
    if not pairs:
        return Markup("")
    row, top, left = 30, 8, 150
    height = top + row * len(pairs) + 30
    values = [value for pair in pairs for value in (pair.before, pair.after)]
    marks = ticks(min(values), max(values), 1.0)
    scale = (_WIDTH - left - 24) / (marks[-1] - marks[0])

    def place(value: float) -> float:
        return round(left + 8 + (value - marks[0]) * scale, 1)

    parts = [
        Markup(
            '<line class="grid" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>'
            '<text class="tick mid" x="{0}" y="{3}">{4}</text>'
        ).format(place(mark), top, height - 26, height - 10, _number(mark, marks))
        for mark in marks
    ]
    for index, pair in enumerate(pairs):
        middle = top + row * index + row / 2
        better = "rise" if pair.after >= pair.before else "fall"
        parts.append(
            Markup(
                '<text class="name" x="{left}" y="{text}">{name}</text>'
                '<line class="{better}" x1="{before}" x2="{after}" y1="{y}" y2="{y}"/>'
                '<circle class="own" cx="{before}" cy="{y}" r="5"/>'
                '<circle class="ours" cx="{after}" cy="{y}" r="6"/>'
                "<title>{note}</title>"
            )
            .format(
                left=left - 8,
                text=middle + 4,
                name=_shorten(pair.name, 17),
                better=better,
                before=place(pair.before),
                after=place(pair.after),
                y=middle,
                note=f"{pair.name}: own model {pair.before:.3f}, federated {pair.after:.3f}",
            )
            .join((Markup("<g>"), Markup("</g>")))
        )
    return _svg(height, label, parts)


def sample(style: str) -> Markup:
    """Draw the short line that stands for a style in a legend."""
    return Markup(
        '<svg class="sample" viewBox="0 0 26 10" aria-hidden="true"><path class="line {}" d="M1 5H25"/></svg>'
    ).format(style)


def ticks(low: float, high: float, upper: float | None = None) -> list[float]:
    """Choose three to six round numbers that cover [low, high], none above `upper`.

    >>> ticks(0.62, 0.955, 1.0)
    [0.6, 0.7, 0.8, 0.9, 1.0]
    """
    span = max(high - low, 0.02 * max(abs(high), 0.1))
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if span / (magnitude * factor) <= 4.5)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    marks = [round(index * step, 10) for index in range(first, last + 1)]
    if upper is not None:
        marks = [mark for mark in marks if mark < upper] + [upper] * (marks[-1] >= upper)
        if len(marks) < 2:
            marks.insert(0, round(upper - step, 10))
    return marks


def _round_ticks(first: int, last: int) -> list[float]:
    step = next(
        factor * 10**power
        for power in range(6)
        for factor in (1, 2, 5)
        if (last - first) / (factor * 10**power) <= 8
    )
    return [float(value) for value in range(first, last + 1) if value % step == 0] or [float(first)]


def _frame(
    axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str
) -> Markup:
    parts = [
        Markup(
            '<line class="grid" x1="{0}" y1="{2}" x2="{1}" y2="{2}"/>'
            '<text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(_LEFT, _WIDTH - _RIGHT, axes.y(mark), _LEFT - 6, axes.y(mark) + 4, _number(mark, y_ticks))
        for mark in y_ticks
    ]
    parts += [
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(
            axes.x(mark), _HEIGHT - _BOTTOM + 16, _number(mark, x_ticks)
        )
        for mark in x_ticks
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup(
            '<text class="axis mid" x="{}" y="{}">{}</text>'
            '<text class="axis mid" transform="translate(12 {}) rotate(-90)">{}</text>'
        ).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label, middle, y_label)
    )
    return Markup("").join(parts)


def _marker(axes: _Axes, round_index: int) -> Markup:
    x = axes.x(round_index)
    side, shift = ("end", -5) if x > _WIDTH * 0.6 else ("start", 5)
    return Markup(
        '<line class="selected" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>'
        '<text class="tick {3}" x="{4}" y="{5}">selected</text>'
    ).format(x, _TOP, _HEIGHT - _BOTTOM, side, x + shift, _HEIGHT - _BOTTOM - 6)


def _polyline(axes: _Axes, line: Line, *, marked: bool = True) -> Markup:
    drawn, commands = False, []
    for x, y in line.points:
        if y is not None:
            commands.append(f"{'L' if drawn else 'M'}{axes.x(x)} {axes.y(y)}")
        drawn = y is not None
    parts = [
        Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(
            line.style, " ".join(commands), line.name
        )
    ]
    if marked and line.style != "many" and len(line.points) <= _MAX_MARKED:
        parts += [
            Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
                line.style,
                axes.x(x),
                axes.y(y),
                4 if line.style == "all" else 2.5,
                f"{line.name}, round {x:g}: {y:.4g}",
            )
            for x, y in line.points
            if y is not None
        ]
    return Markup("").join(parts)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, label, Markup("").join(parts)
    )


def _number(value: float, marks: Sequence[float]) -> str:
    """Write a tick with the decimals that tell it from its neighbours."""
    step = min((high - low for low, high in pairwise(marks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if decimals and any(abs(round(mark, decimals) - mark) > 1e-9 for mark in marks):
        decimals += 1
    return f"{value:.{decimals}f}"


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
