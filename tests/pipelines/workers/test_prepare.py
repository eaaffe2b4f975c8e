"""Preparation in threads: ahead of the model, in order, bounded, and errors stay with their rows."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.prepare import prepare_ahead

PATIENCE = 60.0  # seconds until a test that waits in vain fails


def rows_of(count: int) -> list[Row]:
    return [{"id": number} for number in range(count)]


def test_the_next_batch_is_prepared_while_the_model_has_this_one() -> None:
    started = [threading.Event() for _ in range(12)]

    def prepare(row: Row) -> int:
        started[row["id"]].set()
        return row["id"]

    def model(batch: list[int]) -> None:
        """Returns only when the batch after its own has been begun."""
        for number in batch:
            assert number + 4 >= len(started) or started[number + 4].wait(PATIENCE)

    batch: list[int] = []
    for _, prepared in prepare_ahead(rows_of(12), prepare, num_ahead=4, num_threads=2):
        assert not isinstance(prepared, RowRefused)
        batch.append(prepared)
        if len(batch) == 4:
            model(batch)
            batch = []
    assert all(event.is_set() for event in started)


def test_rows_work_side_by_side() -> None:
    together = threading.Barrier(3)
    found = [ready for _, ready in prepare_ahead(rows_of(6), lambda _: together.wait(PATIENCE), num_ahead=3, num_threads=3)]
    assert sorted(found) == [0, 0, 1, 1, 2, 2]


def test_order_and_errors_are_kept() -> None:
    def prepare(row: Row) -> int:
        time.sleep(0.002 * (row["id"] * 7 % 5))
        if row["id"] % 3 == 0:
            raise RowRefused("odd", f"row {row['id']}")
        return -row["id"]

    found = list(prepare_ahead(rows_of(30), prepare, num_ahead=8, num_threads=4))
    assert [row["id"] for row, _ in found] == list(range(30))
    for row, ready in found:
        if row["id"] % 3 == 0:
            assert isinstance(ready, RowRefused) and ready.detail == f"row {row['id']}"
        else:
            assert ready == -row["id"]


def test_no_more_rows_than_asked_for_are_in_flight() -> None:
    taken, pulled, ahead = 0, 0, []

    def source() -> Iterator[Row]:
        nonlocal pulled
        for row in rows_of(50):
            pulled += 1
            yield row

    for _ in prepare_ahead(source(), lambda row: row, num_ahead=5, num_threads=2):
        taken += 1
        ahead.append(pulled - taken)
    assert taken == 50 and max(ahead) == 5


def test_another_error_is_raised_and_what_waits_is_given_up() -> None:
    begun: list[int] = []

    def prepare(row: Row) -> int:
        begun.append(row["id"])
        return 1 // (row["id"] - 2)

    with pytest.raises(ZeroDivisionError):
        list(prepare_ahead(rows_of(100), prepare, num_ahead=4, num_threads=1))
    assert len(begun) < 10
    with pytest.raises(ValueError, match="num_ahead=0"):
        next(prepare_ahead(rows_of(1), prepare, num_ahead=0, num_threads=1))
