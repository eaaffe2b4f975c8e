"""Pictures of a page: thumbnails as data URIs, and what stands in their place where there are none."""

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile

from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import (
    IMAGES,
    IMAGES_PATH,
    Row,
)
from pipelines.tables.table import Table
from pipelines.workers.images import open_image, to_rgb

THUMBNAIL = 320  # px, longer side
TINY = 128  # px; pictures up to here are kept as PNG and shown enlarged


@dataclass(frozen=True)
class Picture:
    """An image within the page: `src` is a data URI, or empty where `alt` says why there is none."""

    src: str
    alt: str
    width: int = 0
    height: int = 0

    @property
    def tiny(self) -> bool:
        return max(self.width, self.height) <= TINY


def read_image_bytes(dataset_uri: str, wanted: Iterable[tuple[str, str]]) -> dict[str, bytes]:
    """Bytes by id, from the `images` table, of (shard, id) pairs. What is not there is left out."""
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    by_shard: dict[str, list[str]] = {}
    for shard, row_id in wanted:
        by_shard.setdefault(shard, []).append(row_id)
    found: dict[str, bytes] = {}
    for shard in sorted(by_shard.keys() & set(images.list_shards())):
        content = images.read_shard(shard, ["id", "image_bytes"])
        content = content.filter(pc.is_in(content["id"], pa.array(by_shard[shard])))
        found |= dict(zip(content["id"].to_pylist(), content["image_bytes"].to_pylist(), strict=True))
    return found


def no_picture(why: str) -> Picture:
    return Picture("", why)


def thumbnail(content: bytes | Image.Image, alt: str, max_side: int = THUMBNAIL) -> Picture:
    """An image made small; of a truncated one what there is of it."""
    try:
        image = content.convert("RGB") if isinstance(content, Image.Image) else _decode_small(content, max_side)
    except RowRefused as error:
        return no_picture(error.reason.replace("_", " "))
    image.thumbnail((max_side, max_side))
    buffer = BytesIO()
    kind = "png" if max(image.size) <= TINY else "webp"
    image.save(buffer, kind, quality=80)  # PNG takes no notice of it
    src = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(src, alt, image.width, image.height)


def _decode_small(content: bytes, max_side: int) -> Image.Image:
    image = open_image(content)
    image.draft(None, (max_side, max_side))  # a JPEG is decoded at a fraction of its size
    try:
        return to_rgb(image)
    except RowRefused as error:
        if error.reason != "truncated" or not isinstance(image, ImageFile.ImageFile):
            raise
        image.tile = []  # Pillow has kept what it decoded before the file ended
        return to_rgb(image)


def alt_text(captions: Sequence[str | None], row_id: str) -> str:
    """What an image's `alt` says: its first caption, cut, or its id."""
    text = next((caption for caption in captions if caption), None)
    if text is None:
        return f"image {row_id[:12]}"
    return text if len(text) <= 120 else text[:119] + "…"


def with_pictures(dataset_uri: str, rows: list[tuple[str, Row]], texts: Callable[[Row], list[str | None]]) -> list[Row]:
    contents = read_image_bytes(dataset_uri, [(shard, row["id"]) for shard, row in rows])
    shown = []
    for _, row in rows:
        content = contents.get(row["id"])
        alt = alt_text(texts(row), row["id"])
        picture = no_picture("not in images/ any more") if content is None else thumbnail(content, alt)
        shown.append(row | {"picture": picture})
    return shown
