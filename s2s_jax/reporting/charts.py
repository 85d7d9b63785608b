"""Line charts as SVG, drawn without a library: axes, ticks, curves and tooltips.

Shapes: P points of a series, K points that are drawn.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from s2s_jax.reporting.markup import escaped

_WIDTH, _HEIGHT = 440, 230
_TOP, _RIGHT, _BOTTOM = 10, 20, 36
_CHARACTER = 7
_DRAWN = 500
# Up to this many points, each is shown as a dot; with more, only the one under the pointer is.
_DOTS = 40
_TICKS = 5
# Larger numbers are not drawn: differences between them may not be finite.
_LARGEST = 1e250
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Series(NamedTuple):
    """One curve.

    Attributes:
      name: what the curve shows.
      x_P: f64, ascending.
      y_P: f64; values that are not finite are not drawn.
    """

    name: str
    x_P: np.ndarray
    y_P: np.ndarray


class Chart(NamedTuple):
    """Curves over the same axes.

    Attributes:
      title: what the vertical axis shows.
      series: one to four curves.
      from_zero: whether the vertical axis begins at 0.
      log: whether the vertical axis is logarithmic; then values that are not positive are not drawn.
    """

    title: str
    series: tuple[Series, ...]
    from_zero: bool = False
    log: bool = False


class _Axis(NamedTuple):
    """Maps values to places in the drawing: `low` to `begin`, `high` to `end`."""

    low: float
    high: float
    begin: float
    end: float
    log: bool
    ticks: list[float]

    def place(self, value: np.ndarray) -> np.ndarray:
        if self.log:
            share = np.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def figure(chart: Chart) -> str:
    """A chart with its title and, if it has several curves, their names; empty without points."""
    drawn = [_finite(series, chart.log) for series in chart.series]
    if not any(len(series.x_P) for series in drawn):
        return ""
    names = ""
    if len(drawn) > 1:
        names = "".join(
            f'<span class="key s{i}">{escaped(series.name)}</span>'
            for i, series in enumerate(drawn)
        )
    left_out = sum(map(len, (s.x_P for s in chart.series))) - sum(len(s.x_P) for s in drawn)
    note = ""
    if left_out:
        what = "finite and positive" if chart.log else "finite"
        note = f'<p class="quiet">Values that are not {what} are not drawn: {left_out:,}.</p>'
    scale = ", logarithmic" if chart.log else ""
    return (
        f"<figure><figcaption>{escaped(chart.title)}{scale}{names}</figcaption>\n"
        f"{_svg(chart, drawn)}{note}</figure>\n"
    )


def thinned(y_P: np.ndarray, most: int = _DRAWN) -> np.ndarray:
    """Chooses the points to draw of a curve with many points.

    Args:
      y_P: f64, finite.
      most: the maximum of K.

    Returns:
      int64 `[K]`, ascending indices: all points, or the lowest and the highest point of each of several
      equally long runs, so that no spike is lost, and the first and the last point.
    """
    points = len(y_P)
    if points <= most:
        return np.arange(points)
    kept = {0, points - 1}
    bounds = np.linspace(0, points, most // 2).astype(int).tolist()
    for begin, end in itertools.pairwise(bounds):
        run = y_P[begin:end]
        kept |= {begin + int(run.argmin()), begin + int(run.argmax())}
    return np.array(sorted(kept))


def number_text(value: float) -> str:
    """A number as text: whole numbers in full, others with five digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}"


# -------------------------------------------------------------------------------------- axes


