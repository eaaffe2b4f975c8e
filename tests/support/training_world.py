"""Make a small dataset and a tiny pipeline for tests of the training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch

from pipelines.tables.identity import Identity
from pipelines.tables.schema import LATENTS
from pipelines.tables.table import Table
from pipelines.train.stream.samples import MicroBatch
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.tiny_gemma import tiny_gemma

PATH = "latents/tiny-64"
COLORS = ("red", "green", "blue", "yellow")


def make_row(index: int, bucket: str = "64x64") -> dict[str, object]:
    """Make a row whose latents depend on its caption, with noise that depends on `index`."""
    height, width = (int(side) // 8 for side in bucket.split("x"))
    color = index % len(COLORS)
    noise = torch.randn(8, height, width, generator=torch.Generator().manual_seed(index))
    latents = 0.3 * noise + torch.eye(8)[color][:, None, None]
    return {
        "id": f"{index:064x}",
        "latents": latents.half().numpy().tobytes(),
        "channels": 8,
        "height": height,
        "width": width,
        "bucket": bucket,
        "captions": [
            {"captioner": "a", "caption": f"a {COLORS[color]} square", "clip_score": 30.0},
            {"captioner": "b", "caption": f"{COLORS[color]}", "clip_score": 29.0},
        ],
    }


def make_table(
    folder: Path,
    shards: Mapping[str, Sequence[dict[str, object]]],
    *,
    complete: bool = True,
    path: str = PATH,
    inputs: Mapping[str, str] | None = None,
) -> Table:
    """Write a latents table. `inputs`: path and fingerprint of the tables that it was made from."""
    table = Table(str(folder), path, LATENTS)
    manifest = table.claim(Identity("extract", {"dtype": "float16", "seed": 0}, {}, dict(inputs or {})))
    for name, rows in shards.items():
        table.write_shard(name, pa.Table.from_pylist(list(rows), LATENTS))
    table.write_manifest(replace(manifest, complete=complete, num_shards=len(shards)))
    return table


def make_shards(
    sizes: Sequence[int], buckets: Sequence[str] = ("64x64",), *, first: int = 0
) -> dict[str, list[dict[str, object]]]:
    """Make shards of `sizes` rows, beginning at row `first`; rows take `buckets` by turns."""
    starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
    return {
        f"{number:05d}": [make_row(index, buckets[index % len(buckets)]) for index in range(start, start + size)]
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }


def make_pipeline(folder: Path) -> str:
    """Save a pipeline of random tiny parts; return its path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = TextEncoderConfig(instruction="User Prompt: ", max_tokens=32)
        pipeline = TextToImage(
            SanaTransformer.from_preset("tiny"),
            DCAutoencoder.from_preset("tiny"),
            TextEncoder(*tiny_gemma(num_layers=2, tokenizer="word"), prompts),
            flow_shift=2.0,
        )
    pipeline.save_pretrained(folder)
    return str(folder)


def assert_same(batch: MicroBatch, other: MicroBatch) -> None:
    assert (batch.ids, batch.epochs, batch.captions, batch.bucket) == (other.ids, other.epochs, other.captions, other.bucket)
    assert torch.equal(batch.latents, other.latents)
