"""The import stage: captions that others made -> `captions/<name>`, and their CLIP scores -> `scores/<clip>/<name>`.

It runs in this process alone, and needs no Ray. Captions are matched with the images that are there; where images are added
later, another run makes the new shards, and does not go back to the old ones. What does not arrive is in two files beside the
captions: `_import.json` counts it, and `_not_imported.jsonl` names the first rows of each kind.

The files are read twice: for the hash of their contents, which is part of the table's identity, and for the captions, if a
shard is missing. Memory holds 256 MiB of the index, as much again to sort it, some thousand rows or a few hundred JSON files,
and one name for each file. The index on disk takes twice the texts, and 100 bytes for each caption and each image. Measured for
a million captions of 60 words in random order: 150 s on a busy core, 0.85 GB of memory, 0.76 GB of disk.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from pipelines.caption.imports.config import ImportConfig
from pipelines.caption.imports.files import find_captions
from pipelines.caption.imports.index import CaptionIndex
from pipelines.caption.imports.rows import EntryReader
from pipelines.stages.contract import OnProgress, Outcome, ShardOutput, StageResult
from pipelines.stages.run import run_stream
from pipelines.stages.shards import write_output
from pipelines.storage.files import list_folder
from pipelines.storage.lease import Leases, Ticket, shared
from pipelines.tables.captions import IMPORT_STAGE, check_scorer
from pipelines.tables.identity import MANIFEST, Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, SCORES, Row, captions_path, scores_path
from pipelines.tables.table import Table, absolute_uri, count_reasons
from sana_model.files.redact import redact_uri

COUNTS = "_import.json"
NOT_IMPORTED = "_not_imported.jsonl"
NUM_SCORES = "num_scores"
"""Figure of the captions' shards: how many of the captions came with a CLIP score."""
WRITERS = 8
COSINE = 1.0  # no score that is 100 times a cosine stays below it for all captions

NO_CAPTION = RowRefused("no_caption", "the files have no caption for it")
EMPTY = RowRefused("empty_caption", "its caption in the files has no text")
NO_SCORE = RowRefused("no_score", "its caption came without a CLIP score")

Found = dict[int, tuple[str | None, float | None]]


