"""The stage runner on Ray Data: aligned shards, rejects, resume after a death, limits on rejects."""

from functools import partial
from pathlib import Path

import pytest

from pipelines.schema import CAPTIONS
from pipelines.stage import Progress, Resources, StageResult, TooManyRejectsError, run_shards
from pipelines.tables import Identity, StaleTableError, Table
from tests.pipelines.stage_workers import Upper, read_ids

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
    armed: Path | None = None,
    max_reject_share: float = 0.9,
    seen: list[Progress] | None = None,
) -> StageResult:
    return run_shards(
        table,
        IDENTITY,
        list(ids),
        read_shard=partial(read_ids, ids),
        make_worker=partial(Upper, armed),
        resources=Resources(num_cpus=0.5),
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


def test_after_a_death_the_missing_shards_are_made_and_no_other(table: Table, tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    with pytest.raises(Exception, match="killed by the test"):
        run(table, armed=armed)
    assert "00003" not in table.list_shards()
    assert not table.require().complete
    survivors = {shard: (tmp_path / f"data/captions/upper/{shard}.parquet").stat().st_mtime_ns for shard in table.list_shards()}
    armed.unlink()
    (tmp_path / "data/captions/upper/00000.parquet").unlink(missing_ok=True)
    survivors.pop("00000", None)
    result = run(table)
    assert contents(table) == EXPECTED and contents(table.rejects()) == REFUSED
    assert result.found_shards == len(survivors) and result.num_rows == 5
    for shard, stamp in survivors.items():
        assert (tmp_path / f"data/captions/upper/{shard}.parquet").stat().st_mtime_ns == stamp


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
