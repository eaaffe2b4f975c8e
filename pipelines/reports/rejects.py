"""The part of a page about refused rows: counts by reason, and a few examples with their pictures."""

import os
import tarfile
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from pipelines.reports.pictures import Picture, no_picture, read_image_bytes, thumbnail
from pipelines.storage.files import is_local, open_file
from pipelines.tables.sampling import ReportScope, read_light, spread
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row
from pipelines.tables.table import Table

MAX_SOURCE_BYTES = 32 * 2**20  # read from a refused source file
EXCERPT_BYTES = 200  # shown of a file that is not a picture


@dataclass(frozen=True)
class Rejected:
    """A refused row and its picture. `excerpt` is the beginning of a file that is not a picture, if it may be shown."""

    id: str | None
    source_uri: str | None
    reason: str
    detail: str
    picture: Picture
    excerpt: str


@dataclass(frozen=True)
class Rejects:
    """Refused rows of a table: counts by reason, the largest first; how much was read; and examples."""

    counts: dict[str, int]
    scope: str
    samples: list[Rejected]


def read_rejects(table: Table, config: ReportScope) -> Rejects:
    """Count the rows that the stage that makes `table` refused, and read a few examples.

    Their pictures come from the `images` table, or else from the file that the row was read from. If a list named the files, no
    excerpt of a file that is not a picture is shown: a list may come from strangers and name any file of this host.
    """
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
        excerpt = "" if content is None or picture.src or is_listed else _excerpt(content)
        shown.append(Rejected(row["id"], row["source_uri"], row["reject_reason"], row["detail"], picture, excerpt))
    return Rejects(dict(counts.most_common()), light.scope, shown)


def _take_turns(rejects: pa.Table, limit: int) -> list[Row]:
    """At most `limit` rows, taken from the reasons in turn; the most frequent reason comes first."""
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


def _locate(rejects: Table, ids: set[str | None], config: ReportScope) -> list[tuple[str, str]]:
    """(shard, id) of the rejects with these ids, from the first `config.picture_shards` shards that hold any of them."""
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
    """The first MAX_SOURCE_BYTES of a file, or of a member of a local tar ("a.tar#name"); None if they cannot be read."""
    if not uri or uri.startswith(("http://", "https://")):  # a report requests nothing from a server
        return None
    archive, _, member = uri.partition("#")
    try:
        if is_local(uri) and not any(os.path.isfile(path) for path in (uri, archive)):
            return None  # nothing is there, or a named pipe, which would be waited for
        if not (member and archive.endswith(".tar")):
            with open_file(uri) as file:
                return file.read(MAX_SOURCE_BYTES)
        if "://" in archive:  # a remote tar would have to be read from its beginning
            return None
        with tarfile.open(archive) as tar:
            content = tar.extractfile(member)
            return content.read(MAX_SOURCE_BYTES) if content else None
    except Exception:  # gone, no file, no archive, a protocol that is not installed: whatever was why the row was refused
        return None


def _excerpt(content: bytes) -> str:
    """The first bytes of a file that is not a picture: as text if they are text, otherwise in hex."""
    head = content[:EXCERPT_BYTES]
    text = head.decode("utf-8", errors="ignore")
    if not head:
        return "(an empty file)"
    if all(character.isprintable() or character in "\r\n\t" for character in text) and len(text.encode()) > len(head) - 4:
        return text + ("…" if len(content) > len(head) else "")
    return head[:32].hex(" ") + (" …" if len(content) > 32 else "")
