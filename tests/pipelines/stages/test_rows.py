"""Shards taken apart into rows and put together again, behind a model that gives the rows back in any order."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray

from pipelines.stages import shards
from pipelines.stages.contract import ReadShard, StageResult
from pipelines.stages.rows import stream_rows
from pipelines.stages.run import run_stream
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS
from pipelines.tables.table import Table
from tests.support.row_workers import (
    IDS,
    Finish,
    make_row,
    read_damaged,
    read_ids,
    shuffle,
    shuffle_and_lose,
    shuffle_and_repeat,
)

IDENTITY = Identity("caption", {}, {}, {})


@pytest.fixture
def table(tmp_path: Path, local_ray: None) -> Table:
    return Table(str(tmp_path / "data"), "captions/upper", CAPTIONS)


def run(
    table: Table, run_model: Callable[[ray.data.Dataset], ray.data.Dataset], read_shard: ReadShard = read_ids
) -> StageResult:
    options = {"num_actors": 1, "read_shard": read_shard, "make_row": make_row, "run_model": run_model, "make_finisher": Finish}
    stream = partial(stream_rows, table, IDENTITY.fingerprint, **options)
    return run_stream(table, IDENTITY, list(IDS), stream, max_reject_share=0.5)


def check(table: Table) -> None:
    """Every shard holds its rows in order, less its rejects."""
    assert table.list_shards() == sorted(IDS)
    for shard, ids in IDS.items():
        rows = table.read_shard(shard).to_pylist()
        kept = [(row_id, row_id.upper(), place) for place, row_id in enumerate(ids) if not row_id.endswith("bad")]
        assert [(row["id"], row["caption"], row["num_tokens"]) for row in rows] == kept
    assert table.rejects().read_shard("00000")["id"].to_pylist() == ["c-bad"]


@pytest.mark.parametrize("run_model", [shuffle, shuffle_and_repeat])
def test_rows_find_back_to_their_shards(table: Table, run_model: Callable[[ray.data.Dataset], ray.data.Dataset]) -> None:
    result = run(table, run_model)
    check(table)
    assert (result.num_rows, result.rejects_by_reason) == (43, {"bad_id": 1})
    assert table.read_facts("00003").figures == {"rows": 40.0}
    assert run(table, run_model).was_done


def test_shards_in_parts_find_their_rows_too(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARDS_PER_ACTOR", 2)
    run(table, shuffle)
    check(table)


def test_a_shard_that_lacks_a_row_is_not_written(table: Table) -> None:
    with pytest.raises(RuntimeError, match="of shard 00003 only 39 of 40 rows came back from the model"):
        run(table, shuffle_and_lose)
    assert "00003" not in table.list_shards()
    result = run(table, shuffle)
    check(table)
    assert result.found_shards >= 1


def test_a_damaged_input_is_named(table: Table) -> None:
    with pytest.raises(DamagedShardError, match=r"^0000\d is damaged: delete it$"):
        run(table, shuffle, read_damaged)
    assert table.list_shards() == []
