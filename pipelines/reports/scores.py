"""The page of `scores/<scorer>`: captioners and selection policies compared."""

from pipelines.reports.charts import FOCUS, histograms
from pipelines.reports.page import caption_texts, captioner_colors, format_mean, table_page, with_score_texts
from pipelines.reports.pictures import with_pictures
from pipelines.reports.rejects import read_rejects
from pipelines.score.compare import compare_policies
from pipelines.score.config import SelectionConfig
from pipelines.score.selection import all_policies, choose_caption
from pipelines.tables.sampling import DEFAULT_SCOPE, LightRows, ReportScope, read_light, sample_rows
from pipelines.tables.schema import SCORES, Row, scores_path
from pipelines.tables.table import Table
from pipelines.workers.prepare import iter_rows


def scores_report(dataset_uri: str, scorer: str, selection: SelectionConfig, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `scores/<scorer>`, as HTML: captioners and selection policies compared, and images with all their captions,
    the scores, and the caption that is selected.

    Args:
        selection: the policy that selects, with seed 0 in epoch 0; the other policies are compared under its settings.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, scores_path(scorer), SCORES)
    light = read_light(table, ["id", "captions"], sample)
    scores, chosen = _contest(light, selection)
    comparison = compare_policies((row["captions"] for row in iter_rows(light.rows)), all_policies(selection, scores))
    selected = [score for values in chosen.values() for score in values]
    rows = with_pictures(dataset_uri, sample_rows(table, sample), caption_texts)
    colors = captioner_colors([*scores, *(entry["captioner"] for row in rows for entry in row["captions"])])
    for row in rows:
        pick = _choose(row, selection)
        row["chosen"] = None if pick is None else row["captions"].index(pick)
    by_captioner = {name: scores[name] for name in colors if name in scores}
    return table_page(
        "scores.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Scores by {scorer}",
        about="How well each of an image's captions fits it, as a CLIP model sees it, and which caption is selected.",
        chart=histograms(
            {**by_captioner, "selected": selected},
            title="Scores",
            x_label="score (100 × cosine)",
            colors={**colors, "selected": FOCUS},
        ),
        captioners=[
            {"name": name, "captions": len(values), "mean": format_mean(values), "chosen": len(chosen.get(name, []))}
            for name, values in by_captioner.items()
        ],
        colors=colors,
        long_captions=_count_long(table),
        policies=comparison.policies,
        policy=selection.policy,
        equal_shares=not selection.proportions,
        num_chosen=len(selected),
        num_unchosen=light.rows.num_rows - len(selected),
        mean_chosen=format_mean(selected),
        samples=[row | {"captions": with_score_texts(row["captions"])} for row in rows],
    )


def _contest(light: LightRows, selection: SelectionConfig) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Scores by captioner: those of all captions, and those of the selected captions."""
    scores: dict[str, list[float]] = {}
    chosen: dict[str, list[float]] = {}
    for row in iter_rows(light.rows):
        for entry in row["captions"]:
            scores.setdefault(entry["captioner"], []).append(entry["clip_score"])
        pick = _choose(row, selection)
        if pick is not None:
            chosen.setdefault(pick["captioner"], []).append(pick["clip_score"])
    return scores, chosen


def _count_long(table: Table) -> str:
    """A sentence on captions longer than the model's limit and how they were scored; empty if there were none."""
    manifest = table.require()
    count = round(manifest.figures.get("long_captions.mean", 0.0) * manifest.num_shards)
    done = {"cut": "cut there", "chunks": "scored in parts"}.get(manifest.config.get("long_captions", ""), "")
    return f"{count:,} captions were longer than the model's limit, and were {done}." if count and done else ""


def _choose(row: Row, selection: SelectionConfig) -> Row | None:
    """The caption that the policy selects for an image with seed 0 in epoch 0, or None."""
    return choose_caption(row["captions"], selection, seed=0, epoch=0, sample_id=row["id"])
