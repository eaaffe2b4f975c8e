"""The extract stage's model: images of one bucket at a time to latents, checked, and some of them decoded again."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines.extract.buckets import Bucket, buckets_for, name_bucket, nearest_bucket
from pipelines.extract.config import ExtractConfig
from pipelines.stages.contract import ShardOutput
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.sampling import spread
from pipelines.tables.schema import Row
from pipelines.workers.halving import run_halving
from pipelines.workers.images import decode, resize_and_crop
from pipelines.workers.models import FoundModel, locate, pick_device
from pipelines.workers.prepare import iter_rows, prepare_ahead
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.finite import find_bad_weights

MAX_WAITING_BYTES = 2**31
"""Most bytes of prepared images that wait for a batch of their bucket; beyond it the fullest bucket is encoded."""
SMALLEST_ERROR = 1e-6  # mean square, of 255 steps: a perfect reconstruction has 108 dB


@dataclass(frozen=True)
class Cropped:
    """An image in its bucket: (height, width, 3) uint8."""

    bucket: Bucket
    pixels: np.ndarray


Fitted = Mapping[int, Cropped | RowRefused]
"""An image cropped, or refused, at each resolution."""


def find_encoder(autoencoder: str) -> FoundModel:
    """Find an autoencoder: its path, with the commit in an hf:// address, and as its version that of its encoder.

    The version is a hash of the encoder's weights, its shape and the scale of the latents. It is the same in whatever layout
    they are stored, and whatever the decoder is: a decoder that was trained further makes no latents stale.

    Raises FileNotFoundError if there is no such autoencoder, ValueError if it cannot be read or weights are not finite.
    """
    address, place = locate(autoencoder)
    model = DCAutoencoder.from_pretrained(place, dtype=torch.float32)
    if bad := find_bad_weights(model):
        raise ValueError(f"autoencoder={autoencoder}: its weights {', '.join(bad[:3])} are not finite: take another copy of it")
    config = model.config
    shape = (config.latent_channels, config.widths, config.encoder_depths, config.variant, config.scaling_factor)
    digest = hashlib.sha256(repr(shape if config.residual else (*shape, "no shortcuts")).encode())
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return FoundModel(address, None, f"encoder sha256:{digest.hexdigest()[:32]}")


class LatentEncoder:
    """Ray Data actor: images -> DC-AE latents, of one or several resolutions of which `config.resolution` is the first."""

    def __init__(self, config: ExtractConfig, also: Sequence[int] = ()):
        self.configs = {resolution: config.at(resolution) for resolution in (config.resolution, *also)}
        self.config = config
        self.device = pick_device(config.device)
        self.dtype = getattr(torch, config.compute_dtype)
        self.autoencoder = DCAutoencoder.from_pretrained(config.autoencoder, dtype=self.dtype).to(self.device).eval()
        factor = self.autoencoder.compression
        self.buckets = {resolution: buckets_for(resolution, factor, config.buckets) for resolution in self.configs}

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of latents for each image, or a reject."""
        return self.process_all(table, [self.config.resolution])[self.config.resolution]

    def process_all(self, table: pa.Table, resolutions: Sequence[int]) -> dict[int, ShardOutput]:
        """As `process`, for several resolutions; each image is decoded once."""
        ids = table["id"].to_pylist()
        checked = {ids[index] for index in spread(len(ids), self.config.check_rows)}
        shards = {resolution: _Shard(self, self.configs[resolution], checked) for resolution in resolutions}

        def prepare(row: Row) -> Fitted:
            return self._fit(row, resolutions)

        rows = prepare_ahead(
            iter_rows(table), prepare, num_ahead=self.config.batch_size, num_threads=self.config.prepare_threads
        )
        for row, ready in rows:
            source = {name: row[name] for name in ("id", "source_uri")}
            for resolution, shard in shards.items():
                shard.add(source, ready if isinstance(ready, RowRefused) else ready[resolution])
        return {resolution: shard.finish(ids) for resolution, shard in shards.items()}

    def _fit(self, row: Row, resolutions: Sequence[int]) -> Fitted:
        """The image cropped to each resolution's bucket. Raises RowRefused where it is refused altogether."""
        image = decode(row["image_bytes"])
        return {resolution: self._crop(image, self.configs[resolution]) for resolution in resolutions}

    def _crop(self, image: Image.Image, config: ExtractConfig) -> Cropped | RowRefused:
        bucket = nearest_bucket(image.height, image.width, self.buckets[config.resolution])
        scale = max(bucket[0] / image.height, bucket[1] / image.width)
        if config.max_upscale is not None and scale > config.max_upscale:
            detail = f"{image.width}x{image.height} must grow {scale:.2f} times to fill its bucket of {bucket[1]}x{bucket[0]}"
            return RowRefused("too_small_for_bucket", f"{detail}; max_upscale={config.max_upscale:g}")
        return Cropped(bucket, np.asarray(resize_and_crop(image, *bucket, resample=config.resample)))

    @torch.inference_mode()
    def encode(self, images: Sequence[Cropped]) -> list[torch.Tensor]:
        """Images of one bucket to latents (C, h, w), on the CPU and of the table's dtype."""
        pixels = torch.from_numpy(np.stack([image.pixels for image in images])).to(self.device)
        inputs = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.dtype)
        latents = self.autoencoder.encode(inputs, tile_size=self.config.tile_size)
        return list(latents.to("cpu", getattr(torch, self.config.dtype)).contiguous())

    @torch.inference_mode()
    def decode(self, latents: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Latents (C, h, w) of one bucket to images (height, width, 3), float32 of 0 to 255."""
        inputs = torch.stack(list(latents)).to(self.device, self.dtype)
        images = self.autoencoder.decode(inputs, tile_size=self.config.tile_size)
        return list((127.5 * (images.float().clamp(-1, 1) + 1)).permute(0, 2, 3, 1).cpu().numpy())


@dataclass
class _Shard:
    """A shard of one resolution that is being made."""

    encoder: LatentEncoder
    config: ExtractConfig
    checked: set[str]
    rows: dict[str, Row] = field(default_factory=dict)
    rejects: list[Row] = field(default_factory=list)
    waiting: dict[Bucket, list[tuple[Row, Cropped]]] = field(default_factory=dict)
    waiting_bytes: int = 0
    psnrs: list[float] = field(default_factory=list)
    num_not_finite: int = 0  # images that were decoded again to values that are not finite
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))  # of the latents: count, sum, sum of squares

    def add(self, row: Row, image: Cropped | RowRefused) -> None:
        if isinstance(image, RowRefused):
            self.rejects.append(reject(row, image))
            return
        batch = self.waiting.setdefault(image.bucket, [])
        batch.append((row, image))
        self.waiting_bytes += image.pixels.nbytes
        if len(batch) == self.config.batch_size:
            self._encode(image.bucket)
        elif self.waiting_bytes > MAX_WAITING_BYTES:
            self._encode(max(self.waiting, key=lambda bucket: len(self.waiting[bucket])))

    def finish(self, ids: Sequence[str]) -> ShardOutput:
        """The rows in the order of `ids`, which are those of the input."""
        for bucket in list(self.waiting):
            self._encode(bucket)
        place = {row_id: index for index, row_id in enumerate(ids)}
        self.rejects.sort(key=lambda row: place[row["id"]])
        figures = {"psnr": float(np.mean(self.psnrs)), "psnr_worst": min(self.psnrs)} if self.psnrs else {}
        if self.num_not_finite:
            figures["num_decoded_not_finite"] = self.num_not_finite
        if self.rows:
            count, total, squares = self.sums
            figures["latents_std"] = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
        return ShardOutput([self.rows[row_id] for row_id in ids if row_id in self.rows], self.rejects, figures)

    def _encode(self, bucket: Bucket) -> None:
        batch = self.waiting.pop(bucket)
        self.waiting_bytes -= sum(image.pixels.nbytes for _, image in batch)
        encoded = run_halving(self.encoder.encode, [image for _, image in batch])
        good: list[tuple[Cropped, torch.Tensor]] = []
        for (row, image), latents in zip(batch, encoded, strict=True):
            fault = latents if isinstance(latents, RowRefused) else find_fault(latents, self.config)
            if fault is not None:
                self.rejects.append(reject(row, fault))
                continue
            assert isinstance(latents, torch.Tensor)
            self.rows[row["id"]] = _latents_row(row, bucket, latents)
            values = latents.double()
            self.sums += [values.numel(), float(values.sum()), float(values.square().sum())]
            if row["id"] in self.checked:
                good.append((image, latents))
        if good:
            self._measure(good)

    def _measure(self, pairs: list[tuple[Cropped, torch.Tensor]]) -> None:
        """Measure the PSNR between images and their decoded latents."""
        decoded = run_halving(self.encoder.decode, [latents for _, latents in pairs])
        for (image, _), again in zip(pairs, decoded, strict=True):
            if not isinstance(again, RowRefused):
                if np.isfinite(again).all():
                    self.psnrs.append(psnr(image.pixels, again))
                else:
                    self.num_not_finite += 1


def find_fault(latents: torch.Tensor, config: ExtractConfig) -> RowRefused | None:
    """The refusal of latents with values that are not finite or too large; None if they are good."""
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        advice = "take float32 or bfloat16 for both" if "float16" in (config.dtype, config.compute_dtype) else "take float32"
        return RowRefused(
            "bad_latents",
            f"{bad} of {latents.numel()} values of the autoencoder's encoder are not finite, with "
            f"compute_dtype={config.compute_dtype}, dtype={config.dtype}: {advice}",
        )
    largest = float(latents.abs().max())
    if largest > config.max_latent:
        return RowRefused("bad_latents", f"the largest value is {largest:.4g}, max_latent={config.max_latent:g}")
    return None


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of two images of 0 to 255."""
    error = float(np.square(image.astype(np.float64) - other).mean())
    return 10 * math.log10(255**2 / max(error, SMALLEST_ERROR))


def _latents_row(row: Row, bucket: Bucket, latents: torch.Tensor) -> Row:
    channels, height, width = latents.shape
    return {
        "id": row["id"],
        "latents": latents.view(torch.uint8).numpy().tobytes(),
        "channels": channels,
        "height": height,
        "width": width,
        "bucket": name_bucket(bucket),
    }
