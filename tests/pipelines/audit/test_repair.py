"""What verify proposes is safe: only what is bad is moved aside, the stages make it again, and nothing good is lost."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import repair as job
from pipelines.audit.repair import ASIDE, repair_dataset
from pipelines.audit.verify import verify_dataset
from pipelines.ingest.plan import PLAN, Plan, write_plan
from pipelines.ingest.sources import Part
from pipelines.score.verdicts import GENERATIONS, VERDICTS, Verdicts
from pipelines.storage.errors import LeaseHeldError
from pipelines.storage.lease import Leases, hold, read_lease
from pipelines.tables.identity import MANIFEST, Identity
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.sealed import SEAL, SEALED, write_sealed
from pipelines.tables.table import Table
from tests.support.whole_dataset import SHARDS, Shards, edit_manifest, make_dataset, write_table

Tables = dict[str, Table]
FIRST, SECOND = SHARDS
DUPLICATES, VERDICT, LIST = "image_scores/near_duplicates", VERDICTS.format(0), "0123456789abcdef-00000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    tables = make_dataset(str(tmp_path_factory.mktemp("whole")))
    parts = {shard: [Part(f"{shard}-{number}.png", 3) for number in range(20)] for shard in SHARDS}
    write_plan(tables["images"], Plan("folder", "ab12", parts), None)
    inputs = {"images": tables["images"].require().fingerprint}
    table = tables[DUPLICATES] = Table(tables["images"].dataset_uri, DUPLICATES, IMAGE_SCORES)
    ids = {shard: tables["images"].read_shard(shard, ["id"]).to_pylist() for shard in SHARDS}
    rows: Shards = {shard: ([row | {"score": 0.0} for row in ids[shard]], []) for shard in SHARDS}
    write_table(table, Identity("duplicates", {}, {}, inputs), rows)
    nothing = Verdicts.make(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))
    table.write_json(GENERATIONS, {"generations": [list(SHARDS)]})
    table.write_file(f"{VERDICT}.parquet", nothing.to_bytes(DUPLICATES, VERDICT))
    tables["images"].write_file(f"_lists/{LIST}.parquet", write_sealed(pa.table({"url": ["x"]}), 9, folder="_lists", name=LIST))
    return tables


@pytest.fixture
def tables(whole: Tables, tmp_path: Path) -> Tables:
    shutil.copytree(whole["images"].dataset_uri, tmp_path, dirs_exist_ok=True)
    return {path: replace(table, dataset_uri=str(tmp_path)) for path, table in whole.items()}


def moved(tables: Tables) -> list[str]:
    """Repair what is found, and return what lies aside afterwards."""
    uri = tables["images"].dataset_uri
    with Leases() as leases:
        assert list(repair_dataset(uri, leases, num_threads=2)), "nothing was found"
    assert all(read_lease(table.uri) is None for table in tables.values())
    folder = Path(uri, ASIDE)
    found = [path.relative_to(folder).as_posix().partition("/")[2] for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != "repair.json")


def path_of(table: Table, name: str) -> Path:
    return Path(table.uri, name if "." in name else f"{name}.parquet")


def both(path: str, shard: str) -> list[str]:
    return [f"{path}/{shard}.parquet", f"rejects/{path}/{shard}.parquet"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path, place: int = 50) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)


def overwrite(tables: Tables, path: str, name: str, by: str, its_name: str) -> None:
    shutil.copy(path_of(tables[by], its_name), path_of(tables[path], name))


def unseal(path: Path) -> None:
    """Write a shard as an earlier version did."""
    table, buffer = pq.read_table(BytesIO(path.read_bytes())), BytesIO()
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (SEAL, SEALED)}
    pq.write_table(table.replace_schema_metadata(metadata), buffer, write_page_checksum=True)
    path.write_bytes(buffer.getvalue())


def unsealed_copy(tables: Tables) -> None:
    for shard in SHARDS:
        unseal(path_of(tables["images"], shard))
    overwrite(tables, "images", SECOND, "images", FIRST)


def foreign_manifest(tables: Tables) -> None:
    """As an earlier version wrote it: nothing in it says whose it is."""
    other = asdict(tables["captions/b"].require())
    edit_manifest(tables["captions/a"], **{name: other[name] for name in ("fingerprint", "models")})


def lose_a_shard_of_the_plan(tables: Tables) -> None:
    write_plan(tables["images"], Plan("folder", "ab12", {FIRST: [Part("a.png", 3)]}), None)


def move(table: Table, shard: str, other: str) -> None:
    shutil.move(path_of(table, shard), path_of(table, other))


A, B, IMAGES = "captions/a", "captions/b", "images"
ALL_OF_DUPLICATES = sorted(
    [name for shard in SHARDS for name in both(DUPLICATES, shard)]
    + [f"{DUPLICATES}/{name}" for name in (GENERATIONS, MANIFEST, f"{VERDICT}.parquet")]
)
Damage = Callable[[Tables], object]
CASES: dict[str, tuple[Damage, list[str]]] = {
    "a cut shard": (lambda tables: cut(path_of(tables[A], FIRST)), both(A, FIRST)),
    "an empty shard": (lambda tables: path_of(tables[A], FIRST).write_bytes(b""), both(A, FIRST)),
    "a flipped bit": (lambda tables: flip(path_of(tables["latents/ae-64"], SECOND)), both("latents/ae-64", SECOND)),
    "a shard over another": (lambda tables: overwrite(tables, IMAGES, SECOND, IMAGES, FIRST), both(IMAGES, SECOND)),
    "a shard over an earlier one": (lambda tables: overwrite(tables, IMAGES, FIRST, IMAGES, SECOND), both(IMAGES, FIRST)),
    "captions of b over a": (lambda tables: overwrite(tables, A, FIRST, B, FIRST), both(A, FIRST)),
    "a manifest of b over a": (lambda tables: overwrite(tables, A, MANIFEST, B, MANIFEST), [f"{A}/{MANIFEST}"]),
    "an older manifest of b over a": (foreign_manifest, []),
    "an older copy over another": (unsealed_copy, []),
    "a lost shard of images": (lambda tables: path_of(tables[IMAGES], SECOND).unlink(), []),
    "a lost shard of captions": (lambda tables: path_of(tables[A], SECOND).unlink(), []),
    "lost rejects": (lambda tables: path_of(tables[B].rejects(), FIRST).unlink(), both(B, FIRST)[:1]),
    "cut rejects": (lambda tables: cut(path_of(tables[B].rejects(), FIRST)), both(B, FIRST)),
    "a shard of no image": (lambda tables: move(tables[A], FIRST, "00009"), [f"{A}/00009.parquet"]),
    "a cut manifest": (lambda tables: cut(path_of(tables[A], MANIFEST)), [f"{A}/{MANIFEST}"]),
    "a cut manifest of images": (lambda tables: cut(path_of(tables[IMAGES], MANIFEST)), [f"{IMAGES}/{MANIFEST}"]),
    "an edited manifest": (lambda tables: edit_manifest(tables[A], config={}), [f"{A}/{MANIFEST}"]),
    "a later version's manifest": (lambda tables: edit_manifest(tables[A], later=1), []),
    "a manifest of a later form": (lambda tables: edit_manifest(tables[A], schema_version=9), []),
    "a cut plan": (lambda tables: cut(path_of(tables[IMAGES], PLAN)), [f"{IMAGES}/{PLAN}"]),
    "a flipped bit of a manifest": (lambda tables: flip(path_of(tables[A], MANIFEST)), [f"{A}/{MANIFEST}"]),
    "a flipped bit of the plan": (lambda tables: flip(path_of(tables[IMAGES], PLAN), 900), [f"{IMAGES}/{PLAN}"]),
    "a plan without a shard": (lose_a_shard_of_the_plan, []),
    "cut verdicts": (lambda tables: cut(path_of(tables[DUPLICATES], VERDICT)), [f"{DUPLICATES}/{VERDICT}.parquet"]),
    "a cut list": (lambda tables: cut(path_of(tables[IMAGES], f"_lists/{LIST}")), [f"{IMAGES}/_lists/{LIST}.parquet"]),
    "cut generations": (lambda tables: cut(path_of(tables[DUPLICATES], GENERATIONS)), ALL_OF_DUPLICATES),
    "a leftover": (lambda tables: path_of(tables[A], ".x.tmp").write_bytes(b"half"), [f"{A}/.x.tmp"]),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_bad_by_itself_is_moved_aside(tables: Tables, case: str, tmp_path: Path) -> None:
    damage, expected = CASES[case]
    damage(tables)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert moved(tables) == expected
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ASIDE not in path.parts}
    changed = {path.relative_to(tmp_path).as_posix() for path, content in before.items() if after.get(path) != content}
    assert changed == set(expected)
    for name in expected:
        (kept,) = (tmp_path / ASIDE).glob(f"*/{name}")
        assert kept.read_bytes() == before[tmp_path / name], "it is kept as it was"
    if "flipped bit of" in case:  # the only change of these files: they are whole again
        assert list(verify_dataset(str(tmp_path), num_threads=2)) == []


def test_counts_that_are_wrong_are_counted_anew(tables: Tables, tmp_path: Path) -> None:
    table = tables["captions/a"]
    table.write_manifest(replace(table.require(), num_rows=7))
    assert moved(tables) == [] and not table.require().complete


def test_nothing_is_moved_while_a_table_is_written_and_nothing_without_the_word(
    tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(path_of(tables["captions/a"], FIRST))
    with hold(tables["captions/a"].uri), Leases() as leases, pytest.raises(LeaseHeldError):
        list(repair_dataset(str(tmp_path), leases, num_threads=2))
    assert job.main(["--dataset_uri", str(tmp_path), "--dry_run", "true"]) == 1
    told = capsys.readouterr().out
    assert "captions/a/00000.parquet: is damaged" in told and "1 would be moved aside" in told
    assert not (tmp_path / ASIDE).exists()


def test_the_command_keeps_what_it_moved_until_all_is_well(
    tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, argv = tables["captions/a"], ["--dataset_uri", str(tmp_path)]
    rows, rejects, facts = table.read_shard(FIRST), table.rejects().read_shard(FIRST), table.read_facts(FIRST)
    cut(path_of(table, FIRST))
    assert job.main(argv) == 0
    told = capsys.readouterr().out
    assert "moved to _damaged/" in told and "then run, as before, jobs.caption or jobs.import_captions; and jobs.repair" in told
    reasons = json.loads(next((tmp_path / ASIDE).rglob("repair.json")).read_text())
    assert "is damaged" in reasons["captions/a/00000.parquet"][0]

    assert job.main([*argv, "--remove_aside", "true"]) == 1 and (tmp_path / ASIDE).exists()
    assert "captions/a/00000.parquet: is missing" in capsys.readouterr().out
    table.rejects().write_shard(FIRST, rejects, fingerprint=facts.fingerprint)  # as its stage does
    table.write_shard(FIRST, rows, fingerprint=facts.fingerprint)
    assert job.main([*argv, "--remove_aside", "true"]) == 0 and not list((tmp_path / ASIDE).rglob("*.*"))
    assert "3 files deleted" in capsys.readouterr().out
    assert job.main(argv) == 0


def test_on_s3(bucket_uri: str) -> None:
    tables = make_dataset(f"{bucket_uri}/data")
    table = tables["captions/a"]
    table.write_file(f"{FIRST}.parquet", b"<html>")
    with Leases() as leases:
        done = list(repair_dataset(table.dataset_uri, leases, paths=["captions/a"]))
    assert len(done) == 1 and done[0].did.startswith("moved to _damaged/")
    assert table.list_shards() == [SECOND] == table.rejects().list_shards()
