"""Reading ahead: the same batches, the state of those handed out, errors where the batch is asked for."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from pipelines.score.config import SelectionConfig
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.table import Table
from pipelines.train.stream.prefetch import PrefetchedStream
from pipelines.train.stream.stream import TrainingStream
from tests.support.training_world import STREAM, assert_same, make_shards, make_source, make_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("data"), make_shards([9, 1, 14, 0, 7], ("64x64", "32x128")))


def make_stream(table: Table, selection: SelectionConfig | None = None) -> TrainingStream:
    config = replace(STREAM, shuffle_shards=2, selection=selection or SelectionConfig())
    return TrainingStream([make_source(table)], config, micro_batch_size=4, seed=3)


def test_reading_ahead_changes_nothing(table: Table) -> None:
    plain, ahead = make_stream(table), PrefetchedStream(make_stream(table), depth=3)
    for _ in range(9):
        assert_same(next(ahead), next(plain))
    resumed = make_stream(table)
    resumed.load_state_dict(ahead.state_dict())
    ahead.close()
    for expected, batch in zip(islice(plain, 9), resumed, strict=False):
        assert_same(batch, expected)
    assert ahead.wait_seconds > 0


def test_close_ends_the_thread_though_nobody_takes_what_it_read(table: Table) -> None:
    ahead = PrefetchedStream(make_stream(table), depth=1)
    next(ahead)
    ahead.close()
    assert not ahead._thread.is_alive()


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    table = make_table(tmp_path, make_shards([40]))
    (Path(table.uri) / "00000.parquet").write_bytes(b"damaged")
    with pytest.raises(DamagedShardError, match="00000"):
        next(PrefetchedStream(make_stream(table), depth=2))
    none_passes = make_stream(make_table(tmp_path / "other", make_shards([8])), SelectionConfig(min_best_score=99.0))
    with pytest.raises(ValueError, match="let none pass"):
        next(PrefetchedStream(none_passes, depth=2))
