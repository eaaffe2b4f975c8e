"""The pages of `captions/...`: one captioner, and several captioners side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reports.charts import histograms
from pipelines.reports.page import NUM_COLORS, page_head, table_page
from pipelines.reports.pictures import with_pictures
from pipelines.reports.rejects import read_rejects
from pipelines.reports.templates import render
from pipelines.storage.files import write_file
from pipelines.tables.captions import IMPORT_STAGE
from pipelines.tables.identity import Manifest
from pipelines.tables.sampling import DEFAULT_SCOPE, LightRows, ReportScope, read_light, sample_rows
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, Row, captions_path
from pipelines.tables.table import REPORT, Table

NUM_EXAMPLES = 4  # captions shown for each flag
NUM_REPEATED = 10  # repeated captions shown


def captions_report(dataset_uri: str, captioner: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `captions/<captioner>`, as HTML: lengths, flags, repetitions, images with their captions, and rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, captions_path(captioner), CAPTIONS)
    light = read_light(table, ["caption", "num_tokens", "finish_reason", "flags"], sample)
    times = Counter(light.rows["caption"].to_pylist())
    flags = Counter(pc.list_flatten(light.rows["flags"]).to_pylist())
    rows = with_pictures(dataset_uri, sample_rows(table, sample), lambda row: [row["caption"]])
    is_imported = table.require().stage == IMPORT_STAGE  # no tokenizer is known for them, so their words are counted
    return table_page(
        "captions.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Captions by {captioner}",
        about=f"What the captioner {captioner!r} says about each image{', as others had it' if is_imported else ''}.",
        is_imported=is_imported,
        lengths=histograms(
            {"": light.rows["num_tokens"].to_numpy()}, title="Caption length", x_label="words" if is_imported else "tokens"
        ),
        finish_reasons=dict(Counter(light.rows["finish_reason"].to_pylist()).most_common()),
        flags=[(flag, count, f"{count / light.rows.num_rows:.1%}") for flag, count in flags.most_common()],
        repeated=[(caption, count) for caption, count in times.most_common(NUM_REPEATED) if count > 1],
        num_distinct=len(times),
        samples=rows,
    )


@dataclass(frozen=True)
class Captioner:
    """A captioner's table and the part of it that was read."""

    name: str
    table: Table
    manifest: Manifest
    light: LightRows

    @property
    def flags(self) -> Counter[str]:
        """How many of the captions read have each flag."""
        return Counter(pc.list_flatten(self.light.rows["flags"]).to_pylist())

    def share(self, count: int) -> str:
        """`count` as text, with its share of the captions read."""
        total = self.light.rows.num_rows
        return f"{count:,} ({count / total:.1%})" if total else "–"


def captioners_report(dataset_uri: str, names: Sequence[str], *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page that compares the tables `captions/<name>`, as HTML: lengths, faults, and what each says about the same images.

    Raises MissingTableError if one of the tables, or `images`, is missing.
    """
    captioners = [_read(dataset_uri, name, sample) for name in names]
    flags = sorted({flag for captioner in captioners for flag in captioner.flags})
    reasons = sorted({reason for captioner in captioners for reason in captioner.manifest.rejects_by_reason})
    colors = {captioner.name: str(index % NUM_COLORS) for index, captioner in enumerate(captioners)}
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    lengths = {captioner.name: captioner.light.rows["num_tokens"].to_numpy() for captioner in captioners}
    return render(
        "captioners.html.jinja",
        head=page_head(
            images,
            images.require(),
            kind="captions",
            title="Captioners",
            about="What several VLMs say about the same images. Flagged captions are in their tables; rejected ones are not.",
            facts={"Captioners": len(captioners), "Images": images.require().num_rows},
            origin={captioner.name: captioner.manifest.config for captioner in captioners},
        ),
        lengths=histograms(
            lengths,
            title="Caption length",
            x_label="tokens (of imported captions words)",
            colors=colors,
        ),
        columns=["captioner", "model", "engine", "captions", "rejects", "mean tokens", "different"],
        captioners=[_describe(captioner) for captioner in captioners],
        scopes={captioner.name: captioner.light.scope for captioner in captioners},
        flag_columns=["flag", *names],
        flags=[[flag, *(captioner.share(captioner.flags[flag]) for captioner in captioners)] for flag in flags],
        reject_columns=["reason", *names],
        rejects=[
            [reason, *(captioner.manifest.rejects_by_reason.get(reason, 0) for captioner in captioners)] for reason in reasons
        ],
        examples={flag: _examples(captioners, flag) for flag in flags},
        colors=colors,
        samples=_side_by_side(dataset_uri, captioners, sample),
    )


def write_captioners_report(dataset_uri: str, names: Sequence[str]) -> str:
    """Write the comparing page to `captions/report.html`, beside the captioners' tables. Returns its URI."""
    uri = f"{dataset_uri.rstrip('/')}/captions/{REPORT}"
    write_file(uri, captioners_report(dataset_uri, names).encode())
    return uri


def _read(dataset_uri: str, name: str, sample: ReportScope) -> Captioner:
    table = Table(dataset_uri, captions_path(name), CAPTIONS)
    return Captioner(name, table, table.require(), read_light(table, ["caption", "num_tokens", "flags"], sample))


def _describe(captioner: Captioner) -> list[object]:
    """The captioner's row in the table of captioners."""
    rows, manifest = captioner.light.rows, captioner.manifest
    mean = f"{pc.mean(rows['num_tokens']).as_py():.1f}" if rows.num_rows else "–"
    different = captioner.share(pc.count_distinct(rows["caption"]).as_py())
    settings = [manifest.config.get("model", ""), manifest.config.get("engine", "")]
    return [captioner.name, *settings, manifest.num_rows, manifest.num_rejects, mean, different]


def _examples(captioners: Sequence[Captioner], flag: str) -> list[tuple[str, str]]:
    """(captioner, caption) of a few captions with this flag, taken from the captioners in turn."""
    by_captioner = []
    for captioner in captioners:
        rows = captioner.light.rows
        flagged = pa.array([flag in (flags or []) for flags in rows["flags"].to_pylist()], pa.bool_())
        by_captioner.append(
            [(captioner.name, caption) for caption in rows.filter(flagged)["caption"].to_pylist()[:NUM_EXAMPLES]]
        )
    turns = [found[turn] for turn in range(NUM_EXAMPLES) for found in by_captioner if turn < len(found)]
    return turns[:NUM_EXAMPLES]


def _side_by_side(dataset_uri: str, captioners: Sequence[Captioner], sample: ReportScope) -> list[Row]:
    """Sample images of the first captioner, each with every captioner's caption, or None where it has none."""
    chosen = sample_rows(captioners[0].table, sample)
    rows = with_pictures(dataset_uri, chosen, lambda row: [row["caption"]])
    by_shard: dict[str, list[str]] = {}
    for shard, row in chosen:
        by_shard.setdefault(shard, []).append(row["id"])
    said = {captioner.name: _captions_of(captioner.table, by_shard) for captioner in captioners}
    return [
        {"id": row["id"], "picture": row["picture"], "captions": [(name, said[name].get(row["id"])) for name in said]}
        for row in rows
    ]


def _captions_of(table: Table, by_shard: dict[str, list[str]]) -> dict[str, Row]:
    """The rows with the given ids (by shard), by id."""
    found: dict[str, Row] = {}
    for shard in by_shard.keys() & set(table.list_shards()):
        content = table.read_shard(shard)
        found |= {row["id"]: row for row in content.filter(pc.is_in(content["id"], pa.array(by_shard[shard]))).to_pylist()}
    return found
