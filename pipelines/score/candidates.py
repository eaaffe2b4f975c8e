"""The captions that compete for an image: those of several captioners with their scores, joined when they are read.

Each captioner has a table of captions, and one of scores for each CLIP. Shards are aligned, so a join reads one small file of
each table. Which captioners compete is the reader's choice: to add or to drop one makes no table again.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.compute as pc

from pipelines.score.config import ImageFilter
from pipelines.score.selection import Caption
from pipelines.storage.files import list_folder
from pipelines.tables.captions import captions_table, read_captions
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.schema import IMAGE_SCORES, ORIGINAL_CAPTIONER, SCORES, image_scores_path, scores_path
from pipelines.tables.table import REMAKE, Table


@dataclass(frozen=True)
class ScoredShards:
    """The shards that captioners' scores can be compared in.

    Args:
        common: those that every captioner's scores have.
        total: how many shards any captioner's scores have.
        lacking: how many shards a captioner's scores have, of each that lacks some.
    """

    common: list[str]
    total: int
    lacking: dict[str, int]

    def explain(self) -> str:
        """A sentence that says which captioners lack shards; empty if none does."""
        if not self.lacking:
            return ""
        told = ", ".join(f"{name} has scores for {count:,} of {self.total:,} shards" for name, count in self.lacking.items())
        return f"{told}: only shards that all captioners have are compared"


@dataclass(frozen=True)
class Candidates:
    """The captions that compete for the images of a dataset.

    Args:
        captioners: tables under captions/, and "original" for what came with the images.
        clip: whose scores under scores/<clip>/ are joined. A caption without a score does not compete. None: scores are not
            read, and all are None.
    """

    dataset_uri: str
    captioners: tuple[str, ...]
    clip: str | None

    def tables(self) -> list[Table]:
        """The tables that are read."""
        captions = [captions_table(self.dataset_uri, captioner) for captioner in self.captioners]
        return captions + ([self._scores(captioner) for captioner in self.captioners] if self.clip else [])

    def read(self, shard: str) -> dict[str, list[Caption]]:
        """The captions of a shard's images by id, in the order of the captioners. Raises as `Table.read_shard`."""
        with ThreadPoolExecutor(2 * len(self.captioners)) as pool:  # on an object store reading is waiting
            texts = [pool.submit(read_captions, self.dataset_uri, captioner, shard) for captioner in self.captioners]
            scores = [pool.submit(self._read_scores, captioner, shard) for captioner in self.captioners]
            found: dict[str, list[Caption]] = {}
            for captioner, own_texts, own_scores in zip(self.captioners, texts, scores, strict=True):
                by_id = own_scores.result()
                for row_id, caption in own_texts.result().items():
                    if by_id is None or row_id in by_id:
                        score = None if by_id is None else by_id[row_id]
                        entry = {"captioner": captioner, "caption": caption, "clip_score": score}
                        found.setdefault(row_id, []).append(entry)
        return found

    def find_scored(self) -> ScoredShards:
        """The shards that every captioner's scores have, and which captioners lack some. Raises MissingTableError."""
        tables = {captioner: self._scores(captioner) for captioner in self.captioners}
        for table in tables.values():
            table.require()
        found = {captioner: set(table.list_shards()) for captioner, table in tables.items()}
        any_has = set().union(*found.values())
        common = sorted(any_has.intersection(*found.values()))
        lacking = {captioner: len(shards) for captioner, shards in found.items() if len(shards) < len(any_has)}
        return ScoredShards(common, len(any_has), lacking)

    def list_scored(self) -> list[str]:
        """The shards that every captioner's scores have. Raises MissingTableError."""
        return self.find_scored().common

    def read_scored(self, shard: str) -> dict[str, list[Caption]]:
        """As `read`, without the texts: only scores are read."""
        found: dict[str, list[Caption]] = {}
        for captioner in self.captioners:
            for row_id, score in (self._read_scores(captioner, shard) or {}).items():
                found.setdefault(row_id, []).append({"captioner": captioner, "clip_score": score})
        return found

    def _read_scores(self, captioner: str, shard: str) -> dict[str, float] | None:
        return read_scores(self._scores(captioner), shard, "clip_score") if self.clip else None

    def _scores(self, captioner: str) -> Table:
        assert self.clip is not None
        return Table(self.dataset_uri, scores_path(self.clip, captioner), SCORES)


def read_scores(table: Table, shard: str, column: str) -> dict[str, float]:
    """The numbers in a column of a shard by id. Raises as `Table.read_shard`, and where one of them is not finite."""
    rows = table.read_shard(shard, ["id", column])
    if num_bad := pc.sum(pc.invert(pc.is_finite(rows[column]))).as_py():
        raise DamagedShardError(f"{table.shard_uri(shard)} has {num_bad} scores that are not finite: {REMAKE}")
    return dict(zip(rows["id"].to_pylist(), rows[column].to_pylist(), strict=True))


@dataclass(frozen=True)
class Filters:
    """Limits on the scores of images, by the name of a table under image_scores/."""

    dataset_uri: str
    limits: dict[str, ImageFilter]

    def tables(self) -> list[Table]:
        """The tables that are read."""
        return [Table(self.dataset_uri, image_scores_path(name), IMAGE_SCORES) for name in self.limits]

    def read(self, shard: str, ids: Sequence[str]) -> list[bool]:
        """Whether each of these images of a shard is within all limits. Raises as `Table.read_shard`."""
        admitted = [True] * len(ids)
        for table, limit in zip(self.tables(), self.limits.values(), strict=True):
            scores = read_scores(table, shard, "score")
            admitted = [before and limit.admits(scores.get(row_id)) for before, row_id in zip(admitted, ids, strict=True)]
        return admitted


def scored_captioners(dataset_uri: str, clip: str) -> tuple[str, ...]:
    """The captioners that have a table under scores/<clip>/, "original" first. Raises ValueError for a damaged manifest."""
    folders = list_folder(f"{dataset_uri.rstrip('/')}/scores/{clip}", with_files=False)
    tables = {name: Table(dataset_uri, scores_path(clip, name), SCORES) for name in folders if name[0] not in "._"}
    names = [name for name, table in tables.items() if table.read_manifest() is not None]
    return tuple(sorted(names, key=lambda name: (name != ORIGINAL_CAPTIONER, name)))