class CaptionImport:
    """The import of one captioner's captions into a dataset.

    Args:
        on_read: told from time to time what is being read, before shards are made.

    Raises ValueError if the source holds no captions, or those of several VLMs; StorageError; MissingTableError if there are no
    images.
    """

    def __init__(self, dataset_uri: str, config: ImportConfig, on_read: Callable[[str], None] = lambda text: None):
        self.config, self.on_read = config, on_read
        self.images = Table(dataset_uri, IMAGES_PATH, IMAGES)
        self.captions = Table(dataset_uri, captions_path(config.name), CAPTIONS)
        self.scores = Table(dataset_uri, scores_path(config.clip, config.name), SCORES)
        self.inputs = {IMAGES_PATH: self.images.require().fingerprint}
        self.found = find_captions(config)

    @cached_property
    def identity(self) -> Identity:
        """Of the captions: how they were matched, and the contents of their files."""
        self.on_read(f"hashing {len(self.found.files)} files")
        sources = [absolute_uri(os.path.expanduser(source)) for source in self.config.sources]
        settings = value_settings(self.config) | {"source": sources, "vlm": self.found.vlm}
        return Identity(IMPORT_STAGE, settings | {"content": self.found.hash_captions()}, models={}, inputs=self.inputs)

    @cached_property
    def scores_identity(self) -> Identity:
        """Of the scores: the captions, and where the scores come from."""
        settings = {"score_column": self.config.score_column, "score_scale": self.config.score_scale}
        settings |= {"content": self.found.hash_scores()}
        path = self.captions.path
        return Identity(IMPORT_STAGE, settings, models={}, inputs={path: self.identity.fingerprint}, rows_of=path)

    def run(self, *, on_progress: OnProgress = lambda progress: None, leases: Leases | None = None) -> StageResult:
        """Make the missing shards of captions, and those of their scores along with them.

        `num_tokens` counts words (what stands between white space): nothing says which tokenizer the captioner had.
        `finish_reason` is "stop", and no faults are looked for: `flags` is null. Rejects: no_caption, empty_caption.

        Raises:
            ValueError: no caption fits an image, or the scores are cosines and `score_scale` does not say so.
            StaleTableError, TooManyRejectsError and others: as `run_stream`.
        """
        shards = self.images.list_shards()
        with shared(leases) as held, ExitStack() as stack:
            own = held.take(self.captions.uri).ticket
            if MANIFEST in list_folder(self.captions.uri) or self.captions.list_shards():
                self.captions.claim(self.identity, ticket=own)  # refuses before all is read
            index, ticket = None, None
            if set(shards).difference(self.captions.list_shards()):
                index = stack.enter_context(self._build_index(shards))
                if index.counts.scores:
                    check_scorer(self.images.dataset_uri, self.config.clip, IMPORT_STAGE)
                    ticket = held.take(self.scores.uri).ticket
                    self.scores.claim(self.scores_identity, ticket=ticket)
                self._write_counts(index, own)

            def write(shard: str, found: Found, own: Ticket) -> Outcome:
                captions, scores = self._make_shard(shard, found)
                if ticket is not None:
                    _write(self.scores, shard, scores, self.scores_identity, ticket)
                return _write(self.captions, shard, captions, self.identity, own)

            return self._stream(self.captions, self.identity, shards, index, write, on_progress, held)

    def has_scores(self) -> bool:
        """Whether any of the captions, which must be there, came with a score."""
        return self.captions.require().figures.get(NUM_SCORES, 0) > 0

    def run_scores(self, *, on_progress: OnProgress = lambda progress: None, leases: Leases | None = None) -> StageResult:
        """Complete the table of scores. Its shards are made along with the captions, unless a setting has changed since.

        Rejects: no_score. Raises as `run`.
        """
        check_scorer(self.images.dataset_uri, self.config.clip, IMPORT_STAGE)
        shards = self.captions.list_shards()
        with shared(leases) as held, ExitStack() as stack:
            ticket = held.take(self.scores.uri).ticket
            self.scores.claim(self.scores_identity, ticket=ticket)
            missing = set(shards).difference(self.scores.list_shards())
            index = stack.enter_context(self._build_index(self.images.list_shards())) if missing else None

            def write(shard: str, found: Found, own: Ticket) -> Outcome:
                return _write(self.scores, shard, self._make_shard(shard, found)[1], self.scores_identity, own)

            return self._stream(self.scores, self.scores_identity, shards, index, write, on_progress, held)

    def read_counts(self) -> dict[str, Any]:
        """The counts of the run that made the last shards: those of `index.Counts`, with `files` and `other_files`."""
        return self.captions.read_json(COUNTS, dict)

    def _build_index(self, shards: list[str]) -> CaptionIndex:
        """Read all captions and join them with the images. Raises ValueError as `run`."""
        index = CaptionIndex()
        try:
            for count in index.add_captions(EntryReader(self.config, self.found).read()):
                self.on_read(f"{count} captions read")
            for count in index.add_images(self.images, shards):
                self.on_read(f"names of the images of {count}/{len(shards)} shards read")
            self.on_read("matching captions with images")
            index.join()
            self._check(index)
        except BaseException:
            index.__exit__()
            raise
        return index

    def _check(self, index: CaptionIndex) -> None:
        counts = index.counts
        if not counts.matched:
            first = next(index.tell(), None)
            if first is None:
                raise ValueError(f"source={self.config.source!r} holds no caption: {self.found.files[0].uri} has no rows")
            raise ValueError(
                f"none of the {counts.captions} captions of source={self.config.source!r} fits an image "
                f"({dict(counts.not_taken)}). The first: {json.dumps(first)}. An image of the dataset: {self._first_image()}. "
                "Say what the captions name, with match (file_name: in whatever folder), key_column and caption_keys"
            )
        if counts.scores and self.config.score_scale is None and counts.largest_score <= COSINE:
            raise ValueError(
                f"the scores are at most {counts.largest_score:g}, and tables of scores hold 100 times the cosine: give "
                "score_scale (100 for cosines; 1 to take them as they are)"
            )

    def _first_image(self) -> str | None:
        for shard in self.images.list_shards():
            for row in self.images.read_shard(shard, ["source_uri"]).to_pylist():
                return str(row["source_uri"])
        return None

    def _write_counts(self, index: CaptionIndex, ticket: Ticket) -> None:
        counts = vars(index.counts) | {"files": len(self.found.files), "other_files": self.found.others}
        lines = [redact_uri(json.dumps(row)) + "\n" for row in index.tell()]
        self.captions.write_file(NOT_IMPORTED, "".join(lines).encode(), ticket=ticket)
        self.captions.write_json(COUNTS, counts, ticket=ticket)

    def _make_shard(self, shard: str, found: Found) -> tuple[ShardOutput, ShardOutput]:
        """Captions and scores of a shard. Every image is a row or a reject of the captions; every caption, of the scores."""
        captions: list[Row] = []
        scores: list[Row] = []
        no_captions: list[Row] = []
        no_scores: list[Row] = []
        images = self.images.read_shard(shard, ["id", "source_uri"]).to_pylist()
        for place, row in enumerate(images):
            caption, score = found.get(place, (None, None))
            if caption is None:
                no_captions.append(reject(row, EMPTY if place in found else NO_CAPTION))
                continue
            counted = {"num_tokens": len(caption.split()), "finish_reason": "stop", "flags": None}
            captions.append({"id": row["id"], "caption": caption, **counted})
            if score is None:
                no_scores.append(reject(row, NO_SCORE))
            else:
                scores.append({"id": row["id"], "clip_score": score * (self.config.score_scale or 1.0)})
        figures = {NUM_SCORES: float(len(scores))}
        return ShardOutput(captions, no_captions, figures), ShardOutput(scores, no_scores)

    def _stream(
        self,
        table: Table,
        identity: Identity,
        shards: list[str],
        index: CaptionIndex | None,
        write: Callable[[str, Found, Ticket], Outcome],
        on_progress: OnProgress,
        leases: Leases,
    ) -> StageResult:
        """Have `write` make the missing shards of a table, a few at a time."""

        def stream(missing: list[str], ticket: Ticket) -> Iterator[Outcome]:
            assert index is not None
            with ThreadPoolExecutor(WRITERS) as pool:
                for start in range(0, len(missing), WRITERS):
                    part = missing[start : start + WRITERS]
                    found = [index.read_shard(shard) for shard in part]
                    yield from pool.map(write, part, found, [ticket] * len(part))

        share = self.config.max_reject_share if table is self.captions else 1.0
        return run_stream(table, identity, shards, stream, max_reject_share=share, on_progress=on_progress, leases=leases)


def _write(table: Table, shard: str, made: ShardOutput, identity: Identity, ticket: Ticket) -> Outcome:
    rows, rejects = made.tables(table.schema)
    write_output(table, shard, rows, rejects, made.figures, identity.fingerprint, ticket)
    reasons = dict(count_reasons(rejects))
    return Outcome(
        shard=shard, num_rows=rows.num_rows, rejects_by_reason=reasons, figures=dict(made.figures), error=None, stops=""
    )
