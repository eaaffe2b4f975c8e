"""The page of `scores/<clip>/<captioner>`: all captioners and selection policies compared."""

from collections.abc import Sequence
from typing import Any

from pipelines.reports.charts import FOCUS, histograms
from pipelines.reports.page import caption_texts, captioner_colors, format_mean, table_page, with_score_texts
from pipelines.reports.pictures import with_pictures
from pipelines.reports.rejects import read_rejects
from pipelines.score.candidates import Candidates, ScoredShards, scored_captioners
from pipelines.score.compare import compare_policies
from pipelines.score.config import SelectionConfig
from pipelines.score.selection import Caption, all_policies, choose_caption
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, sample_rows, spread
from pipelines.tables.schema import SCORES, Row, scores_path
from pipelines.tables.table import Table


def scores_report(
    dataset_uri: str,
    clip: str,
    captioner: str,
    selection: SelectionConfig,
    captioners: Sequence[str] = (),
    *,
    sample: ReportScope = DEFAULT_SCOPE,
) -> str:
    """The page of `scores/<clip>/<captioner>`, as HTML: several captioners side by side, selection policies compared, and
    images with all their captions, the scores, and the caption that is selected.

    Args:
        captioner: whose table the page belongs to: its rejects are shown.
        captioners: those that compete; empty: all that the CLIP has scored.
        selection: the policy that selects, with seed 0 in epoch 0; the other policies are compared under its settings.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, scores_path(clip, captioner), SCORES)
    candidates = Candidates(dataset_uri, tuple(captioners) or scored_captioners(dataset_uri, clip), clip)
    scored = candidates.find_scored()
    contests, scope = _read_contests(candidates, scored, sample)
    rows = with_pictures(dataset_uri, _sample_images(table, candidates, scored, sample), caption_texts)
    for row in rows:
        pick = _choose(row["id"], row["captions"], selection)
        row["chosen"] = None if pick is None else row["captions"].index(pick)
    shown = [entry["captioner"] for row in rows for entry in row["captions"]]
    return table_page(
        "scores.html.jinja",
        table,
        read_light(table, ["id"], sample),
        read_rejects(table, sample),
        title=f"Scores by {clip} of {captioner}'s captions",
        about="How well each of an image's captions fits it, as a CLIP model sees it, and which caption is selected.",
        contest_scope=scope,
        long_captions=_count_long(table),
        samples=[row | {"captions": with_score_texts(row["captions"])} for row in rows],
        **_compare(contests, selection, shown),
    )


def _compare(contests: dict[str, list[Caption]], selection: SelectionConfig, shown: Sequence[str]) -> dict[str, Any]:
    """What the page says of captioners and policies. `shown`: captioners whose captions are beside pictures."""
    scores, chosen = _contest(contests, selection)
    selected = [score for values in chosen.values() for score in values]
    colors = captioner_colors([*scores, *shown])
    by_captioner = {name: scores[name] for name in colors if name in scores}
    return {
        "num_images": len(contests),
        "chart": histograms(
            {**by_captioner, "selected": selected},
            title="Scores",
            x_label="score (100 × cosine)",
            colors={**colors, "selected": FOCUS},
        ),
        "captioners": [
            {"name": name, "captions": len(values), "mean": format_mean(values), "chosen": len(chosen.get(name, []))}
            for name, values in by_captioner.items()
        ],
        "colors": colors,
        "policies": compare_policies(contests.values(), all_policies(selection, scores)).policies,
        "policy": selection.policy,
        "equal_shares": not selection.proportions,
        "num_chosen": len(selected),
        "num_unchosen": len(contests) - len(selected),
        "mean_chosen": format_mean(selected),
    }


def _read_contests(candidates: Candidates, found: ScoredShards, sample: ReportScope) -> tuple[dict[str, list[Caption]], str]:
    """The scored captions of each image of some shards by id, and a sentence that says how much was read."""
    shards = found.common
    chosen = [shards[index] for index in spread(len(shards), sample.max_shards)]
    contests: dict[str, list[Caption]] = {}
    for shard in chosen:
        contests |= candidates.read_scored(shard)
    part = "all" if len(chosen) == found.total else f"{len(chosen):,} of"
    scope = f"{len(contests):,} images with scores, of {part} {found.total:,} shards"
    return contests, f"{scope}; {lacking}" if (lacking := found.explain()) else scope


def _sample_images(table: Table, candidates: Candidates, found: ScoredShards, sample: ReportScope) -> list[tuple[str, Row]]:
    """Some images of the table with their shards, and with `captions`: all that compete for them."""
    rows = sample_rows(table, sample)
    scored = set(found.common)
    read = {shard: candidates.read(shard) for shard in dict.fromkeys(shard for shard, _ in rows) if shard in scored}
    return [(shard, {"id": row["id"], "captions": read[shard].get(row["id"], [])}) for shard, row in rows if shard in read]


def _contest(
    contests: dict[str, list[Caption]], selection: SelectionConfig
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Scores by captioner: those of all captions, and those of the selected captions."""
    scores: dict[str, list[float]] = {}
    chosen: dict[str, list[float]] = {}
    for row_id, captions in contests.items():
        for entry in captions:
            scores.setdefault(entry["captioner"], []).append(entry["clip_score"])
        pick = _choose(row_id, captions, selection)
        if pick is not None:
            chosen.setdefault(pick["captioner"], []).append(pick["clip_score"])
    return scores, chosen


def _count_long(table: Table) -> str:
    """A sentence on captions longer than the model's limit and how they were scored; empty if there were none."""
    manifest = table.require()
    count = round(manifest.figures.get("long_captions.mean", 0.0) * manifest.num_shards)
    done = {"cut": "cut there", "chunks": "scored in parts"}.get(manifest.config.get("long_captions", ""), "")
    return f"{count:,} captions were longer than the model's limit, and were {done}." if count and done else ""


def _choose(row_id: str, captions: list[Caption], selection: SelectionConfig) -> Caption | None:
    """The caption that the policy selects for an image with seed 0 in epoch 0, or None."""
    return choose_caption(captions, selection, seed=0, epoch=0, sample_id=row_id)
