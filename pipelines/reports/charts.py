"""Small charts as inline SVG: histograms, curves and spreads, colored by the style sheet of the page.

matplotlib is not used: its SVG has fixed colors, which do not follow a dark theme, and is five times as large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from pipelines.reports.templates import render

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 58, 14, 10, 46  # pixels: a chart's width and the margins around its panels
PANEL_HEIGHT, SMALL_PANEL_HEIGHT, PANEL_GAP = 170, 74, 32  # pixels
NAME_HEIGHT = 12  # pixels, of the name above a panel
MIN_BINS, MAX_BINS = 7, 30
MAX_POINTS = 600  # of a curve; more are averaged
FOCUS = "focus"
"""The color of the values that a page is about; captioners have numbered colors (see page.py)."""


@dataclass
class Axis:
    """Maps the values from `low` to `high` linearly to the pixels from `start` to `end`.

    whole: only whole values have ticks.
    """

    low: float
    high: float
    start: float
    end: float
    whole: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value. A value outside the range gives the pixel of the nearest end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """(pixel, text) of about `count` round values in the range."""
        rough = max((self.high - self.low) / count, 1.0 if self.whole else 0.0)
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(index * step), number(index * step)) for index in range(first, last + 1)]


@dataclass
class Panel:
    """One plot of a chart. In pixels, a bar is (x, y, width, height, tip), a path (SVG path, CSS class), a dot (x, y, tip)."""

    top: float
    height: float
    y_axis: Axis
    label: str = ""
    note: str = ""
    color: str = "0"
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    marker: float | None = None


def number(value: float) -> str:
    """A number as text, with separators or 4 significant digits: 1,234 or 0.1235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def histograms(series: Mapping[str, ArrayLike], *, title: str, x_label: str, colors: Mapping[str, str] | None = None) -> Markup:
    """Histograms one below the other on the same axes, each with a line at its mean.

    Args:
        series: values by name; the name "" gives a histogram without a label. Values that are not finite are left out.
        x_label: the quantity with its unit.
        colors: by name, a captioner's color (see `captioner_colors`) or FOCUS; "0" unless given.
    """
    arrays = {name: _finite(values) for name, values in series.items()}
    everything = np.concatenate([values for values in arrays.values() if values.size] or [np.zeros(0)])
    if not everything.size:
        return render("chart.html.jinja", title=title, empty="No values.")
    edges = bin_edges(everything)
    counts = {name: np.histogram(values.clip(edges[0], edges[-1]), edges)[0] for name, values in arrays.items()}
    x_axis = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    highest = max(int(count.max()) for count in counts.values())
    height = PANEL_HEIGHT if len(arrays) == 1 else SMALL_PANEL_HEIGHT
    panels = []
    for index, (name, values) in enumerate(arrays.items()):
        top = TOP + index * (height + PANEL_GAP) + (NAME_HEIGHT if name else 0)
        y_axis = Axis(0, highest, top + height, top, whole=True)
        bars = [
            (x_axis(low) + 0.5, y_axis(count), max(x_axis(high) - x_axis(low) - 1, 0.5), y_axis(0) - y_axis(count), tip)
            for low, high, count in zip(edges[:-1], edges[1:], counts[name].tolist(), strict=True)
            if count
            for tip in [f"{number(low)} to {number(high)}: {count:,}"]
        ]
        marker = x_axis(values.mean()) if values.size else None
        color = (colors or {}).get(name, "0")
        panels.append(Panel(top, height, y_axis, name, _summary(values), color, bars, marker=marker))
    outside = int(((everything < edges[0]) | (everything > edges[-1])).sum())
    notes = [panels[0].note] if len(panels) == 1 else []
    notes += [f"{outside:,} beyond the axis are in its end bars"] if outside else []
    return _draw(title, x_label, "count", x_axis, panels, " · ".join(notes))


