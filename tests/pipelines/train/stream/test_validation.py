"""The samples of the validation loss: held out, the same on any number of ranks, as many batches on each."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.tables.chance import is_held_out
from pipelines.tables.table import Table
from pipelines.train.stream.config import ValidationConfig
from pipelines.train.stream.validation import ValidationSet
from tests.support.training_world import PATH, STREAM, make_row, make_shards, make_source, make_table

HELD_OUT = replace(STREAM, held_out_share=0.4, caption_dropout=0.5)
IDS = [str(make_row(index)["id"]) for index in range(40)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("data"), make_shards([22, 18], ("64x64", "64x64", "32x128")))


def read(table: Table, config: ValidationConfig | None = None, *, rank: int = 0, world_size: int = 1) -> ValidationSet:
    config = config or ValidationConfig()
    return ValidationSet.read([make_source(table)], config, HELD_OUT, batch_size=3, rank=rank, world_size=world_size)


def test_it_is_the_held_out_samples_each_once_and_with_its_caption(table: Table) -> None:
    batches = [entry.batch for entry in read(table).batches]
    assert sorted(sample_id for batch in batches for sample_id in batch.ids) == [i for i in IDS if is_held_out(i, 0.4)]
    assert not any(dropped for batch in batches for dropped in batch.dropped)
    assert {batch.bucket for batch in batches} == {"64x64", "32x128"} and all(len(batch.ids) <= 3 for batch in batches)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_batches_and_have_as_many(table: Table, world_size: int) -> None:
    whole = read(table)
    ranks = [read(table, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(one.batches) for one in ranks}) == 1
    counted = [tuple(entry.batch.ids) for one in ranks for entry in one.batches if entry.weight == 1.0]
    assert sorted(counted) == sorted(tuple(entry.batch.ids) for entry in whole.batches)
    padding = [entry for one in ranks for entry in one.batches if entry.weight == 0.0]
    assert len(padding) == -len(whole.batches) % world_size


def test_a_table_of_its_own_is_taken_whole_up_to_the_number(table: Table) -> None:
    batches = read(table, ValidationConfig(latents=PATH, num_samples=7)).batches
    assert sorted(sample_id for entry in batches for sample_id in entry.batch.ids) == IDS[:7]


def test_two_tables_come_by_turns(table: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path, make_shards([9], first=100))
    config = ValidationConfig(latents=PATH, num_samples=6)
    both = ValidationSet.read([make_source(table), make_source(other)], config, HELD_OUT, batch_size=8, rank=0, world_size=1)
    tables = [uri for entry in both.batches for uri in entry.batch.tables]
    assert tables.count(table.uri) == tables.count(other.uri) == 3


def test_no_sample_is_an_error_that_names_the_table(table: Table) -> None:
    none = replace(HELD_OUT, held_out_share=0.0)
    with pytest.raises(ValueError, match=r"latents/tiny-64 has no sample to validate with: raise data\.held_out_share"):
        ValidationSet.read([make_source(table)], ValidationConfig(), none, batch_size=3, rank=0, world_size=1)
