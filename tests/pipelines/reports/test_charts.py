"""Charts: every value is counted once, and points are drawn where they belong."""

import re

import numpy as np

from pipelines.reports.charts import Axis, bin_edges, curve, histograms


def test_histogram_counts_every_finite_value_once() -> None:
    for values in (
        [64] * 10,
        [0.1, 0.2, 0.30001],
        list(range(500)),
        [1.0],
        [*np.random.default_rng(0).normal(0, 1, 5000), 1e6, np.nan],
    ):
        chart = histograms({"": values}, title="t", x_label="x")
        counts = [int(count.replace(",", "")) for count in re.findall(r"to [^<]*: ([\d,]+)</title>", chart)]
        assert sum(counts) == np.isfinite(values).sum()
    assert len(bin_edges(np.arange(500))) < 40


def test_counts_have_ticks_at_whole_numbers() -> None:
    for highest, expected in ((1, ["0", "1"]), (2, ["0", "1", "2"]), (2000, ["0", "500", "1,000", "1,500", "2,000"])):
        assert [text for _, text in Axis(0, highest, 100, 0, whole=True).ticks()] == expected
    assert [text for _, text in Axis(0, 2, 100, 0).ticks()] == ["0", "0.5", "1", "1.5", "2"]
    assert ">0.5</text>" not in histograms({"": [81.0, 85.0]}, title="t", x_label="x")


def test_integers_lie_in_the_middle_of_their_bins() -> None:
    for values in ([64], [0, 1, 2], [-3, 4], list(range(25))):
        edges = bin_edges(np.array(values))
        assert np.all(np.diff(edges) == 1) and set(values) <= set(edges[:-1] + 0.5)
        assert min(values) < 0 or edges[0] >= -0.5


def test_curve_draws_its_points_in_order() -> None:
    chart = curve([(2, 1.0), (1, 2.0), (3, float("nan"))], title="loss", x_label="step", y_label="loss")
    (path,) = re.findall(r'class="bold" d="M([^"]*)"', chart)
    (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert x1 < x2 and y1 < y2  # pixels grow downwards
    assert "<circle" not in chart and "<circle" in curve([(2, 1.0)], title="loss", x_label="step", y_label="loss")
