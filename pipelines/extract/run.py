"""The extract stage: images to scaled DC-AE latents, one bucket size each, with the captions that compete for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch

from pipelines.extract.config import Dtype, ExtractConfig
from pipelines.extract.encode import LatentEncoder
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.stages.shards import write_output
from pipelines.storage.lease import Leases, Ticket, shared
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import IMAGE_SCORES, IMAGES, IMAGES_PATH, LATENTS, SCORES, Row, image_scores_path, scores_path
from pipelines.tables.table import Table
from pipelines.workers.models import find_model

SHARD = b"shard"
"""Key in the metadata of the actor's input for the name of the shard."""
NAMED_SCORE = pa.struct([("scorer", pa.string()), ("score", pa.float32())])


def extract_identity(dataset_uri: str, config: ExtractConfig, models: dict[str, str]) -> Identity:
    """Everything that the latents depend on; `models`: the version of the autoencoder."""
    images, scores, *image_scores = _input_tables(dataset_uri, config)
    inputs = {table.path: table.require().fingerprint for table in (images, scores, *image_scores)}
    settings = value_settings(config) | {"interpolation": config.resolved_interpolation}
    return Identity("extract", settings, models, inputs)


def run_extract(
    dataset_uri: str,
    config: ExtractConfig,
    *,
    also: Sequence[int] = (),
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Encode every scored image of a dataset into `latents/<name>-<resolution>`.

    Args:
        also: other resolutions. A shard that is missing here and there is made for both from one decode. The shards that the
            others then still miss are made by a call for each.

    Raises as `run_shards`, and MissingTableError if images or scores are not there.
    """
    autoencoder = find_model(config.autoencoder)
    models = {config.name: autoencoder.version}
    identity = extract_identity(dataset_uri, config, models)
    images, scores, *image_scores = _input_tables(dataset_uri, config)
    shards = set(images.list_shards()).intersection(*(table.list_shards() for table in (scores, *image_scores)))
    with shared(leases) as held:
        sides = [_claim_side(dataset_uri, config.at(resolution), models, shards, held) for resolution in also]
        return run_shards(
            Table(dataset_uri, config.path, LATENTS),
            identity,
            sorted(shards),
            read_shard=partial(read_scored_images, images, scores, dict(zip(config.image_filters, image_scores, strict=True))),
            make_worker=partial(Extractor, replace(config, autoencoder=autoencoder.path), sides),
            resources=config.resources,
            max_reject_share=config.max_reject_share,
            on_progress=on_progress,
            leases=held,
        )


def _input_tables(dataset_uri: str, config: ExtractConfig) -> list[Table]:
    """images, scores, and the image scores that filter."""
    filters = [Table(dataset_uri, image_scores_path(name), IMAGE_SCORES) for name in config.image_filters]
    return [Table(dataset_uri, IMAGES_PATH, IMAGES), Table(dataset_uri, scores_path(config.scorer), SCORES), *filters]


@dataclass(frozen=True)
class SideTable:
    """The table of another resolution, and its missing shards."""

    resolution: int
    table: Table
    fingerprint: str
    ticket: Ticket
    missing: frozenset[str]


def _claim_side(dataset_uri: str, config: ExtractConfig, models: dict[str, str], shards: set[str], leases: Leases) -> SideTable:
    table, identity = Table(dataset_uri, config.path, LATENTS), extract_identity(dataset_uri, config, models)
    ticket = leases.take(table.uri).ticket
    table.claim(identity)
    missing = frozenset(shards.difference(table.list_shards()))
    return SideTable(config.resolution, table, identity.fingerprint, ticket, missing)


def read_scored_images(images: Table, scores: Table, image_scores: dict[str, Table], shard: str) -> pa.Table:
    """id, image_bytes, source_uri, captions and image_scores of a shard's images that have caption scores."""
    captions = {row["id"]: row["captions"] for row in scores.read_shard(shard).to_pylist()}
    named = {name: read_image_scores(table, shard) for name, table in image_scores.items()}
    table = images.read_shard(shard, ["id", "image_bytes", "source_uri"])
    table = table.filter(pa.array([row_id in captions for row_id in table["id"].to_pylist()], pa.bool_()))
    ids = table["id"].to_pylist()
    own = [[{"scorer": name, "score": found.get(row_id)} for name, found in named.items()] for row_id in ids]
    table = table.append_column("captions", pa.array([captions[row_id] for row_id in ids], SCORES.field("captions").type))
    table = table.append_column("image_scores", pa.array(own, pa.list_(NAMED_SCORE)))
    return table.replace_schema_metadata({SHARD: shard.encode()})


def read_image_scores(table: Table, shard: str) -> dict[str, float]:
    """The scores of a shard's images by one image scorer, by id."""
    rows = table.read_shard(shard, ["id", "score"])
    return dict(zip(rows["id"].to_pylist(), rows["score"].to_pylist(), strict=True))


class Extractor:
    """Ray Data actor: images -> latents of one table, and of others whose shard is missing too."""

    def __init__(self, config: ExtractConfig, sides: Sequence[SideTable] = ()):
        self.config, self.sides = config, sides
        self.encoder = LatentEncoder(config, [side.resolution for side in sides])

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of latents for each image, or a reject; the other tables' shards are written here."""
        shard = (table.schema.metadata or {})[SHARD].decode()
        sides = [side for side in self.sides if shard in side.missing]
        outputs = self.encoder.process_all(table, [self.config.resolution, *(side.resolution for side in sides)])
        for side in sides:
            _write(side, shard, outputs[side.resolution])
        return outputs[self.config.resolution]


def _write(side: SideTable, shard: str, output: ShardOutput) -> None:
    rows, rejects = output.tables(LATENTS)
    write_output(side.table, shard, rows, rejects, output.figures, side.fingerprint, side.ticket)


def read_latents(row: Row, dtype: Dtype) -> torch.Tensor:
    """The latents of a row of the table, (channels, height, width) in `dtype`."""
    values = torch.frombuffer(bytearray(row["latents"]), dtype=getattr(torch, dtype))
    return values.view(row["channels"], row["height"], row["width"])
