"""Ingest: raw images from a source -> the `images` table. Every image is decoded once to see whether it is whole.

Before any shard is made, `plan` decides which samples belong to which shard. Of equal images the first in that order stays
(`ledger`), and the others are refused, even if the first was refused itself. An image's id is the hash of its bytes.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle

from pipelines.ingest.config import CAPTION_KEYS, MAX_TEXT_BYTES, IngestConfig
from pipelines.ingest.decoder import Decoder
from pipelines.ingest.ledger import UNSEEN, claim, skipping, start_ledger, to_digests
from pipelines.ingest.lists import COPIES, copy_again
from pipelines.ingest.not_taken import AMONG_FILES, IN_SHARDS, figures_of
from pipelines.ingest.plan import PLAN, Plan, ShardSize, SharedPlan, extend_plan, plan_retries, read_plan, write_plan
from pipelines.ingest.readers import NUM_THREADS, read_parts
from pipelines.ingest.sidecars import CAPTION_COUNTS
from pipelines.ingest.sources import Part, Source, explain_nothing, find_source
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases, Ticket, shared
from pipelines.tables.errors import DamagedFileError
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row
from pipelines.tables.table import Table, absolute_uri
from pipelines.workers.images import ImageLimits

STAGE = "ingest"
DUPLICATE = "duplicate"
DEFAULTS = {"caption_keys": CAPTION_KEYS, "max_text_bytes": MAX_TEXT_BYTES, "text_encoding": None}
"""Settings that came later, and that are no part of the fingerprint where they are as they were before."""
KEPT = ("id", "image_bytes", "caption", "source_uri", "metadata")
"""Columns of SOURCE_ROWS, and the id, that the images keep."""


def run_ingest(
    dataset_uri: str,
    config: IngestConfig,
    on_progress: OnProgress = lambda progress: None,
    leases: Leases | None = None,
) -> StageResult:
    """Make the missing shards of `images`, from the source's files of today and those that were planned before.

    Rejects: the reasons of `images.decode` and of `readers.read_parts`, and "duplicate".

    Raises:
        ValueError: the source holds nothing to ingest, or files of several kinds.
        StaleTableError, TooManyRejectsError: see `stages.run.run_shards`.
    """
    images = Table(absolute_uri(dataset_uri), IMAGES_PATH, IMAGES)
    if absolute_uri(os.path.expanduser(config.source)) == images.dataset_uri:
        raise ValueError(f"source={config.source!r} is the dataset itself: give the dataset a folder of its own")
    with shared(leases) as held:
        ticket = held.take(images.uri).ticket  # before the plan of the sources is made
        source, plan, not_taken = _plan_sources(images, config, ticket)
        identity = _identity(config, source, plan)
        manifest = images.claim(identity, ticket=ticket)
        if config.license is not None and manifest.license != config.license:
            images.write_manifest(replace(manifest, license=config.license), ticket=ticket)
        done = set(images.list_shards())
        missing = {shard: parts for shard, parts in plan.shards.items() if shard not in done}
        result = run_shards(
            images,
            identity,
            list(plan.shards),
            read_shard=ShardReader(source, SharedPlan(missing), _open_ledger(images, plan, done)),
            make_worker=partial(IngestWorker, config.limits),
            resources=config.resources,
            max_reject_share=config.max_reject_share,
            on_progress=on_progress,
            leases=held,
        )
        return _count_files(result, not_taken, ticket)


def _count_files(result: StageResult, not_taken: Counter[str], ticket: Ticket) -> StageResult:
    """Add to the table's figures how many files of the source were not taken, as they are there now."""
    figures = {name: value for name, value in result.figures.items() if not name.startswith(AMONG_FILES)}
    figures |= figures_of(not_taken, AMONG_FILES)
    manifest = result.table.require()
    if figures != manifest.figures:
        result.table.write_manifest(replace(manifest, figures=figures), ticket=ticket)
    return replace(result, figures=figures)


class IngestWorker:
    """Rows of a source -> rows of `images`. Each image is decoded once to see whether it is whole."""

    def __init__(self, limits: ImageLimits):
        self.decoder = Decoder(limits)

    def process(self, table: pa.Table) -> ShardOutput:
        """Turn the table that `ShardReader` reads for a shard into IMAGES rows and rejects.

        Its figures count captions by their keys, and what was not taken, by kind.
        """
        rows: list[Row] = []
        rejects: list[Row] = []
        read = table.to_pylist()
        first = {row["id"]: row for row in reversed(read) if not row["error"]}
        whole = [row for row in read if not row["error"] and first[row["id"]] is row]
        described = self.decoder.describe([row["image_bytes"] for row in whole])
        keys: Counter[str] = Counter()
        not_taken: Counter[str] = Counter()
        for row in read:
            not_taken.update(dict(row["not_taken"] or ()))
            if row["error"]:
                found: Row | RowRefused = RowRefused(row["error"], row["detail"])
            elif first[row["id"]] is not row:
                found = RowRefused(DUPLICATE, _same_as(first[row["id"]]["source_uri"]))
            else:
                found = next(described)
            if isinstance(found, RowRefused):
                rejects.append(reject(row, found))
            else:
                rows.append({name: row[name] for name in KEPT} | found)
                keys.update([row["caption_key"]] if row["caption_key"] else [])
        return ShardOutput(rows, rejects, figures_of(keys, CAPTION_COUNTS) | figures_of(not_taken, IN_SHARDS))


