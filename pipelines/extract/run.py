"""The extract stage: images to scaled DC-AE latents, one bucket size each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.extract.config import Dtype, ExtractConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.stages.shards import write_output
from pipelines.storage.lease import Leases, Ticket, shared
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import IMAGES, IMAGES_PATH, LATENTS, Row
from pipelines.tables.table import Table
from pipelines.workers.models import FoundModel

if TYPE_CHECKING:
    import torch

SHARD = b"shard"
"""Key in the metadata of the actor's input for the name of the shard."""


def extract_identity(dataset_uri: str, config: ExtractConfig, models: dict[str, str]) -> Identity:
    """Everything that the latents depend on; `models`: the version of the autoencoder's encoder."""
    inputs = {IMAGES_PATH: Table(dataset_uri, IMAGES_PATH, IMAGES).require().fingerprint}
    settings = value_settings(config) | {"interpolation": config.resolved_interpolation}
    return Identity("extract", settings, models, inputs)


def run_extract(
    dataset_uri: str,
    config: ExtractConfig,
    encoder: FoundModel | None = None,
    *,
    also: Sequence[int] = (),
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Encode every image of a dataset into `latents/<name>-<resolution>`.

    Args:
        encoder: the autoencoder of `config` if `find_encoder` found it before; None: it is sought here.
        also: other resolutions. A shard that is missing here and there is made for both from one decode. The shards that the
            others then still miss are made by a call for each.

    Raises as `run_shards`, and MissingTableError if there are no images.
    """
    from pipelines.extract.encode import find_encoder

    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    images.require()  # before any weights are fetched or hashed
    encoder = encoder or find_encoder(config.autoencoder)
    models = {config.name: encoder.version}
    identity = extract_identity(dataset_uri, config, models)
    shards = images.list_shards()
    with shared(leases) as held:
        sides = [_claim_side(dataset_uri, config.at(resolution), models, shards, held) for resolution in also]
        return run_shards(
            Table(dataset_uri, config.path, LATENTS),
            identity,
            shards,
            read_shard=partial(read_images, images),
            make_worker=partial(Extractor, replace(config, autoencoder=encoder.path), sides),
            resources=config.resources,
            max_reject_share=config.max_reject_share,
            on_progress=on_progress,
            leases=held,
        )


@dataclass(frozen=True)
class SideTable:
    """The table of another resolution, and its missing shards."""

    resolution: int
    table: Table
    fingerprint: str
    ticket: Ticket
    missing: frozenset[str]


def _claim_side(
    dataset_uri: str, config: ExtractConfig, models: dict[str, str], shards: list[str], leases: Leases
) -> SideTable:
    table, identity = Table(dataset_uri, config.path, LATENTS), extract_identity(dataset_uri, config, models)
    ticket = leases.take(table.uri).ticket
    table.claim(identity, ticket=ticket)
    missing = frozenset(set(shards).difference(table.list_shards()))
    return SideTable(config.resolution, table, identity.fingerprint, ticket, missing)


def read_images(images: Table, shard: str) -> pa.Table:
    """id, image_bytes and source_uri of a shard's images; the shard's name is in the metadata."""
    table = images.read_shard(shard, ["id", "image_bytes", "source_uri"])
    return table.replace_schema_metadata({SHARD: shard.encode()})


class Extractor:
    """Ray Data actor: images -> latents of one table, and of others whose shard is missing too."""

    def __init__(self, config: ExtractConfig, sides: Sequence[SideTable] = ()):
        from pipelines.extract.encode import LatentEncoder

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


def read_latents(row: Row, dtype: Dtype) -> "torch.Tensor":
    """The latents of a row of the table, (channels, height, width) in `dtype`."""
    import torch

    values = torch.frombuffer(bytearray(row["latents"]), dtype=getattr(torch, dtype))
    return values.view(row["channels"], row["height"], row["width"])
