"""Place the figures of a report: numbers become coordinates, which a template writes as SVG.

Own SVG and not matplotlib's: it needs no extra, takes its colours from the page (light, dark,
print), keeps text as text at the size of the page, and is a tenth as large.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from smezo_cli.report.series import MOST_LINES, Panel, Series

WIDTH = 360  # as wide as a phone shows it, so that text of 12 units is readable there
_LETTER = 8  # most of the width of a digit beside an axis
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 240, 50, 12, 12, 44
_ROW, _SIDE = 36, 18
_MOST_MARKS = 40  # points of a line that are marked one by one
_FLAT = 1e-3  # a range that is a smaller share of its values is drawn as next to nothing
_FAR = 1e100  # of a value on an axis, whose range is to be a number
_MOST_LETTERS = 44  # of a name above a row of dots or a bar

DASHES = ("", "7 3", "8 3 2 3", "2 3", "12 3", "4 2 1 2 1 2", "1 2")
_SHAPES = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
    "M-3.2 -3.2H3.2V3.2H-3.2Z",
    "M0 -4L4 3.2H-4Z",
    "M0 -4.4L4.4 0L0 4.4L-4.4 0Z",
    "M0 4L4 -3.2H-4Z",
    "M-1.2 -4H1.2V-1.2H4V1.2H1.2V4H-1.2V1.2H-4V-1.2H-1.2Z",
    "M-4 -2.6L-2.6 -4L0 -1.4L2.6 -4L4 -2.6L1.4 0L4 2.6L2.6 4L0 1.4L-2.6 4L-4 2.6L-1.4 0Z",
)


@dataclass(frozen=True)
class Tick:
    """Hold a place on an axis and what is written there."""

    at: str
    text: str


@dataclass(frozen=True)
class Mark:
    """Hold a point, and what a pointer that rests on it is told."""

    x: str
    y: str
    says: str


@dataclass(frozen=True)
class Line:
    """Hold a line of a chart: its colour and dash by number, its band, its points."""

    style: int
    name: str
    points: str
    band: str
    marks: tuple[Mark, ...]

    @property
    def dash(self) -> str:
        """Return the dashes of the line, "" for none."""
        return DASHES[self.style]

    @property
    def shape(self) -> str:
        """Return the path of a mark around (0, 0)."""
        return _SHAPES[self.style]


@dataclass(frozen=True)
class LineChart:
    """Hold a chart of lines; `words` tells somebody who cannot see it what is in it."""

    title: str
    words: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


@dataclass(frozen=True)
class DotRow:
    """Hold a row of a chart of dots: mean, spread, the seeds, zero-shot."""

    name: str
    short: str
    y: str
    label_y: str
    says: str
    mean: str
    low: str
    high: str
    seeds: tuple[str, ...]
    before: str


@dataclass(frozen=True)
class RowChart:
    """Hold a chart of rows of dots, or of bars, each below its name."""

    title: str
    words: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    rows: tuple[DotRow, ...]
    height: int
    bottom: int
    width: int = WIDTH
    left: int = _SIDE
    right: int = WIDTH - _SIDE


@dataclass(frozen=True)
class Value:
    """Hold what a row of a chart shows: `before` is zero-shot, None where there is none."""

    name: str
    mean: float
    error: float
    each: tuple[float, ...]
    says: str
    before: float | None = None


def lines(panel: Panel, x_label: str, title: str, styles: dict[str, int]) -> LineChart:
    """Return the chart of a panel; a name keeps the number that it has in `styles`, or gets one."""
    for series in panel.series:
        styles.setdefault(series.name, len(styles) % MOST_LINES)
    xs = [x for series in panel.series for x in series.x]
    ys = [
        value
        for series in panel.series
        for mean, sd in zip(series.mean, series.sd, strict=True)
        for value in (mean - (sd or 0.0), mean + (sd or 0.0))
    ]
    y_axis = _Axis.of(ys, _HEIGHT - _BOTTOM, _TOP, margin=0.05)
    y_ticks = y_axis.ticks(5)
    left = max(_LEFT, 10 + _LETTER * max(len(tick.text) for tick in y_ticks))
    x_axis = _Axis.of(xs, left, WIDTH - _RIGHT)
    drawn = tuple(_line(series, styles[series.name], x_axis, y_axis) for series in panel.series)
    ends = "; ".join(f"{s.label}: {', '.join(_ends(s))}" for s in panel.series)
    words = f"{panel.y} against {x_label}, from the first to the last evaluation. {ends}."
    x_ticks = x_axis.ticks(5, least=float(x_label == "steps"))  # there is no half a step
    return LineChart(title, words, x_label, panel.y, x_ticks, y_ticks, lines=drawn, left=left)


def _ends(series: Series) -> list[str]:
    """Return the first and the last point of a line in words; one of a line that has one."""
    places = sorted({0, len(series.x) - 1})
    return [f"{number(series.mean[k])} at {number(series.x[k])}" for k in places]


def _line(series: Series, style: int, x_axis: "_Axis", y_axis: "_Axis") -> Line:
    means, sds = series.mean, series.sd
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(series.x, means, strict=True)]
    band = ""
    if any(sd is not None for sd in sds) and len(places) > 1:
        edge = [
            [f"{x_axis.at(x)},{y_axis.at(m + sign * (sd or 0.0))}"
             for x, m, sd in zip(series.x, means, sds, strict=True)]
            for sign in (1, -1)
        ]  # fmt: skip
        band = " ".join([*edge[0], *reversed(edge[1])])
    every = -(-len(places) // _MOST_MARKS)
    marks = tuple(
        Mark(
            *places[k],
            f"{series.name}, {number(series.x[k])}: {number(means[k])}"
            + ("" if (sd := sds[k]) is None else f" ± {number(sd)}"),
        )
        for k in range(0, len(places), max(1, every))
    )
    return Line(style, series.label, " ".join(f"{x},{y}" for x, y in places), band, marks)


def dots(values: Sequence[Value], x_label: str, title: str) -> RowChart:
    """Return a chart with a row for each value: mean, error, the seeds and zero-shot."""
    ends = [end for v in values for end in (v.mean - v.error, v.mean + v.error, *v.each)]
    ends += [v.before for v in values if v.before is not None]
    return _rows(values, _Axis.of(ends, _SIDE, WIDTH - _SIDE, 0.04), x_label, title)


def bars(values: Sequence[Value], x_label: str, title: str) -> RowChart:
    """Return a chart with a bar from 0 for each value."""
    ends = [0.0, *(1.05 * (v.mean + v.error) for v in values)]
    return _rows(values, _Axis.of(ends, _SIDE, WIDTH - _SIDE), x_label, title)


def _rows(values: Sequence[Value], axis: "_Axis", x_label: str, title: str) -> RowChart:
    rows = []
    for k, v in enumerate(values):
        y = _ROW * k + 26
        short = v.name if len(v.name) <= _MOST_LETTERS else v.name[: _MOST_LETTERS - 1] + "…"
        rows.append(
            DotRow(
                v.name,
                short,
                str(y),
                str(y - 11),
                v.says,
                axis.at(v.mean),
                axis.at(v.mean - v.error),
                axis.at(v.mean + v.error),
                tuple(axis.at(one) for one in v.each),
                "" if v.before is None else axis.at(v.before),
            )
        )
    words = f"{x_label}. " + "; ".join(f"{v.name}: {v.says}" for v in values) + "."
    bottom = _ROW * len(values) + 4
    return RowChart(title, words, x_label, axis.ticks(5), tuple(rows), bottom + 38, bottom)


@dataclass(frozen=True)
class _Axis:
    """Map values from `low` to `high` to coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, margin: float = 0.0) -> "_Axis":
        """Return an axis that shows these values, with a margin as a share of their range."""
        low, high = max(min(values), -_FAR), min(max(values), _FAR)
        more = margin * (high - low)
        if high - low < _FLAT * max(abs(low), abs(high)):
            more = _FLAT * max(abs(low), abs(high))
        elif high == low:  # 0
            more = 0.5
        return cls(low - more, high + more, start, end)

    def at(self, value: float) -> str:
        """Return the coordinate of a value, to a hundredth."""
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.2f}".rstrip("0").rstrip(".")

    def ticks(self, most: int, least: float = 0.0) -> tuple[Tick, ...]:
        """Return at most so many and one more round values with their places, `least` apart."""
        rough = max((self.high - self.low) / most, least)
        power = 10.0 ** math.floor(math.log10(rough))
        sizes = (1, 2, 5, 10) if least else (1, 2, 2.5, 5, 10)
        step = next(power * m for m in sizes if power * m >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))
        return tuple(
            Tick(self.at(k * step), _tick_text(k * step, digits)) for k in range(first, last + 1)
        )


def _tick_text(value: float, digits: int) -> str:
    if abs(value) >= 1e6 or digits > 5:
        return f"{value:.5g}"
    return f"{value + 0.0:.{digits}f}"


def number(value: float) -> str:
    """Return a number with four digits that count."""
    return f"{value:.4g}"


def mean_and_spread(each: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 of one value."""
    return statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0
