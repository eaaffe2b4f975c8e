"""Joins captions with images of any number, in a temporary database on this machine's disk.

Both sides are written one after the other, sorted by the hash of what they are called, and read in that order: nothing is
looked up at random. The database (SQLite) has no name: it is gone when this process ends, however that happens. It lies below
SQLITE_TMPDIR, TMPDIR, or else /var/tmp.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

from pipelines.caption.imports.files import CaptionFile
from pipelines.caption.imports.keys import PARTIAL_RANK, Form, image_forms, kind_of
from pipelines.caption.imports.rows import Entry, Fault
from pipelines.storage.files import NUM_THREADS
from pipelines.tables.schema import Row
from pipelines.tables.table import Table
from pipelines.tables.text import clean
from sana_model.files.redact import redact_uri

CACHE_KIB = 256 * 1024
BATCH = 10_000
EMPTY_RANK = 1000
"""Added to the rank of captions without a text: any other caption of the image goes before them."""
SHARD = 2**32
MAX_TOLD = 1000
"""Rows that are told of one by one, of each kind."""
SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
CREATE TABLE caption (number INTEGER PRIMARY KEY, file INTEGER, place INTEGER, key TEXT, caption TEXT, score REAL);
CREATE TABLE caption_form (form BLOB, rank INTEGER, number INTEGER);
CREATE TABLE image_form (form BLOB, image INTEGER);
CREATE TABLE named (form BLOB PRIMARY KEY, image INTEGER, last INTEGER) WITHOUT ROWID;
CREATE TABLE fit (number INTEGER PRIMARY KEY, rank INTEGER, image INTEGER, last INTEGER);
CREATE TABLE chosen (number INTEGER PRIMARY KEY, rank INTEGER, image INTEGER);
CREATE TABLE found (image INTEGER PRIMARY KEY, caption TEXT, score REAL);
"""
JOIN = f"""
INSERT INTO named SELECT form, min(image), max(image) FROM image_form GROUP BY form;
DROP TABLE image_form;
CREATE INDEX by_form ON caption_form (form, number, rank);
INSERT INTO fit SELECT number, min(rank), named.image, named.last
    FROM named CROSS JOIN caption_form INDEXED BY by_form ON caption_form.form = named.form GROUP BY number;
DROP TABLE caption_form;
INSERT INTO chosen SELECT number, rank, image FROM (
    SELECT number, rank, image,
        min(((rank >= {EMPTY_RANK}) << 60) + ((rank % {EMPTY_RANK} >= {PARTIAL_RANK}) << 50) + number)
    FROM fit WHERE image = last GROUP BY image
) ORDER BY number;
INSERT INTO found SELECT image, caption, score FROM chosen CROSS JOIN caption USING (number) ORDER BY image;
"""
REASONS = {
    "unmatched": "FROM caption LEFT JOIN fit USING (number) WHERE fit.number IS NULL AND caption IS NOT NULL",
    "ambiguous": "FROM fit JOIN caption USING (number) WHERE image < last AND caption IS NOT NULL",
    "repeated": "FROM fit JOIN caption USING (number) LEFT JOIN chosen USING (number) "
    "WHERE fit.image = last AND chosen.number IS NULL AND caption IS NOT NULL",
    "empty": "FROM caption WHERE caption IS NULL",
}
"""Why a caption does not arrive: no image has this name, several have it, an earlier caption did, or it has no text."""


@dataclass
class Counts:
    """What became of the captions of the files.

    Args:
        captions: with or without a text.
        matched: captions that arrived, by the kind of name by which they found their image.
        not_taken: all that did not arrive, by reason: those of REASONS, and those of faults.
        keys: captions with a text, by the column or key under which they stood.
        scores: captions that arrived with a CLIP score.
        largest_score: as found, without its sign.
    """

    captions: int = 0
    matched: dict[str, int] = field(default_factory=dict)
    not_taken: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    scores: int = 0
    largest_score: float = 0.0


