"""Reports of tables: for each stage one HTML page that can be read anywhere, with its pictures and charts inside.

A function takes what lies in a dataset and returns the page. Of a large table a sample is read, and the page says so.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from pipelines.charts import FOCUS, histograms, number, spreads
from pipelines.compare import compare_policies
from pipelines.extract import read_latents
from pipelines.extract_config import Dtype
from pipelines.prepare import iter_rows
from pipelines.report_data import (
    DEFAULT_SAMPLE,
    LightRows,
    Rejects,
    SampleConfig,
    alt_text,
    page_head,
    read_light,
    read_rejects,
    sample_rows,
    thumbnail,
    with_pictures,
)
from pipelines.schema import (
    CAPTION_EMBEDS,
    CAPTIONS,
    IMAGES,
    IMAGES_PATH,
    LATENTS,
    ORIGINAL_CAPTIONER,
    SCORES,
    captions_path,
    scores_path,
)
from pipelines.select import SelectionConfig, all_policies, choose_caption
from pipelines.stage import Row
from pipelines.tables import REPORT, Table
from pipelines.templates import render

NUM_COLORS = 8
NUM_REPEATED = 10

DecodeLatents = Callable[[np.ndarray], Image.Image]
"""Latents (channels, height, width), float32 -> the image."""


def write_report(table: Table, html: str) -> None:
    """Put a page into the table's folder, as `report.html`."""
    table.write_file(REPORT, html.encode())


def images_report(dataset_uri: str, *, sample: SampleConfig = DEFAULT_SAMPLE) -> str:
    """The page of `images`: sizes, formats, sample images with the captions they came with, rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, IMAGES_PATH, IMAGES)
    light = read_light(table, ["width", "height", "format", "caption"], sample)
    width, height = (light.rows[name].to_numpy() for name in ("width", "height"))
    rows = [row for _, row in sample_rows(table, sample)]
    for row in rows:
        row["picture"] = thumbnail(row["image_bytes"], alt_text([row["caption"]], row["id"]))
    return _table_page(
        "images.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title="Images",
        about="The images that everything else is made from: as they were found, each once.",
        charts=[
            histograms({"width": width, "height": height}, title="Width and height", x_label="pixels", colors={"height": "1"}),
            histograms({"": width * height / 1e6}, title="Size", x_label="megapixels"),
            histograms({"": width / height}, title="Aspect ratio", x_label="width / height"),
        ],
        formats=dict(Counter(light.rows["format"].to_pylist()).most_common()),
        num_captions=sum(bool(caption) for caption in light.rows["caption"].to_pylist()),
        samples=rows,
    )


def captions_report(dataset_uri: str, captioner: str, *, sample: SampleConfig = DEFAULT_SAMPLE) -> str:
    """The page of `captions/<captioner>`: lengths, repetitions, images with their captions, rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, captions_path(captioner), CAPTIONS)
    light = read_light(table, ["caption", "num_tokens", "finish_reason", "flags"], sample)
    times = Counter(light.rows["caption"].to_pylist())
    flags = Counter(pc.list_flatten(light.rows["flags"]).to_pylist())
    rows = with_pictures(dataset_uri, sample_rows(table, sample), lambda row: [row["caption"]])
    return _table_page(
        "captions.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Captions by {captioner}",
        about=f"What the captioner {captioner!r} says about each image.",
        lengths=histograms({"": light.rows["num_tokens"].to_numpy()}, title="Caption length", x_label="tokens"),
        finish_reasons=dict(Counter(light.rows["finish_reason"].to_pylist()).most_common()),
        flags=[(flag, count, f"{count / light.rows.num_rows:.1%}") for flag, count in flags.most_common()],
        repeated=[(caption, count) for caption, count in times.most_common(NUM_REPEATED) if count > 1],
        num_distinct=len(times),
        samples=rows,
    )


