"""The extract stage: images to scaled DC-AE latents, one bucket size each, with the captions that compete for them."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from pipelines.buckets import buckets_for, name_bucket, nearest_bucket
from pipelines.images import BadImageError, decode, resize_and_crop, to_tensor_array
from pipelines.models import model_version, pick_device
from pipelines.schema import IMAGES, IMAGES_PATH, LATENTS, SCORES, latents_path, scores_path
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, reject, run_shards
from pipelines.tables import Identity, Table
from sana_model.autoencoder import DCAutoencoder

Dtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """An autoencoder, a resolution, and whose scores to take along.

    Args:
        name: of the autoencoder in the table's path, latents/<name>-<resolution>.
        autoencoder: a local folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' or efficientvit's.
        resolution: pixels; an image goes to the bucket of about resolution^2 pixels whose shape is nearest.
        scorer: name of the table under scores/.
        dtype: of the stored latents.
        min_best_score: images whose best caption scores less are refused (Sana 1.5: 22); None: all are taken.
        tile_size: pixels; encode in tiles, so that memory does not grow with the image. None: in one piece.
        batch_size: images in one call of the model; changes no value.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    name: str
    autoencoder: str
    resolution: int
    scorer: str
    dtype: Dtype = "float16"
    min_best_score: float | None = None
    tile_size: int | None = None
    batch_size: int = 16
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    @property
    def path(self) -> str:
        return latents_path(self.name, self.resolution)


def extract_identity(dataset_uri: str, config: ExtractConfig) -> Identity:
    """What the latents depend on."""
    names = ("autoencoder", "resolution", "scorer", "dtype", "min_best_score", "tile_size")
    settings = {name: getattr(config, name) for name in names}
    tables = [Table(dataset_uri, IMAGES_PATH, IMAGES), Table(dataset_uri, scores_path(config.scorer), SCORES)]
    inputs = {table.path: table.require().fingerprint for table in tables}
    return Identity("extract", settings, {config.name: model_version(config.autoencoder)}, inputs)


def run_extract(dataset_uri: str, config: ExtractConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Encode every scored image of a dataset into `latents/<name>-<resolution>`.

    Raises as `run_shards`, and MissingTableError if images or scores are not there.
    """
    identity = extract_identity(dataset_uri, config)
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    scores = Table(dataset_uri, scores_path(config.scorer), SCORES)
    return run_shards(
        Table(dataset_uri, config.path, LATENTS),
        identity,
        sorted(set(images.list_shards()) & set(scores.list_shards())),
        read_shard=partial(read_scored_images, images, scores),
        make_worker=partial(LatentEncoder, config),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
    )


def read_scored_images(images: Table, scores: Table, shard: str) -> pa.Table:
    """id, image_bytes, source_uri and captions of a shard's images that have scores."""
    captions = {row["id"]: row["captions"] for row in scores.read_shard(shard).to_pylist()}
    table = images.read_shard(shard, ["id", "image_bytes", "source_uri"])
    ids = table["id"].to_pylist()
    table = table.filter(pa.array([row_id in captions for row_id in ids]))
    column = pa.array([captions[row_id] for row_id in ids if row_id in captions], SCORES.field("captions").type)
    return table.append_column("captions", column)


class LatentEncoder:
    """Ray Data actor: images -> DC-AE latents."""

    def __init__(self, config: ExtractConfig):
        self.config = config
        self.device = pick_device(config.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.autoencoder = DCAutoencoder.from_pretrained(config.autoencoder, dtype=dtype).to(self.device).eval()
        self.buckets = buckets_for(config.resolution, self.autoencoder.compression)

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of latents for each image, or a reject. Images of one bucket are encoded together."""
        rows: list[Row] = []
        rejects: list[Row] = []
        waiting: dict[tuple[int, int], list[tuple[Row, np.ndarray]]] = {}
        for row in table.to_pylist():
            try:
                bucket, image = self._prepare(row)
            except BadImageError as error:
                rejects.append(reject(row, error.reason, error.detail))
                continue
            batch = waiting.setdefault(bucket, [])
            batch.append((row, image))
            if len(batch) == self.config.batch_size:
                rows += self._encode(bucket, waiting.pop(bucket))
        for bucket, batch in waiting.items():
            rows += self._encode(bucket, batch)
        order = {row_id: index for index, row_id in enumerate(table["id"].to_pylist())}
        return ShardOutput(sorted(rows, key=lambda row: order[row["id"]]), rejects)

    def _prepare(self, row: Row) -> tuple[tuple[int, int], np.ndarray]:
        """The bucket (height, width) and the image (3, height, width) float32 in [-1, 1]."""
        best = max(caption["clip_score"] for caption in row["captions"])
        if self.config.min_best_score is not None and best < self.config.min_best_score:
            raise BadImageError("low_score", f"its best caption scores {best:.1f}, min_best_score={self.config.min_best_score}")
        image = decode(row["image_bytes"])
        bucket = nearest_bucket(image.height, image.width, self.buckets)
        return bucket, to_tensor_array(resize_and_crop(image, *bucket))

    @torch.inference_mode()
    def _encode(self, bucket: tuple[int, int], batch: list[tuple[Row, np.ndarray]]) -> list[Row]:
        weight = next(self.autoencoder.parameters())
        images = torch.from_numpy(np.stack([image for _, image in batch])).to(weight)
        latents = self.autoencoder.encode(images, tile_size=self.config.tile_size)
        stored = latents.to("cpu", getattr(torch, self.config.dtype)).contiguous()
        channels, height, width = stored.shape[1:]
        return [
            {
                "id": row["id"],
                "latents": one.view(torch.uint8).numpy().tobytes(),
                "channels": channels,
                "height": height,
                "width": width,
                "bucket": name_bucket(bucket),
                "captions": row["captions"],
            }
            for (row, _), one in zip(batch, stored, strict=True)
        ]


def read_latents(row: Row, dtype: Dtype) -> torch.Tensor:
    """The latents of a row of the table, (channels, height, width) in `dtype`."""
    values = torch.frombuffer(bytearray(row["latents"]), dtype=getattr(torch, dtype))
    return values.view(row["channels"], row["height"], row["width"])
