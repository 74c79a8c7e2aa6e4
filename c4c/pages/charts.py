"""Line charts as SVG that follows the page's colours. No library: a page that needs nothing has no use for one."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 40
_INSET = 14  # of the outer points where x takes a few values only, so that nothing is drawn on the axis
_CAP = 4  # half of the width of an error bar's ends
_LETTER = 8.5  # about the width of a letter of a tick, where a page makes them large


@dataclass(frozen=True)
class Series:
    """A line. kind: the class that gives its colour and dashes; points: (x, y), x increasing.

    spread: half the length of the error bar of each point, None for none; () for no bar at all. faint: more points, not on the line.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float | None] = ()
    faint: Sequence[tuple[float, float]] = ()

    @property
    def ends(self) -> list[float]:
        """The lowest and highest y of everything that is drawn."""
        bars = [
            y + side * (half or 0) for (_, y), half in zip(self.points, self.spread, strict=False) for side in (-1, 1)
        ]
        return [y for _, y in (*self.points, *self.faint)] + bars


def line_chart(
    title: str, series: Sequence[Series], x_name: str, y_name: str, *, y_range: tuple[float, float] | None = None,
    marker: float | None = None, values: Sequence[float] = (), log: bool = False,
) -> Markup:  # fmt: skip
    """An <svg> with axes. marker: an x to mark. values: the few values that x takes, which become the ticks. log: a logarithmic
    x axis, for x > 0. Every string is escaped."""
    series = [one for one in series if one.points]
    xs = [*values, *(x for one in series for x, _ in one.points)]
    ys = [y for one in series for y in one.ends]
    y_ticks = ticks(*(y_range or (min(ys), max(ys))), 5)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = y_range or (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    high_y = high_y if high_y > low_y else low_y + 1
    inset = _INSET if values else 0
    scale: Callable[[float], float] = math.log if log else float

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - scale(low_x)) / (scale(high_x) - scale(low_x)) if len(set(xs)) > 1 else 0.5
        up = (y - low_y) / (high_y - low_y)
        return round(_LEFT + inset + across * (_WIDTH - _LEFT - _RIGHT - 2 * inset), 1), round(
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1
        )

    x_ticks = _apart(sorted(set(values)), at, low_y) if values else ticks(low_x, max(xs), 6)
    parts = [*_axes(x_ticks, y_ticks, at, low_x, low_y, (low_x, high_x), (low_y, high_y))]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_name, "middle", "axis"))
    if marker is not None and low_x <= marker <= high_x:
        parts += _marker(at(marker, low_y)[0])
    for one in series:
        parts += _line(one, at)
    data = json.dumps([{"name": one.name, "points": _readout(one, at)} for one in series])
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{}" data-y="{}" data-series="{}">{}</svg>'
    ).format(_WIDTH, _HEIGHT, title, x_name, y_name, data, Markup("").join(parts))


def _marker(x: float) -> list[Markup]:
    line = Markup('<line class="marker" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, _TOP, _HEIGHT - _BOTTOM)
    side = "end" if x > _WIDTH / 2 else "start"
    return [line, _text(x + (-4 if side == "end" else 4), _TOP + 9, "this checkpoint", side, "note")]


def _line(one: Series, at) -> list[Markup]:
    places = [at(x, y) for x, y in one.points]
    parts = [
        Markup('<circle class="faint {}" cx="{}" cy="{}" r="2.5"/>').format(one.kind, *at(x, y)) for x, y in one.faint
    ]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    parts.append(Markup('<path class="line {}" d="{}"/>').format(one.kind, path))
    for (x, y), half in zip(one.points, one.spread, strict=False):
        if half is not None:
            (place, top), (_, bottom) = at(x, y + half), at(x, y - half)
            left, right = round(place - _CAP, 1), round(place + _CAP, 1)
            bar = f"M{left} {top}H{right}M{place} {top}V{bottom}M{left} {bottom}H{right}"
            parts.append(Markup('<path class="bar {}" d="{}"/>').format(one.kind, bar))
    if len(places) <= 12:
        parts += [Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>').format(one.kind, x, y) for x, y in places]
    return parts


def _readout(one: Series, at) -> list[list]:
    """[x, y, where on the chart, and the words for y where it has a spread], for the readout under the pointer: about 150 of them at most."""
    points = [[x, y, *at(x, y)] for x, y in one.points]
    for point, half in zip(points, one.spread, strict=False):
        point += [] if half is None else [f"{point[1]:.1f} ± {half:.1f}"]
    return points[:: max(1, len(points) // 150)]


def _apart(values: Sequence[float], at, y: float) -> list[float]:
    """Those of increasing x whose labels do not touch."""
    kept, end = [], -math.inf
    for x in values:
        place, half = at(x, y)[0], (len(short(x)) * _LETTER + 4) / 2
        if place - half >= end:
            kept.append(x)
            end = place + half
    return kept


def _axes(x_ticks, y_ticks, at, low_x, low_y, x_span, y_span) -> list[Markup]:
    parts = []
    for y in y_ticks:
        if y_span[0] <= y <= y_span[1]:
            _, place = at(low_x, y)
            parts.append(
                Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(_LEFT, _WIDTH - _RIGHT, place)
            )
            parts.append(_text(_LEFT - 6, place + 4, short(y), "end", "tick"))
    for x in x_ticks:
        if x_span[0] <= x <= x_span[1]:
            place, _ = at(x, low_y)
            parts.append(_text(place, _HEIGHT - _BOTTOM + 16, short(x), "middle", "tick"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, round(x, 1), round(y, 1), anchor, text
    )


def short(value: float) -> str:
    """A tick's label: `12`, `0.05`, `1e-4`."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        digits, _, exponent = f"{value:.2g}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    return f"{round(value, 6):g}"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
