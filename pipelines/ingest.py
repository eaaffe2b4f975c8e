"""Ingest: raw images of any source -> the `images` table, every one of them decoded once to see that it can be.

Which samples belong to which shard is planned once, before any shard is made, and kept in `images/_sources.json`. A later
run with more files at the source appends shards and never renames or redoes one.

Duplicates. The id is the hash of the bytes; of equal images the first in the order of the plan stays, and the others are
refused with its name, whether or not it was let in itself. Shards are written once, in any order, and never touched again,
so what came earlier must be known before: a first pass reads the shards that are to be made and hashes them, and takes the
ids of finished shards from the table and its rejects. It is left out while there is a single shard. So the source is read
twice, and the driver holds about 450 bytes for each image: good for some ten million. Beyond that the ids belong into
partitions by their first digits, each of which is searched for duplicates by itself.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import fsspec
import pyarrow as pa
import ray

from pipelines.images import BadImageError, ImageLimits, open_image, perceptual_hash, to_rgb
from pipelines.readers import NUM_THREADS, count_samples, read_parts
from pipelines.schema import IMAGES, IMAGES_PATH
from pipelines.sources import ACCEPTED, Kind, Part, Source, find_source, list_parts
from pipelines.stage import OnProgress, ReadShard, Resources, Row, ShardOutput, StageResult, reject, run_shards
from pipelines.tables import Identity, Table, absolute_uri

STAGE = "ingest"
PLAN = "_sources.json"
MAX_SHARDS = 100_000  # names have five digits
DUPLICATE = "duplicate"


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Which images become the dataset.

    Args:
        source: a folder of images with captions beside them (.txt, or .json with "caption" or "text"), of WebDataset tars or of
            Parquet files, at any depth, or one such file; a path or an fsspec URI.
        source_kind: which files to take where there are several kinds; auto: the kind that is there.
        image_column: of Parquet files; found by its name unless given.
        caption_column: of Parquet files; found by its name unless given.
        limits: which images are let in.
        rows_per_shard: at most; a shard is what a stage does in one go, and what is lost if it is killed.
        bytes_per_shard: at most, of image files; several times as much is held in memory for each actor.
        max_reject_share: the job fails if a larger share of the images is refused.
        resources: of the actors that decode.
    """

    source: str
    source_kind: Kind | Literal["auto"] = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    rows_per_shard: int = 1000
    bytes_per_shard: int = 256 * 2**20
    max_reject_share: float = 0.5
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1 or self.bytes_per_shard < 1:
            raise ValueError(
                f"rows_per_shard={self.rows_per_shard}, bytes_per_shard={self.bytes_per_shard}: both must be positive"
            )


def run_ingest(dataset_uri: str, config: IngestConfig, on_progress: OnProgress = lambda progress: None) -> StageResult:
    """Make the shards of `images` that are absent, of the source's present files and of those that were there before.

    Rejects: the reasons of `images.decode`, "duplicate", "missing_source" (the file is gone since it was planned),
    "unreadable", and "truncated" for a tar of which the rest is missing.

    Raises:
        ValueError: the source holds nothing to ingest, or files of several kinds.
        StaleTableError, TooManyRejectsError: see `stage.run_shards`.
    """
    images = Table(absolute_uri(dataset_uri), IMAGES_PATH, IMAGES)
    source, plan = _plan_sources(images, config)
    read = ShardReader(source, plan.shards, {})
    duplicates = _find_duplicates(images, plan, read)
    return run_shards(
        images,
        _identity(config, source, plan),
        list(plan.shards),
        read_shard=replace(read, duplicates=duplicates),
        make_worker=partial(IngestWorker, config.limits),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
    )


