"""Line charts as inline SVG, drawn for light and dark pages alike: colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 40, 60
SLOTS = 6
_FEW = 8


@dataclass(frozen=True, slots=True)
class Mark:
    """A measured point; `text` is shown when it is pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Series:
    """`slot`: which of the page's colours and symbols; `dashed`: a companion of that slot's."""

    name: str
    marks: tuple[Mark, ...]
    slot: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


def svg(chart: Chart) -> str:
    """The chart with its legend; a line of text where there is nothing to draw."""
    marks = [mark for series in chart.series for mark in series.marks]
    if not marks:
        return f"<p class=note>{escape(chart.title)}: nothing was measured.</p>"
    x = _Axis([mark.x for mark in marks], chart.log_x, _LEFT, WIDTH - _RIGHT)
    y = _Axis([mark.y for mark in marks], chart.log_y, HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        *(_grid_x(value, x.at(value)) for value in x.ticks),
        *(_grid_y(value, y.at(value)) for value in y.ticks),
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>',
        # Above the axis, not along it: it stays readable where the whole chart is small.
        f'<text class="axis" x="4" y="22">{escape(chart.y_label)}</text>',
        *(_drawn(series, x, y) for series in chart.series),
        "</svg>",
    ]
    return f"<h3>{escape(chart.title)}</h3>" + "".join(parts) + _legend(chart.series)


class _Axis:
    """From values to pixels, with round ticks."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self._log = log and min(values) > 0
        low, high = min(values), max(values)
        if self._log:
            measured = sorted(set(values))
            # Those that were measured, where they are few enough to stand beside each other.
            few = len(measured) <= _FEW and measured == [int(value) for value in measured]
            self.ticks = list(measured) if few else _log_ticks(low, high)
            # Decades would leave half of the chart empty.
            low, high = low / 1.15, high * 1.15
            self.ticks = [tick for tick in self.ticks if low <= tick <= high]
        else:
            self.ticks = _linear_ticks(high)
            low, high = 0.0, max(high * 1.04, self.ticks[-1])
        self._low, self._high = self._scaled(low), self._scaled(high)
        self._start, self._end = start, end

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._log else value

    def at(self, value: float) -> float:
        span = self._high - self._low
        part = (self._scaled(value) - self._low) / span if span else 0.5
        return self._start + part * (self._end - self._start)


def _linear_ticks(high: float) -> list[float]:
    if high <= 0:
        return [0.0, 1.0]
    rough = high / 5
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    return [step * n for n in range(math.floor(high * 1.04 / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    steps = (1,) if wide else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    inside = [tick for tick in ticks if low / 1.15 <= tick <= high * 1.15]
    return inside if len(inside) > 1 else [low, high]


def number(value: float) -> str:
    """Short, for people: 12.5k, 0.25, 3."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _grid_x(value: float, at: float) -> str:
    bottom = HEIGHT - _BOTTOM
    return (
        f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{at:.1f}" y="{bottom + 21}" text-anchor="middle">'
        f"{number(value)}</text>"
    )


def _grid_y(value: float, at: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{at + 5:.1f}" text-anchor="end">'
        f"{number(value)}</text>"
    )


def _drawn(series: Series, x: _Axis, y: _Axis) -> str:
    places = [(x.at(mark.x), y.at(mark.y)) for mark in series.marks]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    style = f"s{series.slot % SLOTS}{' dashed' if series.dashed else ''}"
    parts = [f'<polyline class="line {style}" points="{line}"/>']
    for mark, (a, b) in zip(series.marks, places, strict=True):
        parts.append(
            f'<g class="mark {style}">{_symbol(series, a, b)}<title>{escape(mark.text)}</title></g>'
        )
    return "".join(parts)


def _symbol(series: Series, a: float, b: float) -> str:
    """Another shape for every slot, for those who cannot tell the colours apart."""
    if series.dashed:
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>'
    kind = series.slot % 3
    if kind == 0:
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>'
    if kind == 1:
        return f'<rect x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>'
    return f'<path d="M{a:.1f} {b - 5.5:.1f}l5.5 9.5h-11z"/>'


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<li><svg class="key" viewBox="0 0 34 12"><line class="line s{one.slot % SLOTS}'
        f'{" dashed" if one.dashed else ""}" x1="0" x2="34" y1="6" y2="6"/>'
        f'<g class="mark s{one.slot % SLOTS}">{_symbol(one, 17, 6)}</g></svg>'
        f"{escape(one.name)}</li>"
        for one in series
    )
    return f'<ul class="legend">{entries}</ul>'
