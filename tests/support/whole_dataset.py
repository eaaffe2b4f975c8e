"""Make a small finished dataset without any model: two shards of images, a CLIP, two captioners, latents, and rejects."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import pyarrow as pa
from PIL import Image

from pipelines.ingest.run import image_id
from pipelines.tables.hashed_json import from_hashed_json
from pipelines.tables.identity import MANIFEST, Identity, Manifest
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, LATENTS, SCORES, Row, image_embeds_schema
from pipelines.tables.table import Table

SHARDS = ("00000", "00001")
CAPTIONERS = ("a", "b")
ROWS_PER_SHARD = 20
WIDTH = 4  # of the images' embeddings
Shards = Mapping[str, tuple[list[Row], list[Row]]]
"""Rows and rejects, by shard."""


def make_dataset(uri: str) -> dict[str, Table]:
    """Return the tables by path.

    Each shard of images has a reject. Of shard 00001 the CLIP refuses the last image, whose captions thus have no score, and
    the captioner b and the autoencoder refuse the first image.
    """
    tables = {}

    def put(path: str, schema: pa.Schema, identity: Identity, shards: Shards) -> dict[str, str]:
        tables[path] = Table(uri, path, schema)
        return {path: write_table(tables[path], identity, shards).fingerprint}

    kept = {shard: [image_row(f"{shard}-{number}") for number in range(ROWS_PER_SHARD)] for shard in SHARDS}
    bad = {shard: [reject({"source_uri": f"{shard}/broken.png"}, RowRefused("truncated", "it ends early"))] for shard in SHARDS}
    shards = {shard: (kept[shard], bad[shard]) for shard in SHARDS}
    images = put(IMAGES_PATH, IMAGES, Identity("ingest", {"source": "photos"}, {}, {}), shards)
    first, last = (kept["00001"][index]["id"] for index in (0, -1))
    clip = {"clip": "sha256:clip"}
    identity = Identity("embed_images", {"width": WIDTH}, clip, images)
    embeds = put("image_embeds/clip", image_embeds_schema(WIDTH), identity, _refuse(kept, "corrupt", last, embeds_row))
    for captioner in CAPTIONERS:
        settings = {"prompt": "Describe.", "model": "vlm"}
        said = _refuse(kept, "empty_caption", first if captioner == "b" else "", caption_row)
        identity = Identity("caption", settings, {captioner: f"sha256:{captioner}"}, images)
        captions = put(f"captions/{captioner}", CAPTIONS, identity, said)
        scored = _refuse({shard: rows for shard, (rows, _) in said.items()}, "no_embedding", last, SCORE_ROWS[captioner])
        identity = Identity("score", {"long_captions": "cut"}, clip, embeds | captions, rows_of=f"captions/{captioner}")
        put(f"scores/clip/{captioner}", SCORES, identity, scored)
    identity = Identity("extract", {"dtype": "float16"}, {"ae": "sha256:ae"}, images)
    put("latents/ae-64", LATENTS, identity, _refuse(kept, "bad_latents", first, latents_row))
    return tables


def write_table(table: Table, identity: Identity, shards: Shards) -> Manifest:
    """Write shards of (rows, rejects), and the manifest of a finished stage."""
    manifest = table.claim(identity)
    reasons: dict[str, int] = {}
    for shard, (rows, rejects) in shards.items():
        schema = table.rejects().schema
        table.rejects().write_shard(shard, pa.Table.from_pylist(rejects, schema), fingerprint=identity.fingerprint)
        table.write_shard(shard, pa.Table.from_pylist(rows, table.schema), fingerprint=identity.fingerprint)
        for row in rejects:
            reasons[row["reject_reason"]] = reasons.get(row["reject_reason"], 0) + 1
    num_rows, num_rejects = sum(len(rows) for rows, _ in shards.values()), sum(reasons.values())
    counted = replace(
        manifest, complete=True, num_shards=len(shards), num_rows=num_rows, num_rejects=num_rejects, rejects_by_reason=reasons
    )
    table.write_manifest(counted)
    return counted


def edit_manifest(table: Table, **changes: object) -> None:
    """Change fields of a local table's manifest, and write it as earlier versions did, without checksums."""
    path = Path(table.uri, MANIFEST)
    path.write_text(json.dumps(from_hashed_json(path.read_bytes()) | changes))


def image_row(name: str) -> Row:
    digest = hashlib.sha256(name.encode()).digest()
    buffer = BytesIO()
    Image.frombytes("RGB", (4, 2), digest[:24]).save(buffer, "PNG")
    content = buffer.getvalue()
    facts = {"format": "PNG", "width": 4, "height": 2, "phash": digest[:8].hex(), "caption": None, "metadata": None}
    return {"id": image_id(content), "image_bytes": content, "source_uri": f"photos/{name}.png", **facts}


def caption_row(row: Row) -> Row:
    return {"id": row["id"], "caption": f"it is {row['id'][:6]}", "num_tokens": 3, "finish_reason": "stop"}


def embeds_row(row: Row) -> Row:
    return {"id": row["id"], "embedding": [1.0, *[0.0] * (WIDTH - 1)]}


def score_row(bonus: float, row: Row) -> Row:
    """A score of 20 to 30 by the image's id, and the captioner's bonus."""
    return {"id": row["id"], "clip_score": 20 + int(row["id"][:2], 16) / 25.6 + bonus}


SCORE_ROWS = {captioner: partial(score_row, bonus) for captioner, bonus in zip(CAPTIONERS, (0.0, 5.0), strict=True)}


def latents_row(row: Row) -> Row:
    return {"id": row["id"], "latents": b"\0" * 16, "channels": 2, "height": 2, "width": 2, "bucket": "64x64"}


def _refuse(shards: Mapping[str, list[Row]], reason: str, row_id: str, make: Callable[[Row], Row]) -> Shards:
    """Apply `make` to all rows but the one with `row_id`, which becomes a reject."""
    return {
        shard: (
            [make(row) for row in rows if row["id"] != row_id],
            [reject(row, RowRefused(reason, "")) for row in rows if row["id"] == row_id],
        )
        for shard, rows in shards.items()
    }