class IngestWorker:
    """Rows of a source -> rows of `images`; each image is decoded, to see that it can be."""

    def __init__(self, limits: ImageLimits):
        self.limits = limits

    def process(self, table: pa.Table) -> ShardOutput:
        """SOURCE_ROWS of a shard -> IMAGES rows and rejects."""
        rows: list[Row] = []
        rejects: list[Row] = []
        seen: dict[str, str] = {}
        for row in table.to_pylist():
            if row["image_bytes"] is not None:
                row["id"] = image_id(row["image_bytes"])
            if row["error"]:
                rejects.append(reject(row, row["error"], row["detail"]))
            elif row["id"] in seen:
                rejects.append(reject(row, DUPLICATE, _same_as(seen[row["id"]])))
            else:
                seen[row["id"]] = row["source_uri"]
                try:
                    rows.append(self._describe(row))
                except BadImageError as error:
                    rejects.append(reject(row, error.reason, error.detail))
        return ShardOutput(rows, rejects)

    def _describe(self, row: Row) -> Row:
        opened = open_image(row["image_bytes"], self.limits)
        image = to_rgb(opened)
        found = {"format": opened.format, "width": image.width, "height": image.height, "phash": perceptual_hash(image)}
        return {name: row[name] for name in ("id", "image_bytes", "caption", "source_uri", "metadata")} | found


def image_id(image_bytes: bytes) -> str:
    return hashlib.sha256(image_bytes).hexdigest()


def _same_as(source_uri: str) -> str:
    return f"the same bytes as {source_uri}"


@dataclass(frozen=True)
class ShardReader:
    """Reads the raw rows of a shard, on any machine. `duplicates`: by shard, ids that came earlier, and where."""

    source: Source
    shards: dict[str, list[Part]]
    duplicates: dict[str, dict[str, str]]

    def __call__(self, shard: str) -> pa.Table:
        table = read_parts(self.source, self.shards[shard])
        earlier = self.duplicates.get(shard)
        if not earlier:
            return table
        errors, details = table["error"].to_pylist(), table["detail"].to_pylist()
        for index, image_bytes in enumerate(table["image_bytes"]):
            first = image_bytes.is_valid and earlier.get(image_id(image_bytes.as_py()))
            if first:
                errors[index], details[index] = DUPLICATE, _same_as(first)
        for name, values in (("error", errors), ("detail", details)):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
        return table


@dataclass(frozen=True)
class Plan:
    """Which samples belong to which shard."""

    kind: Kind
    first_listing: str
    """Hash of the files that the plan began with: the same shards mean the same images only within one such."""
    shards: dict[str, list[Part]]


def _identity(config: IngestConfig, source: Source, plan: Plan) -> Identity:
    """Resources and the share of rejects change no value; the sizes of shards do, for the other tables are aligned to them."""
    settings = {name: getattr(config, name) for name in ("image_column", "caption_column", "rows_per_shard", "bytes_per_shard")}
    settings |= {"source": source.uri, "source_kind": source.kind, "first_listing": plan.first_listing}
    return Identity(STAGE, settings | {"limits": asdict(config.limits)}, models={}, inputs={})


def _plan_sources(images: Table, config: IngestConfig) -> tuple[Source, Plan]:
    """The plan that there is, with new files appended as new shards; written before it is used."""
    plan = read_plan(images)
    exclude = images.dataset_uri
    if absolute_uri(os.path.expanduser(config.source)) == exclude:
        raise ValueError(f"source={config.source!r} is the dataset itself: give the dataset a folder of its own")
    kind = plan.kind if plan and config.source_kind == "auto" else config.source_kind
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    source = find_source(config.source, kind, **columns, exclude=exclude)
    if plan:
        images.claim(_identity(config, source, plan))  # refuses before the plan of another source is changed
    known = {part.path for parts in plan.shards.values() for part in parts} if plan else set()
    new = [part for part in list_parts(source, exclude) if part.path not in known]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = list(pool.map(partial(count_samples, source), new))
    shards = dict(plan.shards) if plan else {}
    for parts in _pack(new, counts, config):
        shards[f"{len(shards):05}"] = parts
    if not shards:
        raise ValueError(f"source={config.source!r} holds nothing to ingest: give {ACCEPTED}")
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"{len(shards)} shards are more than {MAX_SHARDS}: raise rows_per_shard={config.rows_per_shard}")
    first_listing = plan.first_listing if plan else _hash_listing(new)
    extended = Plan(source.kind, first_listing, shards)
    if extended != plan:
        images.claim(_identity(config, source, extended))
        images.write_file(PLAN, json.dumps(asdict(extended)).encode())
    return source, extended