def image_id(image_bytes: bytes) -> str:
    return hashlib.sha256(image_bytes).hexdigest()


def _same_as(source_uri: str) -> str:
    return f"the same bytes as {source_uri}"


@dataclass(frozen=True)
class ShardReader:
    """Reads the raw rows of a shard, on any machine: SOURCE_ROWS with an `id`, which is null if the image could not be read.

    `parts_of` gives the parts of a shard. `ledger` is None if there is only one shard.
    """

    source: Source
    parts_of: Callable[[str], list[Part]]
    ledger: ActorHandle | None = None

    def __call__(self, shard: str) -> pa.Table:
        if self.ledger is None:
            return self._read(shard)
        with skipping(self.ledger, int(shard)):
            table = self._read(shard)
        read_other = None if self.source.kind == "list" else lambda other: _digests(self._read(f"{other:05}"))
        earlier = claim(self.ledger, int(shard), _digests(table), read_other)
        errors, details = table["error"].to_pylist(), table["detail"].to_pylist()
        rows = [row for row, image in enumerate(table["id"]) if image.is_valid]
        for row, place in zip(rows, earlier.tolist(), strict=True):
            if place != UNSEEN:
                errors[row], details[row] = DUPLICATE, _same_as(f"an image of shard {place:05}")
        for name, values in (("error", errors), ("detail", details)):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
        return table

    def _read(self, shard: str) -> pa.Table:
        table = read_parts(self.source, self.parts_of(shard))
        ids = [image_id(image_bytes.as_py()) if image_bytes.is_valid else None for image_bytes in table["image_bytes"]]
        return table.append_column("id", pa.array(ids, pa.string()))


def _digests(table: pa.Table) -> np.ndarray:
    return to_digests(table["id"].drop_null().to_pylist())


def _open_ledger(images: Table, plan: Plan, done: set[str]) -> ActorHandle | None:
    """Start a ledger that knows the images of the `done` shards, without those refused as duplicates. None: no need."""
    missing = [int(shard) for shard in plan.shards if shard not in done]
    if not missing or len(plan.shards) == 1:
        return None
    ledger = start_ledger(missing)

    def add(shard: str) -> None:
        refused = images.rejects().read_shard(shard, ["id", "reject_reason"])
        refused = refused.filter(pc.not_equal(refused["reject_reason"], DUPLICATE))
        for table in (images.read_shard(shard, ["id"]), refused):
            ray.get(ledger.add_done.remote(int(shard), _digests(table)))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(add, sorted(done & plan.shards.keys())))
    return ledger


def _identity(config: IngestConfig, source: Source, plan: Plan) -> Identity:
    """Everything that the images depend on. The sizes of shards count too: all other tables are aligned to these shards."""
    settings = value_settings(config)
    settings |= settings.pop("download")
    for name, default in DEFAULTS.items():
        if getattr(config, name) == default:  # as in the tables that were made before it could be chosen
            del settings[name]
    settings |= {"source": source.uri, "source_kind": source.kind, "first_listing": plan.first_listing}
    return Identity(STAGE, settings, models={}, inputs={})


def _plan_sources(images: Table, config: IngestConfig, ticket: Ticket) -> tuple[Source, Plan, Counter[str]]:
    """Find the source, extend the plan of its shards by new files, and write the plan before it is used.

    Returns them, and how many files of the source are not taken, by kind.
    """
    plan = read_plan(images)
    exclude = images.dataset_uri
    source = find_source(
        config.source,
        plan.kind if plan and config.source_kind == "auto" else config.source_kind,
        image_column=config.image_column,
        caption_column=config.caption_column,
        caption_keys=config.caption_keys,
        url_column=config.url_column,
        base_uri=config.base_uri,
        copies_uri=f"{images.uri}/{COPIES}",
        max_bytes=config.limits.max_bytes,
        max_shard_bytes=config.max_shard_bytes,
        max_text_bytes=config.max_text_bytes,
        text_encoding=config.text_encoding,
        download=config.download,
        exclude=exclude,
    )
    done = images.list_shards()
    if plan:
        images.claim(_identity(config, source, plan), ticket=ticket)  # refuses before the plan of another source is changed
        _refuse_unplanned(images, plan, done)
        if source.kind == "list":
            copy_again(source, [part for shard in plan.shards.keys() - set(done) for part in plan.shards[shard]], ticket)
    size = ShardSize(rows=config.rows_per_shard, bytes=config.bytes_per_shard)
    extended, not_taken = extend_plan(plan, source, size, exclude, ticket)
    if not extended.shards:
        raise ValueError(explain_nothing(config.source, not_taken))
    _refuse_unplanned(images, extended, done)
    if config.retry_rejects and source.kind == "list":
        extended = plan_retries(extended, source, images, size)
    if extended != plan:
        images.claim(_identity(config, source, extended), ticket=ticket)
        write_plan(images, extended, ticket)
    return source, extended, not_taken


def _refuse_unplanned(images: Table, plan: Plan, done: list[str]) -> None:
    """Raise DamagedFileError if a shard exists that the plan does not know: other files would get its name."""
    if unplanned := sorted(set(done) - plan.shards.keys()):
        raise DamagedFileError(
            f"{images.uri}/{PLAN} does not plan shard {unplanned[0]}, which exists: put back the plan with which it was made, "
            "or ingest into another dataset"
        )
