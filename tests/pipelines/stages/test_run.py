"""The stage runner on Ray Data: aligned shards, rejects, resume after a death, limits on rejects."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.stages import shards
from pipelines.stages.contract import Progress, Resources, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.errors import StorageError
from pipelines.tables.errors import ShardError, StaleTableError, TooManyRejectsError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS
from pipelines.tables.table import Table
from tests.support.stage_workers import Dying, Unborn, Upper, WithoutDevice, read_ids

IDS = {
    "00000": ["a", "b", "c-bad"],
    "00001": [],
    "00002": ["d-bad", "e-bad"],
    "00003": ["f", "poison", "g"],
}
IDENTITY = Identity("caption", {"prompt": "x"}, {}, {"images": "1"})


@pytest.fixture
def table(tmp_path: Path, local_ray: None) -> Table:
    return Table(str(tmp_path / "data"), "captions/upper", CAPTIONS)


def run(
    table: Table,
    *,
    ids: dict[str, list[str]] = IDS,
    make_worker: Callable[[], ShardWorker] = Upper,
    num_actors: int = 1,
    max_reject_share: float = 0.9,
    seen: list[Progress] | None = None,
) -> StageResult:
    return run_shards(
        table,
        IDENTITY,
        list(ids),
        read_shard=partial(read_ids, ids),
        make_worker=make_worker,
        # Most of Ray's 8: a stage has room only when the actors of the one before it are gone.
        resources=Resources(num_actors=num_actors, num_cpus=6 / num_actors),
        max_reject_share=max_reject_share,
        on_progress=lambda progress: None if seen is None else seen.append(progress),
    )


def contents(table: Table) -> dict[str, list[str]]:
    return {shard: table.read_shard(shard)["id"].to_pylist() for shard in table.list_shards()}


EXPECTED = {"00000": ["a", "b"], "00001": [], "00002": [], "00003": ["f", "poison", "g"]}
REFUSED = {"00000": ["c-bad"], "00001": [], "00002": ["d-bad", "e-bad"], "00003": []}


def test_every_shard_holds_the_rows_of_its_input_less_its_rejects(table: Table) -> None:
    result = run(table)
    assert contents(table) == EXPECTED
    assert contents(table.rejects()) == REFUSED
    assert (result.num_rows, result.num_rejects, result.rejects_by_reason) == (5, 3, {"bad_id": 3})
    manifest = table.require()
    assert manifest.complete and manifest.num_rows == 5 and manifest.rejects_by_reason == {"bad_id": 3}
    assert [table.read_facts(shard).figures for shard in IDS] == [{"kept": 2}, {"kept": 0}, {"kept": 0}, {"kept": 3}]
    assert manifest.figures == result.figures == {"kept.mean": 1.25, "kept.min": 0}
    facts = table.rejects().read_facts("00002")
    assert (facts.num_rows, facts.rejects_by_reason, facts.fingerprint) == (2, {"bad_id": 2}, IDENTITY.fingerprint)


def test_after_a_failure_the_missing_shards_are_made_and_no_other(table: Table, tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    with pytest.raises(ShardError, match=r"shards 00003 could not be made(.|\n)*killed by the test"):
        run(table, make_worker=partial(Upper, armed))
    assert table.list_shards() == ["00000", "00001", "00002"], "one shard's failure costs no other"
    assert not table.require().complete
    files = {shard: tmp_path / f"data/captions/upper/{shard}.parquet" for shard in IDS}
    files["00000"].unlink()
    stamps = {shard: files[shard].stat().st_mtime_ns for shard in ("00001", "00002")}
    armed.unlink()
    result = run(table)
    assert contents(table) == EXPECTED and contents(table.rejects()) == REFUSED
    assert result.found_shards == 2 and result.num_rows == 5 and result.figures == {"kept.mean": 1.25, "kept.min": 0}
    assert {shard: files[shard].stat().st_mtime_ns for shard in stamps} == stamps


def test_parts_after_one_with_a_failure_are_made_too(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARDS_PER_ACTOR", 2)
    armed = tmp_path / "armed"
    armed.touch()
    ids = {"00000": ["poison"], **{f"{shard:05}": [f"row-{shard}"] for shard in range(1, 5)}}
    with pytest.raises(ShardError, match="shards 00000 could not be made"):
        run(table, ids=ids, make_worker=partial(Upper, armed))
    armed.unlink()
    assert run(table, ids=ids).found_shards == 4 and contents(table) == ids


def test_rows_that_fit_no_schema_cost_their_shard_and_say_why() -> None:
    shard = shards._read_row("00003", shards._pack(read_ids(IDS, "00003")), None)
    made = shards._Worker(Upper, pa.schema([("caption", pa.int64())]))(shard)
    assert "'F'" in made["error"][0].as_py()["message"] and made["shard"].to_pylist() == ["00003"]


@pytest.mark.parametrize("worker", [Dying, WithoutDevice])
def test_a_process_that_dies_now_and_then_costs_nothing(
    table: Table, tmp_path: Path, worker: Callable[[Path], ShardWorker]
) -> None:
    """A CUDA error ends it too: it would fail every other shard."""
    lives = tmp_path / "lives"
    lives.mkdir()
    for life in "ab":
        (lives / life).touch()
    result = run(table, make_worker=partial(worker, lives), num_actors=2)
    assert contents(table) == EXPECTED and contents(table.rejects()) == REFUSED
    assert list(lives.iterdir()) == [] and result.num_rows == 5 and table.require().complete


def test_a_shard_that_always_kills_its_process_is_named_when_all_others_are_done(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last try has room although Ray starts the dead actor again: it is let go of, as it needs most of the machine."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps exceptions that are logged
    monkeypatch.setattr(shards, "RETRIES", 1)
    with pytest.raises(ShardError, match=r"upper: shards 00003 could not be made.*process died .* out of memory"):
        run(table, make_worker=Dying)
    assert table.list_shards() == ["00000", "00001", "00002"]


def test_workers_that_die_before_they_work_end_the_stage(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RETRIES", 0)
    monkeypatch.setattr(shards, "MAX_FAILED_SHARDS", 1)
    with pytest.raises(ShardError, match=r"over \d shards ended their process"):
        run(table, make_worker=Unborn)
    assert table.list_shards() == []


def test_storage_that_refuses_ends_the_stage_with_its_own_words(table: Table, tmp_path: Path) -> None:
    run(table)
    (tmp_path / "data/captions/upper/00000.parquet").unlink()
    (tmp_path / "data/rejects/captions/upper/00000.parquet").unlink()
    (tmp_path / "data/rejects/captions/upper/00000.parquet").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*rejects/captions/upper/00000\.parquet: the storage refuses it"):
        run(table)
    assert [path.name for path in (tmp_path / "data/captions/upper").glob(".*")] == []


def test_a_second_run_does_nothing_and_counts_the_same(table: Table) -> None:
    first = run(table)
    again = run(table)
    assert again.was_done and not first.was_done
    assert (again.num_rows, again.rejects_by_reason) == (first.num_rows, first.rejects_by_reason)
    grown = run(table, ids={**IDS, "00004": ["h"]})
    assert grown.found_shards == 4 and grown.num_rows == 6 and contents(table)["00004"] == ["h"]


def test_another_identity_is_refused_before_anything_runs(table: Table) -> None:
    table.claim(Identity("caption", {"prompt": "y"}, {}, {"images": "1"}))
    with pytest.raises(StaleTableError, match=r"config\.prompt: 'y' -> 'x'"):
        run(table)
    assert table.list_shards() == []


def test_too_many_rejects_fail_the_stage_and_say_why(table: Table) -> None:
    with pytest.raises(TooManyRejectsError, match=r"3 of 8 rows were refused \(bad_id 3\), more than max_reject_share=0\.2"):
        run(table, max_reject_share=0.2)
    assert contents(table.rejects())["00002"] == ["d-bad", "e-bad"]
    with pytest.raises(TooManyRejectsError):  # and again, though nothing is left to do
        run(table, max_reject_share=0.2)
