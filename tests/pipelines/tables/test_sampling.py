"""A bounded part of a table: spread evenly, and it says what was read."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.tables.sampling import ReportScope, read_light, sample_rows, spread
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.table import Table

NUM_SHARDS, NUM_ROWS = 5, 4


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Five shards of four rows; a row's score is its number in the table."""
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    for shard in range(NUM_SHARDS):
        numbers = range(shard * NUM_ROWS, (shard + 1) * NUM_ROWS)
        rows = [{"id": f"{number:02d}", "score": float(number)} for number in numbers]
        table.write_shard(f"{shard:05d}", pa.Table.from_pylist(rows, IMAGE_SCORES))
    return table


def test_spread_takes_both_ends_and_never_more_than_there_are() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 10) == [0, 1, 2] and spread(10, 1) == [0]
    assert spread(0, 5) == [] and spread(5, 0) == []


@pytest.mark.parametrize(("limit", "shards"), [(3, [0, 2, 4]), (99, [0, 1, 2, 3, 4])])
def test_some_columns_of_some_shards_are_read(table: Table, limit: int, shards: list[int]) -> None:
    light = read_light(table, ["score"], ReportScope(max_shards=limit))
    expected = [float(shard * NUM_ROWS + row) for shard in shards for row in range(NUM_ROWS)]
    assert light.rows.column_names == ["score"] and light.rows["score"].to_pylist() == expected
    assert (light.num_shards, light.total_shards) == (len(shards), NUM_SHARDS)
    told = "All 20 rows of 5 shards were read" if limit == 99 else "12 rows were read: 3 of 5 shards, spread evenly"
    assert light.scope == told


def test_an_empty_table_has_the_columns_too(tmp_path: Path) -> None:
    light = read_light(Table(str(tmp_path), "image_scores/y", IMAGE_SCORES), ["id", "score"], ReportScope())
    assert light.rows.num_rows == 0 and light.rows.column_names == ["id", "score"]
    assert light.scope == "All 0 rows of 0 shards were read"


def test_pictures_come_evenly_from_a_few_shards(table: Table) -> None:
    rows = sample_rows(table, ReportScope(num_images=5, picture_shards=2))
    assert [(shard, row["id"]) for shard, row in rows] == [
        ("00000", "00"), ("00000", "02"), ("00000", "03"), ("00004", "16"), ("00004", "19")
    ]  # fmt: skip
    assert len(sample_rows(table, ReportScope(num_images=99, picture_shards=99))) == NUM_SHARDS * NUM_ROWS
