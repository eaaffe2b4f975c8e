"""What a report shows of a table: light columns for its counts, and a few rows and rejects with their pictures.

Nothing here depends on how large the dataset is: of a large table a bounded number of shards, spread evenly, is read.
"""

import base64
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile

from pipelines.images import BadImageError, open_image, to_rgb
from pipelines.schema import IMAGES, IMAGES_PATH
from pipelines.stage import Row
from pipelines.tables import Manifest, Table

THUMBNAIL = 320  # px, longer side
TINY = 128  # px; pictures up to here are kept as PNG and shown enlarged
MAX_SOURCE_BYTES = 32 * 2**20
EXCERPT_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How much of a table a report reads and shows.

    Args:
        num_images: pictures on a page.
        num_rejects: refused rows on a page, taken from every reason in turn.
        max_shards: counts and histograms are over at most so many shards.
        picture_shards: shards that the pictures come from; these are read whole.
    """

    num_images: int = 24
    num_rejects: int = 24
    max_shards: int = 256
    picture_shards: int = 4


DEFAULT_SAMPLE = SampleConfig()


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


@dataclass(frozen=True)
class LightRows:
    """Some columns of (a part of) a table's shards."""

    rows: pa.Table
    num_shards: int
    total_shards: int

    @property
    def scope(self) -> str:
        """For people: what was read."""
        if self.num_shards == self.total_shards:
            return f"All {self.rows.num_rows:,} rows of {self.total_shards:,} shard{'s' * (self.total_shards != 1)} were read"
        return f"{self.rows.num_rows:,} rows were read: {self.num_shards:,} of {self.total_shards:,} shards, spread evenly"


@dataclass(frozen=True)
class Rejected:
    """A refused row, with its picture, or the first bytes of what is not a picture (unless a list named it)."""

    id: str | None
    source_uri: str | None
    reason: str
    detail: str
    picture: Picture
    excerpt: str


@dataclass(frozen=True)
class Rejects:
    """Counts by reason, the largest first, and examples."""

    counts: dict[str, int]
    scope: str
    samples: list[Rejected]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spaced."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(count, limit)).round()}) if count and limit else []


def read_light(table: Table, columns: list[str], config: SampleConfig) -> LightRows:
    """Columns of all shards, or of `config.max_shards` of them."""
    shards = table.list_shards()
    chosen = [shards[index] for index in spread(len(shards), config.max_shards)]
    empty = pa.Table.from_pylist([], table.schema).select(columns)
    parts = [table.read_shard(shard, columns).cast(empty.schema) for shard in chosen]
    return LightRows(pa.concat_tables([empty, *parts]), len(chosen), len(shards))


