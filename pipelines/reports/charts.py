"""Small charts as inline SVG: histograms, curves and spreads, in the colours of the page that shows them.

matplotlib would do too, but its SVG has fixed colours and weighs five times as much; these follow the page into the dark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from pipelines.reports.templates import render

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 58, 14, 10, 46
PANEL_HEIGHT, SMALL_PANEL_HEIGHT, PANEL_GAP = 170, 74, 32
NAME_HEIGHT = 12
MIN_BINS, MAX_BINS = 7, 30
MAX_POINTS = 600
FOCUS = "focus"
"""The colour of what a page is about, beside the numbered colours of its captioners."""


@dataclass
class Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; outside the range, that of the nearest end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """About `count` round values: (pixel, text)."""
        rough = (self.high - self.low) / count
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(index * step), number(index * step)) for index in range(first, last + 1)]


@dataclass
class Panel:
    """One plot of a chart. A bar is (x, y, width, height, tip), a path (its d, its class), a dot (x, y, tip)."""

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
    """A number for people: 1,234 or 0.1235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def histograms(series: Mapping[str, ArrayLike], *, title: str, x_label: str, colors: Mapping[str, str] | None = None) -> Markup:
    """One histogram below the other on the same axes, each with a line at its mean.

    Args:
        series: values by name; those that are not finite are left out. One that is named "" has no label.
        x_label: with the unit.
        colors: by name: a captioner's number, or FOCUS.
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
        y_axis = Axis(0, highest, top + height, top)
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
    """Values over steps: a fine line, and a bold one that averages 1/30 of all points around each."""
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
    note = f"{len(y):,} steps · first {number(smooth[0])} · last {number(smooth[-1])}" + (" (averaged)" if len(y) > 60 else "")
    return _draw(title, x_label, y_label, x_axis, [panel], note)


def spreads(means: ArrayLike, stds: ArrayLike, *, title: str, x_label: str, y_label: str) -> Markup:
    """For each of a row of channels its mean as a dot, and a line one standard deviation to either side."""
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
    """Edges of about MAX_BINS bins at most; integers lie in the middle of theirs. The outermost 1 % may lie beyond."""
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