def curve(points: Sequence[tuple[float, float]], *, title: str, x_label: str, y_label: str) -> Markup:
    """A curve through (step, value) points: a bold line of running means over 1/30 of the points, a fine line of the values.

    Points whose value is not finite are left out. A curve of 60 points or fewer has no fine line.
    """
    values = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    if not len(values):
        return render("chart.html.jinja", title=title, empty="No values.")
    x, y = values[np.argsort(values[:, 0], kind="stable")].T
    smooth = _running_mean(y, max(len(y) // 30, 1))
    low, high = min(np.percentile(y, 0.5), smooth.min()), max(np.percentile(y, 99.5), smooth.max())
    pad = 0.05 * (high - low) or max(abs(high), 1.0) * 0.1
    x_axis = Axis(*_widened(x.min(), x.max()), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low - pad, high + pad, TOP + PANEL_HEIGHT, TOP)
    panel = Panel(TOP, PANEL_HEIGHT, y_axis)
    if len(y) > 60:
        panel.paths.append((_path(x, y, x_axis, y_axis), "fine"))
    panel.paths.append((_path(x, smooth, x_axis, y_axis), "bold"))
    if len(y) == 1:  # a line through one point is not seen
        panel.dots.append((x_axis(x[0]), y_axis(y[0]), f"{x_label} {number(x[0])}: {number(y[0])}"))
        return _draw(title, x_label, y_label, x_axis, [panel], f"one value: {number(y[0])}")
    note = f"{len(y):,} values · first {number(smooth[0])} · last {number(smooth[-1])}" + (" (averaged)" if len(y) > 60 else "")
    return _draw(title, x_label, y_label, x_axis, [panel], note)


def spreads(means: ArrayLike, stds: ArrayLike, *, title: str, x_label: str, y_label: str) -> Markup:
    """For each channel, a dot at its mean and a line that reaches one standard deviation to either side.

    `means` and `stds` have shape (channels,).
    """
    mean, std = np.asarray(means, float), np.asarray(stds, float)
    x_axis = Axis(-0.5, len(mean) - 0.5, LEFT, WIDTH - RIGHT)
    low, high = _widened((mean - std).min(), (mean + std).max())
    pad = 0.06 * (high - low)
    y_axis = Axis(low - pad, high + pad, TOP + PANEL_HEIGHT, TOP)
    panel = Panel(TOP, PANEL_HEIGHT, y_axis)
    for channel, (middle, spread) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        x = x_axis(channel)
        panel.paths.append((f"M{x} {y_axis(middle - spread)}V{y_axis(middle + spread)}", "bold"))
        panel.dots.append((x, y_axis(middle), f"channel {channel}: mean {number(middle)}, std {number(spread)}"))
    panel.paths.append((f"M{LEFT} {y_axis(0)}H{WIDTH - RIGHT}", "zero"))
    return _draw(title, x_label, y_label, x_axis, [panel], f"mean of stds {number(std.mean())}")


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Edges of MIN_BINS to about MAX_BINS equal bins; integers lie in the middle of a bin.

    Of 200 values or more, the lowest and the highest 0.5 % may lie outside.
    """
    low, high = (values.min(), values.max()) if len(values) < 200 else np.percentile(values, [0.5, 99.5])
    if values.dtype.kind in "iu":
        low, high = math.floor(low), math.ceil(high)
        step = math.ceil((high - low + 1) / MAX_BINS)
        count = -(-(high - low + 1) // step)
        spare = max(MIN_BINS - count, 0) // 2  # empty bins on either side of a few values
        first = low - spare if low < 0 else max(low - spare, 0)
        return first - 0.5 + step * np.arange(max(count, MIN_BINS) + 1)
    if low == high:
        return low + (0.1 * abs(low) or 0.1) * (np.arange(MIN_BINS + 1) - MIN_BINS / 2)
    return np.linspace(low, high, MAX_BINS + 1)


def _draw(title: str, x_label: str, y_label: str, x_axis: Axis, panels: list[Panel], note: str) -> Markup:
    bottom = panels[-1].top + panels[-1].height
    return render(
        "chart.html.jinja",
        title=title,
        note=note,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_axis.ticks(),
        panels=panels,
        width=WIDTH,
        height=bottom + BOTTOM,
        bottom=bottom,
        left=LEFT,
        right=WIDTH - RIGHT,
    )


def _summary(values: np.ndarray) -> str:
    if not values.size:
        return "no values"
    low, middle, high = values.min(), np.median(values), values.max()
    if low == high:
        return f"{values.size:,} values · all {number(low)}"
    return f"{values.size:,} values · mean {number(values.mean())} · median {number(middle)} · {number(low)} to {number(high)}"


def _path(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> str:
    """The SVG path through the points; more than MAX_POINTS are averaged in groups."""
    chunks = np.array_split(np.arange(len(x)), min(len(x), MAX_POINTS))
    corners = (f"{x_axis(x[chunk].mean())} {y_axis(y[chunk].mean())}" for chunk in chunks)
    return "M" + "L".join(corners)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[end] - total[start]) / (end - start)


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    return array[np.isfinite(array)]
