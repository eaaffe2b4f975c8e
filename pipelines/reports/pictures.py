"""Pictures on a page: thumbnails as data URIs, and the text shown where there is no picture."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
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
TINY = 128  # px; pictures up to this size are stored as PNG and shown enlarged
ALT_LENGTH = 120  # characters


@dataclass(frozen=True)
class Picture:
    """A picture on a page. `src` is a data URI; if it is empty, the page shows `alt`, which says why."""

    src: str
    alt: str
    width: int = 0
    height: int = 0

    @property
    def tiny(self) -> bool:
        """Whether the page shows it enlarged."""
        return max(self.width, self.height) <= TINY


def read_image_bytes(dataset_uri: str, wanted: Iterable[tuple[str, str]]) -> dict[str, bytes]:
    """Read the encoded images of (shard, id) pairs from the `images` table, by id. Images that are not there are left out."""
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


def with_pictures(dataset_uri: str, rows: list[tuple[str, Row]], texts: Callable[[Row], list[str | None]]) -> list[Row]:
    """Copies of (shard, row) pairs' rows with `picture`, the thumbnail of the row's image.

    Args:
        texts: the captions of a row; the first that is not empty becomes the picture's `alt`.
    """
    contents = read_image_bytes(dataset_uri, [(shard, row["id"]) for shard, row in rows])
    return [row | {"picture": image_thumbnail(contents, row["id"], alt_text(texts(row), row["id"]))} for _, row in rows]


def image_thumbnail(contents: Mapping[str, bytes], row_id: str, alt: str) -> Picture:
    """The thumbnail of an image that `read_image_bytes` read, or a note that `images` no longer has it."""
    return thumbnail(contents[row_id], alt) if row_id in contents else no_picture("not in images/ any more")


def no_picture(why: str) -> Picture:
    """A text in place of a picture."""
    return Picture("", why)


def alt_text(captions: Sequence[str | None], row_id: str) -> str:
    """An image's `alt`: its first caption, shortened to ALT_LENGTH characters, or its id if it has none."""
    text = next((caption for caption in captions if caption), None)
    if text is None:
        return f"image {row_id[:12]}"
    return text if len(text) <= ALT_LENGTH else text[: ALT_LENGTH - 1] + "…"


def thumbnail(content: bytes | Image.Image, alt: str, max_side: int = THUMBNAIL) -> Picture:
    """Shrink an image (encoded bytes, or a Pillow image) to at most `max_side` pixels a side.

    A truncated image is shown as far as it can be decoded; bytes that are no image give a text in place of the picture.
    """
    try:
        image = content.convert("RGB") if isinstance(content, Image.Image) else _decode_small(content, max_side)
    except RowRefused as error:
        return no_picture(error.reason.replace("_", " "))
    image.thumbnail((max_side, max_side))
    buffer = BytesIO()
    kind = "png" if max(image.size) <= TINY else "webp"
    image.save(buffer, kind, quality=80)  # PNG ignores the quality
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
