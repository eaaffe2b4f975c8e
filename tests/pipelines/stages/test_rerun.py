"""A stage that ran to its end does not believe its manifest where files were changed since. Shards are made in this process."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.stages.contract import Outcome, StageResult
from pipelines.stages.run import run_stream
from pipelines.stages.shards import write_output
from pipelines.storage.lease import Ticket
from pipelines.tables.errors import DamagedFileError, DamagedShardError
from pipelines.tables.identity import MANIFEST, Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import IMAGE_SCORES, REJECTS
from pipelines.tables.table import Table

IDENTITY = Identity("score_images", {}, {}, {})
SHARDS = ["00000", "00001"]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    assert run(table).num_rows == 6
    return table


def run(table: Table) -> StageResult:
    rows = pa.Table.from_pylist([{"id": f"{number}", "score": 1.0} for number in range(3)], IMAGE_SCORES)
    refused = pa.Table.from_pylist([reject({"id": "9"}, RowRefused("bad", ""))], REJECTS)

    def stream(missing: list[str], ticket: Ticket) -> Iterator[Outcome]:
        for shard in missing:
            write_output(table, shard, rows, refused, {}, IDENTITY.fingerprint, ticket)
            yield Outcome(shard=shard, num_rows=3, rejects_by_reason={"bad": 1}, figures={}, error=None, stops="")

    return run_stream(table, IDENTITY, SHARDS, stream, max_reject_share=0.5)


def shard_of(table: Table) -> Path:
    return Path(table.shard_uri("00001"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda table: shard_of(table).write_bytes(b""), r"x/00001\.parquet is damaged"),
        (lambda table: cut(shard_of(table)), r"x/00001\.parquet is damaged"),
        (lambda table: cut(shard_of(table.rejects())), r"rejects/image_scores/x/00001\.parquet is damaged"),
        (lambda table: shard_of(table.rejects()).unlink(), r"rejects/image_scores/x/00001\.parquet is gone"),
        (lambda table: table.write_shard("00001", table.read_shard("00001"), fingerprint="f" * 65), "other settings"),
    ],
)
def test_a_changed_file_ends_the_stage(table: Table, damage: Callable[[Table], object], told: str) -> None:
    assert run(table).was_done
    before = table.require()
    damage(table)
    with pytest.raises(DamagedShardError, match=rf"{told}.*let python -m jobs\.repair move it aside"):
        run(table)
    assert table.require() == before


def test_an_edited_manifest_ends_the_stage(table: Table) -> None:
    path = Path(table.uri, MANIFEST)
    path.write_text(path.read_text().replace('"num_rows": 6', '"num_rows": 7'))
    with pytest.raises(DamagedFileError, match="damaged or edited"):
        run(table)


def test_a_shard_that_is_missing_is_made_and_files_that_were_written_anew_are_counted_anew(table: Table) -> None:
    before = table.require()
    shard_of(table).unlink()
    assert run(table).found_shards == 1 and replace(table.require(), updated=before.updated) == before
    table.write_shard("00001", table.read_shard("00001").slice(0, 1), fingerprint=IDENTITY.fingerprint)
    assert run(table).num_rows == table.require().num_rows == 4
    assert run(table).was_done


def test_the_counts_of_an_earlier_version_are_believed_as_before(table: Table) -> None:
    table.write_manifest(replace(table.require(), num_bytes=None))
    assert run(table).was_done and table.require().num_bytes is None