def scores_report(dataset_uri: str, scorer: str, selection: SelectionConfig, *, sample: SampleConfig = DEFAULT_SAMPLE) -> str:
    """The page of `scores/<scorer>`: captioners and selection policies compared, images with every caption, its score, and
    which one is selected.

    Args:
        selection: the policy that selects, as in epoch 0 with seed 0; the others are compared with its settings.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, scores_path(scorer), SCORES)
    light = read_light(table, ["id", "captions"], sample)
    scores, chosen = _contest(light, selection)
    comparison = compare_policies((row["captions"] for row in iter_rows(light.rows)), all_policies(selection, scores))
    selected = [score for values in chosen.values() for score in values]
    rows = with_pictures(dataset_uri, sample_rows(table, sample), _texts)
    colors = _colors([*scores, *(entry["captioner"] for row in rows for entry in row["captions"])])
    for row in rows:
        pick = _choose(row, selection)
        row["chosen"] = None if pick is None else row["captions"].index(pick)
    by_captioner = {name: scores[name] for name in colors if name in scores}
    return _table_page(
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
            {"name": name, "captions": len(values), "mean": _mean(values), "chosen": len(chosen.get(name, []))}
            for name, values in by_captioner.items()
        ],
        colors=colors,
        long_captions=_count_long(table),
        policies=comparison.policies,
        policy=selection.policy,
        equal_shares=not selection.proportions,
        num_chosen=len(selected),
        num_unchosen=light.rows.num_rows - len(selected),
        mean_chosen=_mean(selected),
        samples=[row | {"captions": _shown(row["captions"])} for row in rows],
    )


def latents_report(
    dataset_uri: str, path: str, decode: DecodeLatents | None = None, *, sample: SampleConfig = DEFAULT_SAMPLE
) -> str:
    """The page of `latents/...`: statistics of the values, buckets, images with captions and what `decode` makes of them.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, LATENTS)
    dtype: Dtype = table.require().config["dtype"]
    light = read_light(table, ["bucket", "captions"], sample)
    rows = with_pictures(dataset_uri, sample_rows(table, sample), _texts)
    latents = [read_latents(row, dtype).float().numpy() for row in rows]
    if decode is not None:
        for row, values in zip(rows, latents, strict=True):
            row["decoded"] = thumbnail(decode(values), f"decoded: {row['picture'].alt}")
    flat = np.concatenate([values.reshape(len(values), -1) for values in latents], axis=1) if latents else np.zeros((1, 0))
    finite = np.ma.masked_invalid(flat)
    captions = [row["captions"] for row in rows]
    return _table_page(
        "latents.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Latents {path.removeprefix('latents/')}",
        about="The training samples: images as the autoencoder compresses them, with the captions that compete for them.",
        dtype=dtype,
        num_measured=len(rows),
        figures=table.require().figures,
        num_bad=int(flat.size - finite.count()),
        mean=_mean(flat),
        std=number(float(finite.std())) if finite.count() else "–",
        values=histograms({"": flat.ravel()}, title="Values of latents", x_label="value"),
        channels=_channels(finite),
        buckets=dict(Counter(light.rows["bucket"].to_pylist()).most_common()),
        num_captions=dict(sorted(Counter(pc.list_value_length(light.rows["captions"]).to_pylist()).items())),
        colors=_colors(entry["captioner"] for entries in captions for entry in entries),
        decoded=decode is not None,
        samples=[{"decoded": None} | row | {"captions": _shown(row["captions"])} for row in rows],
    )


def embeds_report(dataset_uri: str, path: str, *, sample: SampleConfig = DEFAULT_SAMPLE) -> str:
    """The page of `caption_embeds/...`: lengths, captioners, how many captions were cut, rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, CAPTION_EMBEDS)
    manifest = table.require()
    light = read_light(table, ["captioner", "num_tokens"], sample)
    cut = manifest.figures.get("cut_captions.mean")
    return _table_page(
        "embeds.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Caption embeddings by {path.removeprefix('caption_embeds/')}",
        about="What the text encoder makes of every caption: computed once, so that training need not.",
        dtype=manifest.config["dtype"],
        max_tokens=manifest.config["max_tokens"],
        num_cut=None if cut is None else round(cut * manifest.num_shards),
        lengths=histograms({"": light.rows["num_tokens"].to_numpy()}, title="Caption length", x_label="tokens"),
        captioners=dict(Counter(light.rows["captioner"].to_pylist()).most_common()),
    )


def _table_page(
    template: str, table: Table, light: LightRows, refused: Rejects, *, title: str, about: str, **content: object
) -> str:
    manifest = table.require()
    num_rows, num_rejects = light.rows.num_rows, sum(refused.counts.values())
    if light.num_shards < light.total_shards:
        num_rows, num_rejects = max(num_rows, manifest.num_rows), max(num_rejects, manifest.num_rejects)
    facts = {"Rows": num_rows, "Rejects": num_rejects, "Shards": light.total_shards}
    head = page_head(table, manifest, title=title, about=about, facts=facts, origin=asdict(manifest.identity()))
    return render(
        template, head=head, num_rows=num_rows, num_read=light.rows.num_rows, scope=light.scope, refused=refused, **content
    )


def _contest(light: LightRows, selection: SelectionConfig) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Scores by captioner: of all captions, and of the selected ones."""
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
    """What was done with captions over the scorer's limit; empty where none was."""
    manifest = table.require()
    count = round(manifest.figures.get("long_captions.mean", 0.0) * manifest.num_shards)
    done = {"cut": "cut there", "chunks": "scored in parts"}.get(manifest.config.get("long_captions", ""), "")
    return f"{count:,} captions were longer than the model's limit, and were {done}." if count and done else ""


def _choose(row: Row, selection: SelectionConfig) -> Row | None:
    return choose_caption(row["captions"], selection, seed=0, epoch=0, sample_id=row["id"])


def _texts(row: Row) -> list[str | None]:
    return [entry["caption"] for entry in row["captions"]]


def _shown(captions: list[Row]) -> list[Row]:
    return [entry | {"score": _mean([entry["clip_score"]])} for entry in captions]


def _mean(values: Sequence[float] | np.ndarray) -> str:
    """With two digits, over what is finite."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return f"{array.mean():.2f}" if array.size else "–"


def _colors(captioners: Iterable[str]) -> dict[str, str]:
    """A colour's number for each: the original captions first, then by name."""
    names = sorted(set(captioners), key=lambda name: (name != ORIGINAL_CAPTIONER, name))
    return {name: str(index % NUM_COLORS) for index, name in enumerate(names)}


def _channels(values: np.ma.MaskedArray) -> str:
    """`values`: (channels, anything)."""
    mean, std = (np.ma.filled(measure, 0.0) for measure in (values.mean(1), values.std(1)))
    return spreads(mean, std, title="Channels: mean ± standard deviation", x_label="channel", y_label="value")
