"""Make a small dataset and a tiny pipeline for tests of the training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch

from pipelines.score.candidates import Candidates
from pipelines.tables.captions import captions_table
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, LATENTS, SCORES, Row, captions_path, scores_path
from pipelines.tables.table import Table
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import Source
from pipelines.train.stream.samples import MicroBatch
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.tiny_gemma import tiny_gemma

PATH = "latents/tiny-64"
COLORS = ("red", "green", "blue", "yellow")
CLIP = "clip"
STREAM = StreamConfig(captioners=("a", "b"), clip=CLIP)

Captions = Mapping[str, Mapping[str, tuple[str, float | None]]]
"""The captions of a captioner: shard -> id -> (caption, score). A caption whose score is None has no row among the scores."""


def make_row(index: int, bucket: str = "64x64") -> Row:
    """Make a row whose latents depend on its captions, with noise that depends on `index`.

    "captions" are those of each captioner, which `make_table` writes into tables of their own.
    """
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
    folder: Path | str,
    shards: Mapping[str, Sequence[Row]],
    *,
    complete: bool = True,
    path: str = PATH,
    inputs: Mapping[str, str] | None = None,
) -> Table:
    """Write a latents table, and the captions and scores of its rows. Returns the latents table.

    Args:
        shards: rows as `make_row` makes them, by shard.
        complete: whether the stage that makes the latents has finished.
        inputs: path and fingerprint of the tables that the latents were made from.
    """
    for captioner in STREAM.captioners:
        add_captioner(folder, captioner, {name: _captions_of(rows, captioner) for name, rows in shards.items()})
    identity = Identity("extract", {"dtype": "float16", "seed": 0}, {}, dict(inputs or {}))
    return write_table(Table(str(folder), path, LATENTS), identity, shards, complete=complete)


def _captions_of(rows: Sequence[Row], captioner: str) -> dict[str, tuple[str, float | None]]:
    entries = ((row["id"], entry) for row in rows for entry in row["captions"])
    return {row_id: (entry["caption"], entry["clip_score"]) for row_id, entry in entries if entry["captioner"] == captioner}


def add_captioner(folder: Path | str, captioner: str, shards: Captions) -> None:
    """Write the captions of a captioner, and their scores. Rows are in the order of `shards`."""
    fixed = {"num_tokens": 4, "finish_reason": "stop", "flags": []}
    captions = {
        name: [{"id": row_id, "caption": caption, **fixed} for row_id, (caption, _) in entries.items()]
        for name, entries in shards.items()
    }
    path = captions_path(captioner)
    write_table(Table(str(folder), path, CAPTIONS), Identity("caption", {"name": captioner}, {}, {}), captions)
    add_scores(folder, captioner, shards)


def add_scores(folder: Path | str, captioner: str, shards: Captions) -> None:
    """Write the scores of a captioner's captions, whose table is there already."""
    scores = {
        name: [{"id": row_id, "clip_score": score} for row_id, (_, score) in entries.items() if score is not None]
        for name, entries in shards.items()
    }
    captions = captions_table(str(folder), captioner)
    inputs = {captions.path: captions.require().fingerprint}
    table = Table(str(folder), scores_path(CLIP, captioner), SCORES)
    write_table(table, Identity("score", {}, {}, inputs, rows_of=captions.path), scores)


def write_table(table: Table, identity: Identity, shards: Mapping[str, Sequence[Row]], *, complete: bool = True) -> Table:
    """Write these shards of a table, over those that are there, and its manifest. Returns the table."""
    manifest = table.claim(identity)
    for name, rows in shards.items():
        table.write_shard(name, pa.Table.from_pylist(list(rows), table.schema))
    table.write_manifest(replace(manifest, complete=complete, num_shards=len(shards)))
    return table


def make_source(
    table: Table, weight: float = 1.0, *, captioners: tuple[str, ...] = STREAM.captioners, clip: str | None = CLIP
) -> Source:
    """A source of the latents table, drawn with the captions of these captioners."""
    return Source(table, Candidates(table.dataset_uri, captioners, clip), weight)


def make_shards(sizes: Sequence[int], buckets: Sequence[str] = ("64x64",), *, first: int = 0) -> dict[str, list[Row]]:
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
    assert batch.dropped == other.dropped
    assert torch.equal(batch.latents, other.latents)
