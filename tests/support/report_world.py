"""Make a dataset of drawn scenes with all that report pages must cope with: hostile captions, long ones, rejects."""

import hashlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import sample_caption
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, IMAGES, LATENTS, SCORES, Row, scores_path
from pipelines.tables.table import Table

LONG = "a very long caption " * 250
HOSTILE = '<script>alert("1")</script> & "quotes"'
CAPTIONERS = ("idefics", "llava")


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def image_row(index: int) -> Row:
    scene, pixels = draw_row(index)
    image = Image.fromarray(pixels)
    kind = "PNG"
    if index % 5 == 4:  # some that are larger and not square
        kind, image = "JPEG", image.resize((200 + 60 * index % 400, 300))
    content = encode(image, kind)
    caption = sample_caption(scene, np.random.default_rng(index)) if index % 2 else None
    return {
        "id": hashlib.sha256(content).hexdigest(),
        "image_bytes": content,
        "format": kind,
        "width": image.width,
        "height": image.height,
        "phash": "0" * 16,
        "caption": HOSTILE if index == 1 else caption,
        "source_uri": f"/photos/{index}.{kind.lower()}",
        "metadata": None,
    }


def text_of(captioner: str, index: int) -> str:
    if captioner == "llava" and index < 3:
        return (LONG, HOSTILE, "")[index]
    if captioner == "idefics" and index % 4 == 0:
        return "a photo of a thing"
    return sample_caption(draw_row(index)[0], np.random.default_rng([index, len(captioner)]))


def competing(index: int, row: Row) -> list[Row]:
    """The captions that compete for an image, with their scores; an empty one does not."""
    rng = np.random.default_rng([index, 7])
    texts = {"original": row["caption"]} if row["caption"] else {}
    texts |= {captioner: text for captioner in CAPTIONERS if (text := text_of(captioner, index))}
    base = {"original": 24, "llava": 26, "idefics": 20}
    return [
        {"captioner": name, "caption": text, "clip_score": float(np.float32(base[name] + rng.normal(0, 3)))}
        for name, text in texts.items()
    ]


def latents_row(index: int, row: Row) -> Row:
    latents = np.random.default_rng(index).normal(np.arange(4)[:, None, None] / 4, 1, (4, 8, 8)).astype(np.float16)
    shape = {"channels": 4, "height": 8, "width": 8, "bucket": "64x64" if index % 3 else "64x128"}
    return {"id": row["id"], "latents": latents.tobytes(), **shape}


def make_table(
    uri: str, path: str, schema: pa.Schema, shards: list[list[Row]], rejects: list[Row] | None = None, **config: object
) -> Table:
    table = Table(uri, path, schema)
    table.claim(Identity("test", {"name": path, **config}, {}, {}))
    for index, rows in enumerate(shards):
        refused = Table.rejects(table)
        refused.write_shard(f"{index:05d}", pa.Table.from_pylist((rejects or []) if index == 0 else [], refused.schema))
        table.write_shard(f"{index:05d}", pa.Table.from_pylist(rows, schema))
    table.write_manifest(
        replace(table.require(), complete=True, num_rows=sum(map(len, shards)), num_rejects=len(rejects or []))
    )
    return table


def make_dataset(folder: Path, num_shards: int = 3, shard_rows: int = 10) -> str:
    """Make images, captions, scores and latents of the Shapes world, with rejects of several kinds."""
    uri = str(folder / "dataset")
    (folder / "notes.jpg").write_text("Dear diary, <b>this is</b> not a picture.\n")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    (folder / "cut.jpg").write_bytes(encode(noise, "JPEG")[:20000])
    (folder / "zeros.png").write_bytes(bytes(100))
    refused = [
        reject({"source_uri": str(folder / "notes.jpg")}, RowRefused("not_an_image", "41 bytes")),
        reject({"source_uri": str(folder / "cut.jpg")}, RowRefused("truncated", "image file is truncated")),
        reject({"source_uri": str(folder / "zeros.png")}, RowRefused("not_an_image", "100 bytes")),
        reject({"source_uri": "s3-gone://bucket/x.jpg"}, RowRefused("unreadable", "no such file")),
    ]
    count = num_shards * shard_rows
    images = [image_row(index) for index in range(count)]

    def cut(rows: list[Row]) -> list[list[Row]]:
        return [rows[start : start + shard_rows] for start in range(0, count, shard_rows)]

    make_table(uri, "images", IMAGES, cut(images), refused)
    for captioner in CAPTIONERS:
        rows = [
            {
                "id": row["id"],
                "caption": text,
                "num_tokens": len(text.split()),
                "finish_reason": "length" if text == LONG else "stop",
                "flags": ["cut_off", "repetition"] if text == LONG else [],
            }
            for index, row in enumerate(images)
            for text in [text_of(captioner, index)]
        ]
        refused = reject(images[0], RowRefused("empty_caption", "it said nothing"))
        make_table(uri, f"captions/{captioner}", CAPTIONS, cut(rows), [refused])
    for captioner in ("original", *CAPTIONERS):
        shards = [
            [
                {"id": row["id"], "clip_score": entry["clip_score"]}
                for index, row in enumerate(images)
                for entry in competing(index, row)
                if entry["captioner"] == captioner and index // shard_rows == shard
            ]
            for shard in range(num_shards)
        ]
        make_table(uri, scores_path("clip", captioner), SCORES, shards)
    latents = [latents_row(index, row) for index, row in enumerate(images)]
    make_table(uri, "latents/tiny-64", LATENTS, cut(latents), dtype="float16")
    return uri