class CaptionIndex:
    """The captions of files, joined with the images of a dataset. A context manager."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.wanted: set[tuple[str, int]] = set()
        self.files: list[CaptionFile] = []
        self.faults: list[tuple[CaptionFile, Fault]] = []
        self.database = sqlite3.connect("")
        self.database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.database.executescript(SCHEMA)

    def __enter__(self) -> "CaptionIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self.database.close()

    def add_captions(self, entries: Iterable[tuple[CaptionFile, Entry | Fault]]) -> Iterator[int]:
        """Write the captions, and yield how many there are from time to time."""
        source = iter(entries)
        while batch := list(islice(source, BATCH)):
            captions, forms = [], []
            for file, entry in batch:
                if isinstance(entry, Fault):
                    self._add_fault(file, entry)
                    continue
                if not self.files or self.files[-1] is not file:
                    self.files.append(file)
                self._count(entry)
                number = self.counts.captions
                captions.append((number, len(self.files) - 1, entry.place, clean(entry.key), entry.caption, entry.score))
                penalty = 0 if entry.caption else EMPTY_RANK
                forms += [(_hash(form), form.rank + penalty, number) for form in entry.forms]
                self.wanted.update((form.kind, form.num_parts) for form in entry.forms)
            self.database.executemany("INSERT INTO caption VALUES (?, ?, ?, ?, ?, ?)", captions)
            self.database.executemany("INSERT INTO caption_form VALUES (?, ?, ?)", forms)
            yield self.counts.captions

    def _count(self, entry: Entry) -> None:
        self.counts.captions += 1
        self.counts.keys.update([entry.caption_key] if entry.caption else [])
        if entry.others:
            self.counts.not_taken["others_of_a_list"] += entry.others
        if entry.score is not None:
            self.counts.largest_score = max(self.counts.largest_score, abs(entry.score))

    def _add_fault(self, file: CaptionFile, fault: Fault) -> None:
        self.counts.not_taken[fault.reason] += 1
        if self.counts.not_taken[fault.reason] <= MAX_TOLD:
            self.faults.append((file, fault))

    def add_images(self, images: Table, shards: list[str]) -> Iterator[int]:
        """Write what the images of shards answer to, and yield how many shards are done from time to time."""

        def read(shard: str) -> list[tuple[bytes, int]]:
            rows = images.read_shard(shard, ["id", "source_uri", "metadata"]).to_pylist()
            first = int(shard) * SHARD
            return [(_hash(form), first + place) for place, row in enumerate(rows) for form in image_forms(row, self.wanted)]

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for start in range(0, len(shards), NUM_THREADS):
                for forms in pool.map(read, shards[start : start + NUM_THREADS]):
                    self.database.executemany("INSERT INTO image_form VALUES (?, ?)", forms)
                yield min(start + NUM_THREADS, len(shards))

    def join(self) -> None:
        """Find the image of each caption, and count."""
        self.database.executescript(JOIN)
        matched: Counter[str] = Counter()
        by_rank = self.database.execute("SELECT rank, count(*) FROM chosen WHERE rank < ? GROUP BY rank", (EMPTY_RANK,))
        for rank, count in by_rank:
            matched[kind_of(rank)] += count
        self.counts.matched = dict(matched)
        for reason, rows in REASONS.items():
            if count := self._first(f"SELECT count(*) {rows}"):
                self.counts.not_taken[reason] = count
        self.counts.scores = self._first("SELECT count(score) FROM found WHERE caption IS NOT NULL")

    def _first(self, query: str) -> Any:
        return self.database.execute(query).fetchone()[0]

    def read_shard(self, shard: str) -> dict[int, tuple[str | None, float | None]]:
        """Caption (None: it has no text) and score, by the image's place in its shard; images without a caption are missing."""
        first = int(shard) * SHARD
        query = "SELECT image - ?, caption, score FROM found WHERE image BETWEEN ? AND ?"
        rows = self.database.execute(query, (first, first, first + SHARD - 1))
        return {place: (caption, score) for place, caption, score in rows}

    def tell(self) -> Iterator[Row]:
        """What did not arrive, row by row, at most MAX_TOLD of each reason."""
        for file, fault in self.faults:
            yield {"reason": fault.reason, "file": file.uri, "row": fault.place, "key": fault.key, "detail": fault.detail}
        for reason, rows in REASONS.items():
            query = f"SELECT file, place, key, caption {rows} ORDER BY number LIMIT {MAX_TOLD}"
            for number, place, key, caption in self.database.execute(query):
                yield {"reason": reason, "file": self.files[number].uri, "row": place, "key": key, "caption": caption}


def _hash(form: Form) -> bytes:
    text = redact_uri(form.text)  # as `images` has it
    return blake2b(f"{form.kind}\0{text}".encode(errors="surrogatepass"), digest_size=16).digest()
