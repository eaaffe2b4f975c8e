"""Make datasets of drawn scenes for the tests of captioning, and read the captions back."""

from io import BytesIO
from pathlib import Path

import pyarrow as pa
from PIL import Image

from pipelines.shapes.drawing import draw_row
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, Row, captions_path
from pipelines.tables.table import Table
from pipelines.workers.images import open_image, perceptual_hash, to_rgb

FIRST = 10_000_500
TOO_LONG = "word " * 300
BROKEN = b"no image at all"


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scene(number: int) -> bytes:
    return png(Image.fromarray(draw_row(FIRST + number)[1]))


def image_row(number: int, content: bytes, caption: str | None = None) -> Row:
    width, height, phash = 0, 0, "0" * 16
    if content != BROKEN:
        image = to_rgb(open_image(content))
        width, height, phash = *image.size, perceptual_hash(image)
    found = {"format": "PNG", "width": width, "height": height, "phash": phash, "metadata": None}
    return {"id": f"id{number:04}", "image_bytes": content, "caption": caption, "source_uri": f"photos/{number}.png", **found}


def write_images(folder: Path, rows: list[Row], rows_per_shard: int) -> str:
    """Write an images table; return the dataset's URI."""
    table = Table(str(folder), IMAGES_PATH, IMAGES)
    table.claim(Identity("ingest", {"source": "drawn"}, {}, {}))
    for shard, start in enumerate(range(0, len(rows), rows_per_shard)):
        table.write_shard(f"{shard:05}", pa.Table.from_pylist(rows[start : start + rows_per_shard], IMAGES))
    return str(folder)


def captions(dataset_uri: str, name: str) -> dict[str, list[Row]]:
    """Read the rows of each shard."""
    table = Table(dataset_uri, captions_path(name), CAPTIONS)
    return {shard: table.read_shard(shard).to_pylist() for shard in table.list_shards()}


def refused(dataset_uri: str, name: str) -> dict[str, str]:
    """Read the reject reason of each refused id."""
    table = Table(dataset_uri, captions_path(name), CAPTIONS).rejects()
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    return {row["id"]: row["reject_reason"] for row in rows}