def _finite(series: Series, log: bool) -> Series:
    kept = np.isfinite(series.y_P) & (np.abs(series.y_P) < _LARGEST)
    if log:
        kept &= series.y_P > 1 / _LARGEST
    return Series(series.name, series.x_P[kept], series.y_P[kept])


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, moved apart if they are (nearly) the same."""
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    if largest < 1 / _LARGEST:
        return low, low + 1
    if high - low <= 1e-9 * largest:
        return low - 0.05 * largest, high + 0.05 * largest
    return low, high


def _steps(low: float, high: float, whole: bool) -> tuple[float, float]:
    """The distance of ticks, as m and s: ticks are at multiples of m (1, 2, 2.5 or 5) times 10^s."""
    power = math.floor(math.log10((high - low) / _TICKS))
    exact = (high - low) / _TICKS / 10.0**power
    digits = next(m for m in (1, 2, 2.5, 5, 10) if m >= exact * (1 - 1e-9))
    if whole and (power < 0 or (power == 0 and digits == 2.5)):
        return (1, 0) if power < 0 else (5, 0)
    return digits, power


def _multiple(number: int, digits: float, power: float) -> float:
    """number * digits * 10^power, rounded only once, so that 3 * 10^-1 is exactly 0.3."""
    return number * digits * 10.0**power if power >= 0 else number * digits / 10.0**-power


def _step_axis(x_P: np.ndarray, begin: float, end: float) -> _Axis:
    """The horizontal axis: it spans exactly the points, and ticks are whole numbers."""
    low, high = float(x_P.min()), float(x_P.max())
    if high <= low:
        low, high = low - 1, low + 1
    digits, power = _steps(low, high, whole=True)
    step = _multiple(1, digits, power)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    ticks = [_multiple(number, digits, power) for number in numbers]
    return _Axis(low, high, begin, end, False, ticks)


def _linear_axis(values: np.ndarray, from_zero: bool, begin: float, end: float) -> _Axis:
    """A linear vertical axis, which begins and ends with a tick."""
    low, high = _ends(np.append(values, 0.0) if from_zero else values)
    digits, power = _steps(low, high, whole=False)
    step = _multiple(1, digits, power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [_multiple(number, digits, power) for number in range(first, last + 1)]
    return _Axis(ticks[0], ticks[-1], begin, end, False, ticks)


def _log_axis(values: np.ndarray, begin: float, end: float) -> _Axis:
    """A logarithmic vertical axis, which begins and ends with 1, 2 or 5 times a power of ten."""
    low, high = float(values.min()), float(values.max())
    powers = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2)
    marks = [_multiple(m, 1, power) for power in powers for m in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    ticks = marks[first : max(last, first + 1) + 1]
    ends = ticks[0], ticks[-1]
    if len(ticks) > 2 * _TICKS:
        tens = [mark for mark in marks[::3] if ends[0] <= mark <= ends[1]]
        ticks = tens[:: -(-len(tens) // (2 * _TICKS))]
    return _Axis(*ends, begin, end, True, ticks)


def _label(value: float) -> str:
    """A short label for a tick: 12.5k for 12500."""
    if 1e4 <= abs(value) < 1e15:
        size, sign = next((s, sign) for s, sign in _SIZES if abs(value) >= s)
        return f"{value / size:.10g}{sign}"
    return f"{value:.10g}"


# --------------------------------------------------------------------------------------- SVG


def _svg(chart: Chart, drawn: list[Series]) -> str:
    all_x = np.concatenate([series.x_P for series in drawn])
    all_y = np.concatenate([series.y_P for series in drawn])
    bottom = _HEIGHT - _BOTTOM
    if chart.log:
        y_axis = _log_axis(all_y, bottom, _TOP)
    else:
        y_axis = _linear_axis(all_y, chart.from_zero, bottom, _TOP)
    widest = max(len(_label(tick)) for tick in y_axis.ticks)
    x_axis = _step_axis(all_x, 12 + _CHARACTER * widest, _WIDTH - _RIGHT)
    kept = [thinned(series.y_P) for series in drawn]
    drawn = [
        Series(series.name, series.x_P[kept_K], series.y_P[kept_K])
        for series, kept_K in zip(drawn, kept, strict=True)
    ]
    few = "few" if max(len(series.x_P) for series in drawn) <= _DOTS else "many"
    lines = "".join(_line(i, series, x_axis, y_axis) for i, series in enumerate(drawn))
    name = escaped(f"{chart.title} by step")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}" class="{few}">\n'
        f"{_grid(x_axis, y_axis)}{lines}{_points(drawn, x_axis, y_axis)}</svg>\n"
    )


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    left, right, bottom = x_axis.begin, x_axis.end, y_axis.begin
    for tick, y in zip(y_axis.ticks, y_axis.place(np.array(y_axis.ticks)), strict=True):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.2f}" y2="{y:.2f}"/>'
            f'<text class="y" x="{left - 6}" y="{y + 4:.2f}" text-anchor="end">{_label(tick)}</text>\n'
        )
    for tick, x in zip(x_axis.ticks, x_axis.place(np.array(x_axis.ticks)), strict=True):
        parts.append(
            f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="x" x="{x:.2f}" y="{bottom + 17}" text-anchor="middle">{_label(tick)}'
            f"</text>\n"
        )
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>\n')
    return "".join(parts)


def _line(number: int, series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = zip(x_axis.place(series.x_P), y_axis.place(series.y_P), strict=True)
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    return f'<polyline class="s{number}" points="{points}"/>\n'


def _points(drawn: list[Series], x_axis: _Axis, y_axis: _Axis) -> str:
    """The points of each step, and a strip around them that shows a tooltip."""
    at: dict[float, list[tuple[int, float]]] = {}
    for number, series in enumerate(drawn):
        for x, y in zip(series.x_P.tolist(), series.y_P.tolist(), strict=True):
            at.setdefault(x, []).append((number, y))
    steps = sorted(at)
    x_K = x_axis.place(np.array(steps))
    bounds = [x_axis.begin, *((x_K[1:] + x_K[:-1]) / 2).tolist(), x_axis.end]
    parts = []
    for i, step in enumerate(steps):
        lines = [
            f"step {number_text(step)}",
            *(f"{drawn[n].name} {number_text(y)}" for n, y in at[step]),
        ]
        circles = "".join(
            f'<circle class="s{n}" cx="{x_K[i]:.2f}" cy="{y_axis.place(np.array(y)):.2f}" r="2.5"/>'
            for n, y in at[step]
        )
        parts.append(
            f'<g class="point"><title>{escaped(chr(10).join(lines))}</title>'
            f'<rect x="{bounds[i]:.1f}" y="{_TOP}" width="{bounds[i + 1] - bounds[i]:.1f}" '
            f'height="{y_axis.begin - _TOP}"/>{circles}</g>\n'
        )
    return "".join(parts)
