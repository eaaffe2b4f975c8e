"""The page of a scores table: every caption with its score, and the one that the policy selects."""

import re
from html import unescape

import numpy as np

from pipelines.reports.scores import scores_report
from pipelines.score.config import SelectionConfig
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import SCORES, Row
from pipelines.tables.table import Table
from tests.support.html_page import check_page

BEST = SelectionConfig(policy="best")


def best(captions: list[Row]) -> Row:
    return max(captions, key=lambda caption: caption["clip_score"])


def test_scores_report_shows_every_caption_and_marks_the_selected(dataset: str) -> None:
    table = Table(dataset, "scores/clip", SCORES)
    html = scores_report(dataset, "clip", BEST, sample=ReportScope(num_images=30))
    page = check_page(html, table)
    cards = re.findall(r'<article class="card contest">.*?</article>', html, re.DOTALL)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    assert len(cards) == len(rows) == 30
    for card, row in zip(cards, rows, strict=True):
        assert row["id"][:12] in card
        entries = re.findall(r"<li .*?</li>", card, re.DOTALL)
        assert len(entries) == len(row["captions"])
        selected = best(row["captions"])
        for entry, caption in zip(entries, row["captions"], strict=True):
            assert unescape(caption["caption"]).strip() in unescape(entry)
            assert caption["captioner"] in entry and f"{caption['clip_score']:.2f}" in entry
            assert ("✓ selected" in entry) == (caption == selected)
    wins = [best(row["captions"])["captioner"] for row in rows]
    assert f"{wins.count('llava') / 30:.1%}" in page.text
    mean = np.mean([best(row["captions"])["clip_score"] for row in rows])
    assert f"selected 30 {mean:.2f} 30 100.0%" in page.text


def test_a_policy_may_select_none(dataset: str) -> None:
    page = check_page(scores_report(dataset, "clip", SelectionConfig(policy="best", min_best_score=99.0)))
    assert page.text.count("the policy picks none of these") == 24
    assert "of 30 images it picks none" in page.text


def test_captioners_keep_their_colours_on_a_page(dataset: str) -> None:
    html = scores_report(dataset, "clip", BEST)
    colors = dict(re.findall(r'<span class="s-(\d)"><span class="dot"></span>(\w+)</span>', html))
    assert list(colors.values()) == ["original", "idefics", "llava"]
    for color, name in re.findall(r'<li class="s-(\d)[^"]*"><div><span class="dot"></span>(\w+)', html):
        assert colors[color] == name
