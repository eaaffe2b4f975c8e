"""Make a small images table and a tiny configuration for tests of an autoencoder's training."""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row
from pipelines.tables.table import Table
from pipelines.train.engine.config import EmaConfig, EngineConfig, OptimConfig
from pipelines.train_autoencoder.config import CropConfig, LossConfig, PictureConfig, ShapeConfig, TrainAutoencoderConfig
from tests.support.training_world import write_table

SHAPE = ShapeConfig(latent_channels=4, widths=(8, 16, 16, 32))
"""Of the tiny autoencoder: 8 pixels to a latent, 60,000 weights."""


def make_image_row(index: int, size: tuple[int, int] = (40, 40)) -> Row:
    """A row with a picture of a few colored waves. size: width, height."""
    chance = np.random.default_rng(index)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * chance.uniform(0.05, 0.4) + y * chance.uniform(0.05, 0.4) + chance.uniform(0, 6)) for _ in range(3)]
    pixels = (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return to_row(buffer.getvalue(), width, height)


def to_row(image_bytes: bytes, width: int, height: int) -> Row:
    """A row of `images`, whatever the bytes hold."""
    about = {"format": "PNG", "width": width, "height": height, "phash": "0" * 16, "caption": None, "source_uri": "x"}
    return {"id": hashlib.sha256(image_bytes).hexdigest(), "image_bytes": image_bytes, "metadata": None, **about}


def make_images(folder: Path, sizes: Sequence[int], shape: tuple[int, int] = (40, 40), *, first: int = 0) -> Table:
    """An images table with shards of so many rows."""
    rows = [make_image_row(first + index, shape) for index in range(sum(sizes))]
    return write_images(folder, [rows[sum(sizes[:index]) : sum(sizes[: index + 1])] for index in range(len(sizes))])


def write_images(folder: Path, shards: Sequence[Sequence[Row]]) -> Table:
    """An images table of these rows."""
    table = Table(str(folder), IMAGES_PATH, IMAGES)
    named = {f"{number:05d}": rows for number, rows in enumerate(shards)}
    ids = [row["id"] for rows in shards for row in rows]
    return write_table(table, Identity("ingest", {"ids": hashlib.sha256(repr(ids).encode()).hexdigest()}, {}, {}), named)


def tiny_training(**changes: Any) -> TrainAutoencoderConfig:
    """One worker, ten steps of four crops of 24 pixels in float32, each of which is reported."""
    settings: dict[str, Any] = {
        "preset": "tiny",
        "shape": SHAPE,
        "num_steps": 10,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "data": CropConfig(sizes=(24,), decode_processes=0, shuffle_shards=1),
        "losses": LossConfig(edges=0.5, latent_noise=0.1, latent_penalty=0.01),
        "engine": EngineConfig(zero_stage=1, dtype="fp32"),
        "optim": OptimConfig(lr=1e-3),
        "ema": EmaConfig(decay=0.9),
        "validation": PictureConfig(num_images=4, grid=2, every=5),
        "log_every": 1,
    }
    if "init" in changes:
        settings |= {"preset": None, "shape": ShapeConfig()}
    return TrainAutoencoderConfig(**settings | changes)
