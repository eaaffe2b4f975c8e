"""The page of a scores table: every caption with its score, and the one that the policy selects."""

import re
from html import unescape

import numpy as np
import pytest

from pipelines.reports.scores import scores_report
from pipelines.score.config import SelectionConfig
from pipelines.tables.errors import MissingTableError
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import SCORES, Row
from pipelines.tables.table import Table
from tests.support.html_page import check_page
from tests.support.report_world import competing, image_row

BEST = SelectionConfig(policy="best")


def best(captions: list[Row]) -> Row:
    return max(captions, key=lambda caption: caption["clip_score"])


def test_scores_report_shows_every_caption_and_marks_the_selected(dataset: str) -> None:
    table = Table(dataset, "scores/clip/idefics", SCORES)
    html = scores_report(dataset, "clip", "idefics", BEST, sample=ReportScope(num_images=30))
    page = check_page(html, table)
    cards = re.findall(r'<article class="card contest">.*?</article>', html, re.DOTALL)
    contests = {row["id"]: competing(index, row) for index, row in enumerate(map(image_row, range(30)))}
    assert len(cards) == len(contests) == 30
    for card, (row_id, captions) in zip(cards, contests.items(), strict=True):
        assert row_id[:12] in card
        entries = re.findall(r"<li .*?</li>", card, re.DOTALL)
        assert len(entries) == len(captions)
        selected = best(captions)
        for entry, caption in zip(entries, captions, strict=True):
            assert unescape(caption["caption"]).strip() in unescape(entry)
            assert caption["captioner"] in entry and f"{caption['clip_score']:.2f}" in entry
            assert ("✓ selected" in entry) == (caption == selected)
    wins = [best(captions)["captioner"] for captions in contests.values()]
    assert f"{wins.count('llava') / 30:.1%}" in page.text
    mean = np.mean([best(captions)["clip_score"] for captions in contests.values()])
    assert f"selected 30 {mean:.2f} 30 100.0%" in page.text


def test_a_policy_may_select_none(dataset: str) -> None:
    page = check_page(scores_report(dataset, "clip", "llava", SelectionConfig(policy="best", min_best_score=99.0)))
    assert page.text.count("the policy picks none of these") == 24  # of those that have a caption by llava
    assert "of 30 images it picks none" in page.text


def test_captioners_may_be_left_out_of_the_contest(dataset: str) -> None:
    page = check_page(scores_report(dataset, "clip", "llava", BEST, ["llava", "idefics"]))
    contests = [
        [caption for caption in competing(index, image_row(index)) if caption["captioner"] != "original"] for index in range(30)
    ]
    wins = [best(captions)["captioner"] for captions in contests]
    assert f"{wins.count('llava') / 30:.1%}" in page.text and "original" not in page.text
    with pytest.raises(MissingTableError, match="scores/clip/moondream"):
        scores_report(dataset, "clip", "llava", BEST, ["llava", "moondream"])


def test_captioners_keep_their_colours_on_a_page(dataset: str) -> None:
    html = scores_report(dataset, "clip", "original", BEST)
    colors = dict(re.findall(r'<span class="s-(\d)"><span class="dot"></span>(\w+)</span>', html))
    assert list(colors.values()) == ["original", "idefics", "llava"]
    for color, name in re.findall(r'<li class="s-(\d)[^"]*"><div><span class="dot"></span>(\w+)', html):
        assert colors[color] == name