def sample_rows(table: Table, config: SampleConfig) -> list[tuple[str, Row]]:
    """`config.num_images` rows with their shards, evenly from `config.picture_shards` shards."""
    shards = table.list_shards()
    chosen = [shards[index] for index in spread(len(shards), config.picture_shards)]
    rows: list[tuple[str, Row]] = []
    for index, shard in enumerate(chosen):
        content = table.read_shard(shard)
        share = -(-(config.num_images - len(rows)) // (len(chosen) - index))
        rows += [(shard, row) for row in content.take(pa.array(spread(content.num_rows, share), pa.int64())).to_pylist()]
    return rows


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


def read_rejects(table: Table, config: SampleConfig) -> Rejects:
    """What the stage that makes `table` refused. Pictures come from `images`, or else from where the row came from."""
    rejects = table.rejects()
    light = read_light(rejects, rejects.schema.names, config)
    counts = Counter(light.rows["reject_reason"].to_pylist())
    samples = _take_turns(light.rows, config.num_rejects)
    known: dict[str, bytes] = {}
    if table.path != IMAGES_PATH:
        known = read_image_bytes(table.dataset_uri, _locate(rejects, {row["id"] for row in samples}, config))
    manifest = Table(table.dataset_uri, IMAGES_PATH, IMAGES).read_manifest()
    is_listed = manifest is not None and manifest.config.get("source_kind") == "list"
    shown = []
    for row in samples:
        content = known.get(row["id"])
        content = _read_source(row["source_uri"]) if content is None else content
        picture = (
            no_picture("bytes not at hand") if content is None else thumbnail(content, f"rejected: {row['reject_reason']}")
        )
        # A list may come from strangers and name any file of this host: of what is no picture nothing is shown.
        excerpt = "" if content is None or picture.src or is_listed else _excerpt(content)
        shown.append(Rejected(row["id"], row["source_uri"], row["reject_reason"], row["detail"], picture, excerpt))
    return Rejects(dict(counts.most_common()), light.scope, shown)


def _take_turns(rejects: pa.Table, limit: int) -> list[Row]:
    """At most `limit` rows, from every reason in turn, ordered by reason."""
    reasons = rejects["reject_reason"].to_pylist()
    seen: Counter[str] = Counter()
    turns = []
    for index, reason in enumerate(reasons):
        turns.append((seen[reason], index))
        seen[reason] += 1
    chosen = sorted(
        (index for _, index in sorted(turns)[:limit]), key=lambda index: (-seen[reasons[index]], reasons[index], index)
    )
    return rejects.take(pa.array(chosen, pa.int64())).to_pylist()


def _locate(rejects: Table, ids: set[str | None], config: SampleConfig) -> list[tuple[str, str]]:
    """(shard, id) of those rejects that lie in the first `config.picture_shards` shards that have any."""
    found: list[tuple[str, str]] = []
    shards = rejects.list_shards()
    with_any = 0
    for shard in (shards[index] for index in spread(len(shards), config.max_shards)):
        here = [(shard, row_id) for row_id in rejects.read_shard(shard, ["id"])["id"].to_pylist() if row_id and row_id in ids]
        found += here
        with_any += bool(here)
        if with_any == config.picture_shards:
            break
    return found


def _read_source(uri: str | None) -> bytes | None:
    """The first MAX_SOURCE_BYTES of a file, or of a member of a local tar ("a.tar#name"); None where they cannot be had."""
    if not uri or uri.startswith(("http://", "https://")):  # no server is asked again for a report
        return None
    archive, _, member = uri.partition("#")
    if member and archive.endswith(".tar"):
        if "://" in archive:  # a remote one would have to be read through
            return None
        uri = f"tar://{member}::{archive}"
    try:
        with fsspec.open(uri) as file:
            return file.read(MAX_SOURCE_BYTES)
    except (OSError, ValueError, ImportError, tarfile.TarError):  # gone, not a file, or of a protocol that is not installed
        return None


def _excerpt(content: bytes) -> str:
    """The first bytes of what is not a picture: as text if it is text, or else in hex."""
    head = content[:EXCERPT_BYTES]
    text = head.decode("utf-8", errors="ignore")
    if not head:
        return "(an empty file)"
    if all(character.isprintable() or character in "\r\n\t" for character in text) and len(text.encode()) > len(head) - 4:
        return text + ("…" if len(content) > len(head) else "")
    return head[:32].hex(" ") + (" …" if len(content) > 32 else "")


def no_picture(why: str) -> Picture:
    return Picture("", why)


def thumbnail(content: bytes | Image.Image, alt: str, max_side: int = THUMBNAIL) -> Picture:
    """An image made small; of a truncated one what there is of it."""
    try:
        image = content.convert("RGB") if isinstance(content, Image.Image) else _decode_small(content, max_side)
    except BadImageError as error:
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
    except BadImageError as error:
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


def page_head(
    table: Table,
    manifest: Manifest,
    *,
    title: str,
    about: str,
    facts: Mapping[str, object],
    kind: str = "",
    notice: str = "",
    origin: Mapping[str, object] | None = None,
) -> Row:
    """What every page begins with, and `origin`, the configuration, that it ends with."""
    made = {"Fingerprint": manifest.fingerprint[:12], "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    return {
        "kind": kind or table.path,
        "title": title,
        "about": about,
        "dataset_uri": table.dataset_uri,
        "facts": {**facts, **made},
        "notice": notice,
        "origin": json.dumps(origin, indent=2, ensure_ascii=False, default=str) if origin else "",
    }


def with_pictures(dataset_uri: str, rows: list[tuple[str, Row]], texts: Callable[[Row], list[str | None]]) -> list[Row]:
    contents = read_image_bytes(dataset_uri, [(shard, row["id"]) for shard, row in rows])
    shown = []
    for _, row in rows:
        content = contents.get(row["id"])
        alt = alt_text(texts(row), row["id"])
        picture = no_picture("not in images/ any more") if content is None else thumbnail(content, alt)
        shown.append(row | {"picture": picture})
    return shown
