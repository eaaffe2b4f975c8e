"""Figures of captioners and selection, against a table small enough to do by hand."""

import json
from pathlib import Path

import pytest

from jobs.demo.figures import caption_figures
from pipelines.score.candidates import Candidates
from pipelines.score.config import SelectionConfig
from tests.support.contests import write_contest

RED, BLUE = (f"a large {color} solid star in the center of a white background" for color in ("red", "blue"))


def test_figures_by_hand(tmp_path: Path) -> None:
    write_contest(
        str(tmp_path),
        {
            "x": {"a": (RED, 30.0), "b": (BLUE, 20.0)},
            "y": {"a": (RED, 10.0), "b": (BLUE, 40.0)},
            "z": {"a": (BLUE, 50.0)},  # b has none, and a is wrong
        },
        metadata={name: json.dumps({"truth": truth}) for name, truth in (("x", RED), ("y", BLUE), ("z", RED))},
    )
    figures = caption_figures(Candidates(str(tmp_path), ("a", "b"), "clip"), SelectionConfig(policy="best"))
    assert list(figures) == ["a", "b", "random choice", "CLIP selection"]
    assert figures["a"].mean_score == pytest.approx(30.0) and figures["a"].exact_share == pytest.approx(1 / 3)
    assert figures["a"].selected_share == pytest.approx(2 / 3) and figures["b"].selected_share == pytest.approx(1 / 3)
    assert figures["b"].exact_share == pytest.approx(0.5)
    assert figures["random choice"].exact_share == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert figures["CLIP selection"].exact_share == pytest.approx(2 / 3)
    assert figures["CLIP selection"].mean_score == pytest.approx((30 + 40 + 50) / 3)


def test_without_truth_there_is_no_exactness(tmp_path: Path) -> None:
    write_contest(str(tmp_path), {"x": {"a": ("a cat", 25.0)}})
    figures = caption_figures(Candidates(str(tmp_path), ("a",), "clip"), SelectionConfig(policy="best"))
    assert all(figure.exact_share is None for figure in figures.values())
    assert figures["a"].selected_share == 1.0
