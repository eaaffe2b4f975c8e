"""How a dataset stands: shards, counts, what is stale and why."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jobs import status as job
from pipelines.audit.rebuild import delete_table
from pipelines.audit.status import TableStatus, dataset_status
from pipelines.audit.verify import verify_dataset
from pipelines.reports.captions import write_captioners_report
from pipelines.storage.files import remove_file, write_file
from pipelines.storage.lease import hold
from pipelines.tables import schema
from pipelines.tables.identity import MANIFEST, Identity
from pipelines.tables.schema import TABLE_SCHEMAS
from pipelines.tables.table import Table
from tests.support.old_forms import write_old_scores
from tests.support.whole_dataset import caption_row, make_dataset, write_table

Tables = dict[str, Table]
SCORES = ("scores/clip/a", "scores/clip/b")
PATHS = ["images", "image_embeds/clip", "captions/a", "captions/b", *SCORES, "latents/ae-64"]


@pytest.fixture(params=["file", "memory"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Tables:
    return make_dataset(str(tmp_path / "data") if request.param == "file" else f"memory://{tmp_path.name}-status")


def look(tables: Tables, *, count_rows: bool = False) -> dict[str, TableStatus]:
    status = dataset_status(tables["images"].dataset_uri, count_rows=count_rows)
    return {table.path: table for table in status.tables}


def delete(table: Table, name: str) -> None:
    remove_file(f"{table.uri}/{name}")


def remake(table: Table, **changes: object) -> None:
    """The table as if its stage had made it anew in another way."""
    identity = replace(table.require().identity(), **changes)  # type: ignore[arg-type]
    delete(table, MANIFEST)
    shards = {shard: (table.read_shard(shard).to_pylist(), []) for shard in table.list_shards()}
    for shard in shards:
        delete(table, f"{shard}.parquet")
    write_table(table, identity, shards)


def test_a_finished_dataset(tables: Tables) -> None:
    found = look(tables)
    assert list(found) == PATHS
    assert all(table.complete and table.stale == [] and table.num_shards == 2 for table in found.values())
    assert [table.num_rows for table in found.values()] == [40, 39, 40, 39, 39, 38, 39]
    assert found["images"].rejects_by_reason == {"truncated": 2} and found["captions/a"].num_rejects == 0
    manifest = tables["latents/ae-64"].require()
    assert found["latents/ae-64"].fingerprint == manifest.fingerprint and found["latents/ae-64"].updated == manifest.updated


def test_files_beside_the_tables_are_not_looked_into(tables: Tables) -> None:
    uri = tables["images"].dataset_uri
    write_captioners_report(uri, ["a", "b"])
    write_file(f"{uri}/NOTES", b"mine")
    assert list(look(tables)) == PATHS
    delete_table(tables["latents/ae-64"])
    assert "latents/ae-64" not in look(tables) and list(verify_dataset(uri)) == []


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    tables = make_dataset(str(tmp_path))
    files = [*(tmp_path / "captions/b").glob("*.parquet"), *(tmp_path / "rejects/captions/b").glob("*.parquet")]
    assert look(tables)["captions/b"].num_bytes == sum(file.stat().st_size for file in files)


def test_missing_shards_and_the_count_of_those_that_are_there(tables: Tables) -> None:
    delete(tables["captions/b"], "00000.parquet")
    found = look(tables)["captions/b"]
    assert (found.num_shards, found.missing, found.num_rows, found.complete) == (1, ["00000"], None, False)
    counted = look(tables, count_rows=True)["captions/b"]
    assert (counted.num_rows, counted.rejects_by_reason) == (19, {"empty_caption": 1})
    assert look(tables)["scores/clip/b"].complete


def test_a_table_begun_by_its_stage_is_unfinished_though_no_shard_is_missing(tables: Tables) -> None:
    manifest = tables["latents/ae-64"].require()
    tables["latents/ae-64"].write_manifest(replace(manifest, complete=False))
    found = look(tables, count_rows=True)["latents/ae-64"]
    assert found.missing == [] and found.num_rows == 39 and not found.complete


def test_stale_is_what_an_input_is_not_any_more_or_whose_input_is_stale_or_gone(tables: Tables) -> None:
    old = tables["captions/a"].require().fingerprint
    remake(tables["captions/a"], config={"prompt": "Another."})
    new = tables["captions/a"].require().fingerprint
    found = look(tables)
    assert {path: table.stale for path, table in found.items() if table.stale} == {
        "scores/clip/a": [f"captions/a was made anew ({old[:8]} -> {new[:8]})"]
    }
    remake(tables["image_embeds/clip"], models={"clip": "sha256:other"})
    assert [path for path, table in look(tables).items() if table.stale] == ["scores/clip/a", "scores/clip/b"]
    delete(tables["captions/b"], MANIFEST)
    found = look(tables)
    assert "captions/b is gone" in found["scores/clip/b"].stale
    assert found["captions/b"].problems == ["it has shards and no manifest: nothing says what made them"]
    manifest = tables["images"].require()
    tables["images"].write_manifest(replace(manifest, schema_version=0))
    found = look(tables)
    assert found["images"].stale == ["it is of form 0, this program writes form 1"]
    assert found["latents/ae-64"].stale == ["images is stale"]


def test_a_table_of_an_old_form_is_shown_where_it_lies_and_what_is_to_be_done(tables: Tables) -> None:
    """`scores/<clip>` held the scores of all captioners: now it is the folder of their tables."""
    uri = tables["images"].dataset_uri
    old = write_old_scores(uri, "old")
    found = look(tables)
    assert [path for path in found if path.startswith("scores/")] == ["scores/clip/a", "scores/clip/b", "scores/old"]
    assert found[old.path].stale == ["it is of form 1, this program writes form 2"]
    assert (found[old.path].num_shards, found[old.path].num_rows) == (1, 1)
    (told,) = verify_dataset(uri, paths=[old.path])
    assert (
        str(told) == "scores/old: is stale: it is of form 1, this program writes form 2: run its stage with --on_stale rebuild"
    )


def test_the_shards_of_a_table_are_those_of_the_input_that_it_is_about_whatever_came_first(tables: Tables) -> None:
    assert list(tables["scores/clip/b"].require().inputs) == ["image_embeds/clip", "captions/b"]
    delete(tables["image_embeds/clip"], "00001.parquet")
    found = look(tables)
    assert found["image_embeds/clip"].missing == ["00001"] and found["scores/clip/b"].missing == []
    delete(tables["scores/clip/b"], "00000.parquet")
    assert look(tables)["scores/clip/b"].missing == ["00000"]


def test_who_is_writing(tmp_path: Path) -> None:
    tables = make_dataset(str(tmp_path))
    with hold(tables["captions/a"].uri):
        assert "process" in (look(tables)["captions/a"].writer or "")
    assert look(tables)["captions/a"].writer is None


def test_a_broken_manifest_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    tables = make_dataset(str(tmp_path))
    Path(tables["captions/b"].uri, MANIFEST).write_text("{")
    found = look(tables)
    assert "is not what this version wrote" in found["captions/b"].problems[0] and found["captions/a"].complete


def add_training(folder: Path, tables: Tables, name: str, result: dict[str, float] | None) -> None:
    inputs = {path: tables[path].require().fingerprint for path in ("latents/ae-64", "scores/clip/a")}
    identity = Identity("train", {"num_steps": 200}, {}, inputs)
    (folder / name).mkdir()
    (folder / name / "training.json").write_text(json.dumps({"fingerprint": "f", **asdict(identity), "result": result}))


def test_the_page_fits_and_names_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = make_dataset(str(tmp_path))
    long = Table(str(tmp_path), "captions/" + "a-very-long-name-of-a-captioner-" * 2 + "x", TABLE_SCHEMAS["captions"])
    rows = [caption_row(row) for row in tables["images"].read_shard("00000").to_pylist()]
    identity = Identity("caption", {}, {}, {"images": tables["images"].require().fingerprint})
    write_table(long, identity, {"00000": (rows, [])})
    add_training(tmp_path, tables, "train", {"loss_start": 1.25, "loss_end": 0.5})
    add_training(tmp_path, tables, "train-2", None)
    remake(tables["captions/a"], config={"prompt": "Another."})
    assert job.main(["--dataset_uri", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= job.WIDTH
    page = "\n".join(lines)
    assert any(line.startswith("images") and "2/2" in line and "40" in line and line.endswith("complete") for line in lines)
    assert any(line.startswith("…") and "captioner-x " in line for line in lines)
    assert any("1 missing" in line and "1/2" in line for line in lines)
    assert any(line.startswith("scores/clip/a") and line.endswith("STALE") for line in lines)
    assert "stale: captions/a was made anew" in page and "rejects: truncated 2" in page
    assert "train: 200 steps on latents/ae-64, scores/clip/a, loss 1.250 -> 0.500" in page
    assert "stale: scores/clip/a is stale" in page
    assert "train-2: not ended, 200 steps" in page
    assert job.main(["--dataset_uri", str(tmp_path), "--json", "--rows"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["version"] == 1 and content["tables"][0]["complete"] is True
    assert [training["name"] for training in content["trainings"]] == ["train", "train-2"]


def test_where_there_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uri in (str(tmp_path), str(tmp_path / "nothing"), f"memory://{tmp_path.name}-none"):
        assert job.main(["--dataset_uri", uri]) == 1
        assert f"there is no dataset at {uri}" in capsys.readouterr().err


def test_every_kind_of_table_is_known() -> None:
    """A table that is not in TABLE_SCHEMAS would be seen by neither status nor verify."""
    paths = {name for name in vars(schema) if name.endswith("_path")}
    assert {name.removesuffix("_path") for name in paths} | {"images"} == set(TABLE_SCHEMAS)
