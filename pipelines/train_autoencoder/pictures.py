"""Fixed pictures of a training: read once, measured and shown with their reconstructions."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table, absolute_uri
from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.train_autoencoder.crops import center_square, fits
from pipelines.train_autoencoder.stream import COLUMNS, CropSource, find_sources, shorter_sides
from pipelines.workers.images import image_grid

SMALLEST_ERROR = 1e-10


def picture_sources(dataset_uri: str, config: TrainAutoencoderConfig) -> list[CropSource]:
    """The tables that the fixed pictures are taken from."""
    if config.validation.dataset_uri is None:
        return find_sources(dataset_uri, config.data)
    return [CropSource(Table(absolute_uri(config.validation.dataset_uri), IMAGES_PATH, IMAGES), 1)]


def read_pictures(dataset_uri: str, config: TrainAutoencoderConfig) -> list[np.ndarray]:
    """The fixed pictures, (size, size, 3) uint8 each, taken in turn from the tables: those that are held out, if any are.

    `validation.num_images` of them, or as many as there are.

    Raises MissingTableError if a table is missing, ValueError if no picture can be used.
    """
    sources = picture_sources(dataset_uri, config)
    readers = [_read(source, config) for source in sources]
    wanted = max(config.validation.num_images, config.validation.grid)
    pictures: list[np.ndarray] = []
    while readers and len(pictures) < wanted:
        for reader in list(readers):
            if (picture := next(reader, None)) is None:
                readers.remove(reader)
            elif len(pictures) < wanted:
                pictures.append(picture)
    if not pictures:
        raise _nothing_to_measure(sources, config)
    return pictures


def check_pictures(dataset_uri: str, config: TrainAutoencoderConfig) -> None:
    """Raise as `read_pictures`, without reading a picture: whether those that fit can be decoded is not known."""
    sources = picture_sources(dataset_uri, config)
    if not any(rows.num_rows for source in sources for rows in _shown(source, config, COLUMNS[:3])):
        raise _nothing_to_measure(sources, config)


def _nothing_to_measure(sources: Sequence[CropSource], config: TrainAutoencoderConfig) -> ValueError:
    names = ", ".join(source.table.uri for source in sources)
    advice = "give another validation.dataset_uri" if config.validation.dataset_uri else "raise data.held_out_share"
    return ValueError(
        f"{names} has no picture of {config.picture_size} pixels to measure on: {advice}, or lower validation.size"
    )


def _read(source: CropSource, config: TrainAutoencoderConfig) -> Iterator[np.ndarray]:
    for rows in _shown(source, config, COLUMNS):
        for image_bytes in rows["image_bytes"]:
            try:
                yield center_square(image_bytes.as_py(), config.picture_size)
            except RowRefused:
                continue


def _shown(source: CropSource, config: TrainAutoencoderConfig, columns: list[str]) -> Iterator[pa.Table]:
    """These columns (id, width and height among them) of each shard's pictures that are to be measured on and large enough."""
    share = config.data.held_out_share if config.validation.dataset_uri is None else 0.0
    size, upscale = config.picture_size, config.data.max_upscale
    source.table.require()
    for shard in source.table.list_shards():
        rows = source.table.read_shard(shard, columns)
        chosen = source.chosen(shard, rows["id"].to_pylist(), held_out_share=share, held_out=share > 0)
        large = (fits(shorter, size, largest=1.0, max_upscale=upscale) for shorter in shorter_sides(rows))
        yield rows.filter(pa.array([shown and fit for shown, fit in zip(chosen, large, strict=True)], pa.bool_()))


def to_crops(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures as crops (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_pixels(image: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1], clamped, as (B, H, W, 3) uint8."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def psnrs(decoded: Tensor, image: Tensor) -> Tensor:
    """The PSNR of each decoded image, clamped to [-1, 1], against the image, both (B, 3, H, W): (B,) in dB."""
    error = (decoded.float().clamp(-1, 1) - image).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(SMALLEST_ERROR))


def show(pictures: np.ndarray, *decoded: np.ndarray) -> Image.Image:
    """A grid: each picture, as it was decoded in one or several ways, and the difference to the last of them four times as
    strong (white: none), some pictures to a row. All are (B, H, W, 3) uint8.
    """
    error = np.abs(pictures.astype(np.int16) - decoded[-1].astype(np.int16))
    difference = (255 - np.minimum(4 * error, 255)).astype(np.uint8)
    columns = (pictures, *decoded, difference)
    cells = [Image.fromarray(one[index]) for index in range(len(pictures)) for one in columns]
    return image_grid(cells, len(columns) * max(1, math.ceil(math.sqrt(len(pictures) / len(columns)))))