def _pack(parts: list[Part], counts: list[int | None], config: IngestConfig) -> list[list[Part]]:
    """Fill shards with whole files or slices of them, in order. A file that could not be counted is a shard by itself."""
    shards: list[list[Part]] = []
    rows, size = config.rows_per_shard, config.bytes_per_shard  # of the last shard: full, so that one is begun
    for part, count in zip(parts, counts, strict=True):
        if count is None:
            shards.append([part])
            rows = config.rows_per_shard
            continue
        start = 0
        while start < count:
            row_size = max(part.size // count, 1)
            if rows >= config.rows_per_shard or size + row_size > config.bytes_per_shard:
                shards.append([])
                rows = size = 0
            fitting = max((config.bytes_per_shard - size) // row_size, 1)
            stop = min(start + min(config.rows_per_shard - rows, fitting), count)
            shards[-1].append(replace(part, start=start, stop=None if stop == count else stop))
            rows, size, start = rows + stop - start, size + (stop - start) * row_size, stop
    return shards


def _hash_listing(parts: list[Part]) -> str:
    return hashlib.sha256(json.dumps([asdict(part) for part in parts]).encode()).hexdigest()[:16]


def read_plan(images: Table) -> Plan | None:
    """None if there is none. Raises ValueError if it is of another version."""
    filesystem, path = fsspec.url_to_fs(f"{images.uri}/{PLAN}")
    try:
        content = filesystem.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        plan = json.loads(content)
        shards = {shard: [_read_part(part) for part in parts] for shard, parts in plan["shards"].items()}
        return Plan(plan["kind"], plan["first_listing"], shards)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{images.uri}/{PLAN} is no plan of this version ({error!r})") from error


def _read_part(part: dict[str, Any]) -> Part:
    return Part(**part | {"sidecars": tuple(part["sidecars"])})


def _find_duplicates(images: Table, plan: Plan, read: ReadShard) -> dict[str, dict[str, str]]:
    """By shard that is to be made: the ids that came in an earlier shard, and their source there."""
    done = set(images.list_shards())
    missing = [shard for shard in plan.shards if shard not in done]
    if not missing or len(plan.shards) == 1:
        return {}
    ray.data.DataContext.get_current().enable_progress_bars = False
    hashed = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing)).map_batches(
        partial(_hash_shards, read=read), batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    ids = {row["shard"]: dict(zip(row["ids"], row["sources"], strict=True)) for row in hashed.iter_rows()}
    first: dict[str, str] = {}
    duplicates = {}
    for shard in plan.shards:
        if shard in ids:
            duplicates[shard] = {image: first[image] for image in ids[shard] if image in first}
        for image, uri in (ids[shard] if shard in ids else _ids_of_done(images, shard)).items():
            first.setdefault(image, uri)
    return duplicates


def _hash_shards(batch: pa.Table, read: ReadShard) -> pa.Table:
    """The ids of a shard's readable images, each once, and where it came first."""
    shards, ids, sources = batch["shard"].to_pylist(), [], []
    for shard in shards:
        table = read(shard)
        first: dict[str, str] = {}
        for image_bytes, uri in zip(table["image_bytes"], table["source_uri"], strict=True):
            if image_bytes.is_valid:
                first.setdefault(image_id(image_bytes.as_py()), uri.as_py())
        ids.append(list(first))
        sources.append(list(first.values()))
    strings = pa.list_(pa.string())
    return pa.table({"shard": shards, "ids": pa.array(ids, strings), "sources": pa.array(sources, strings)})


def _ids_of_done(images: Table, shard: str) -> dict[str, str]:
    """The same of a shard that is there; without those that came earlier."""
    kept = images.read_shard(shard, ["id", "source_uri"]).to_pylist()
    refused = images.rejects().read_shard(shard, ["id", "source_uri", "reject_reason"]).to_pylist()
    refused = [row for row in refused if row["id"] and row["reject_reason"] != DUPLICATE]
    return {row["id"]: row["source_uri"] for row in kept + refused}
