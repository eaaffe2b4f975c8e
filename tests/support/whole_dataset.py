"""Make a small finished dataset without any model: two shards of images, two captioners, scores, latents, and rejects."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO

import pyarrow as pa
from PIL import Image

from pipelines.ingest.run import image_id
from pipelines.tables.identity import Identity, Manifest
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, LATENTS, SCORES, Row
from pipelines.tables.table import Table

SHARDS = ("00000", "00001")
CAPTIONERS = ("a", "b")
ROWS_PER_SHARD = 20


def make_dataset(uri: str) -> dict[str, Table]:
    """Return the tables by path. Each image shard has one reject; captioner b, scores and latents reject one more of 00001."""
    tables = {}

    def put(path: str, schema: pa.Schema, identity: Identity, shards: Mapping[str, tuple[list[Row], list[Row]]]) -> Manifest:
        table = tables[path] = Table(uri, path, schema)
        return write_table(table, identity, shards)

    kept = {shard: [image_row(f"{shard}-{number}") for number in range(ROWS_PER_SHARD)] for shard in SHARDS}
    bad = {shard: [reject({"source_uri": f"{shard}/broken.png"}, RowRefused("truncated", "it ends early"))] for shard in SHARDS}
    shards = {shard: (kept[shard], bad[shard]) for shard in SHARDS}
    images = put(IMAGES_PATH, IMAGES, Identity("ingest", {"source": "photos"}, {}, {}), shards)
    inputs = {IMAGES_PATH: images.fingerprint}
    for captioner in CAPTIONERS:
        settings = {"prompt": "Describe.", "model": "vlm"}
        identity = Identity("caption", settings, {captioner: f"sha256:{captioner}"}, {IMAGES_PATH: images.fingerprint})
        captions = _refuse_first(kept, "empty_caption", "00001" if captioner == "b" else None, caption_row)
        inputs[f"captions/{captioner}"] = put(f"captions/{captioner}", CAPTIONS, identity, captions).fingerprint
    scored = _refuse_first(kept, "no_caption", "00001", score_row)
    identity = Identity("score", {"captioners": list(CAPTIONERS)}, {"clip": "sha256:clip"}, inputs)
    scores = put("scores/clip", SCORES, identity, scored)
    inputs = {IMAGES_PATH: images.fingerprint, "scores/clip": scores.fingerprint}
    latents = _refuse_first({shard: rows for shard, (rows, _) in scored.items()}, "low_score", "00001", latents_row)
    put("latents/ae-64", LATENTS, Identity("extract", {"dtype": "float16"}, {"ae": "sha256:ae"}, inputs), latents)
    return tables


def write_table(table: Table, identity: Identity, shards: Mapping[str, tuple[list[Row], list[Row]]]) -> Manifest:
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


def image_row(name: str) -> Row:
    digest = hashlib.sha256(name.encode()).digest()
    buffer = BytesIO()
    Image.frombytes("RGB", (4, 2), digest[:24]).save(buffer, "PNG")
    content = buffer.getvalue()
    facts = {"format": "PNG", "width": 4, "height": 2, "phash": digest[:8].hex(), "caption": None, "metadata": None}
    return {"id": image_id(content), "image_bytes": content, "source_uri": f"photos/{name}.png", **facts}


def caption_row(row: Row) -> Row:
    return {"id": row["id"], "caption": f"it is {row['id'][:6]}", "num_tokens": 3, "finish_reason": "stop"}


def score_row(row: Row) -> Row:
    score = 20 + int(row["id"][:2], 16) / 25.6  # 20 to 30
    return {
        "id": row["id"],
        "captions": [
            {"captioner": captioner, "caption": f"it is {row['id'][:6]}", "clip_score": score + bonus}
            for captioner, bonus in zip(CAPTIONERS, (0.0, 5.0), strict=True)
        ],
    }


def latents_row(row: Row) -> Row:
    shape = {"latents": b"\0" * 16, "channels": 2, "height": 2, "width": 2, "bucket": "64x64"}
    return {"id": row["id"], **shape, "captions": row["captions"]}


def _refuse_first(
    shards: Mapping[str, list[Row]], reason: str, where: str | None, make: Callable[[Row], Row]
) -> dict[str, tuple[list[Row], list[Row]]]:
    """Apply `make` to the rows, and refuse the first row of the shard `where`."""
    made = {}
    for shard, rows in shards.items():
        refused = rows[: int(shard == where)]
        made[shard] = ([make(row) for row in rows[len(refused) :]], [reject(row, RowRefused(reason, "")) for row in refused])
    return made
