"""Tables: whole shards, manifests that refuse, on a local folder and on another filesystem."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage.errors import StorageError
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, LATENTS, SCORES
from pipelines.tables.table import Table, absolute_uri
from tests.support.old_forms import write_old_manifest, write_old_scores

IDENTITY = Identity("caption", {"prompt": "Describe.", "sampling": {"temperature": 0.0}}, {"vlm": "sha256:1"}, {"images": "f"})


@pytest.fixture(params=["file", "memory"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    uri = str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}"
    return Table(uri, "captions/vlm", CAPTIONS)


def rows(*ids: str) -> pa.Table:
    return pa.Table.from_pylist([{"id": id, "caption": "x", "num_tokens": 1, "finish_reason": "stop"} for id in ids], CAPTIONS)


def test_what_is_listed_is_what_was_written(table: Table) -> None:
    assert table.list_shards() == []
    table.write_shard("00001", rows("b"))
    table.write_shard("00000", rows("a", "c"))
    table.rejects().write_shard("00000", pa.Table.from_pylist([], table.rejects().schema))
    table.write_file("report.html", b"<html>")
    assert table.list_shards() == ["00000", "00001"]
    assert table.read_shard("00000")["id"].to_pylist() == ["a", "c"]
    assert table.read_shard("00001", ["id"]).column_names == ["id"]
    assert table.rejects().uri.endswith("/rejects/captions/vlm")


def test_rows_of_another_schema_are_not_written(table: Table) -> None:
    with pytest.raises(ValueError, match="schema"):
        table.write_shard("00000", pa.table({"id": ["a"]}))
    assert table.list_shards() == []


def test_a_second_claim_goes_on_and_a_different_one_is_refused_by_field(table: Table) -> None:
    table.claim(IDENTITY)
    first = table.require()
    assert table.claim(IDENTITY).fingerprint == first.fingerprint == IDENTITY.fingerprint
    changed = replace(IDENTITY, config={"prompt": "Tell.", "sampling": {"temperature": 0.5}}, inputs={})
    with pytest.raises(StaleTableError) as refused:
        table.claim(changed)
    message = str(refused.value)
    assert "config.prompt: 'Describe.' -> 'Tell.'" in message
    assert "config.sampling.temperature: 0.0 -> 0.5" in message
    assert "inputs.images: 'f' -> (absent)" in message
    assert "models" not in message
    assert table.read_manifest() == first


def test_the_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    turned = replace(IDENTITY, config={"sampling": {"temperature": 0.0}, "prompt": "Describe."})
    assert turned.fingerprint == IDENTITY.fingerprint
    assert replace(IDENTITY, models={"vlm": "sha256:2"}).fingerprint != IDENTITY.fingerprint


def test_shards_without_a_manifest_are_not_taken_over(table: Table) -> None:
    table.write_shard("00000", rows("a"))
    with pytest.raises(StaleTableError, match="holds 1 shards and no _manifest"):
        table.claim(IDENTITY)


def test_a_missing_input_is_named(table: Table) -> None:
    with pytest.raises(MissingTableError, match="no table 'captions/vlm'"):
        table.require()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_scores_of_all_captioners_lie_where_the_folder_of_their_tables_goes(tmp_path: Path, scheme: str) -> None:
    uri = str(tmp_path) if scheme == "file" else f"memory://{tmp_path.name}-old"
    old = write_old_scores(uri, "clip")
    assert old.read_manifest() is not None  # it has no rows_of
    table = Table(uri, "scores/clip/a", SCORES)
    sentence = "scores/clip is of form 1, and this program knows form 2 of what jobs.score makes: let jobs.score make it anew"
    with pytest.raises(StaleTableError, match=sentence) as refused:
        table.claim(Identity("score", {}, {}, {}))
    assert refused.value.table is not None and refused.value.table.uri == old.uri  # what --on_stale rebuild deletes
    with pytest.raises(StaleTableError, match=sentence) as unread:
        table.require()
    assert unread.value.table is None  # a reader deletes nothing
    Table(uri, "scores/siglip/a", SCORES).claim(Identity("score", {}, {}, {}))  # another CLIP has nothing to do with it


def test_latents_that_hold_captions_are_refused_and_tables_of_the_first_form_are_not(tmp_path: Path) -> None:
    latents = Table(str(tmp_path), "latents/ae-64", LATENTS)
    write_old_manifest(latents, "extract", {"dtype": "float16"})
    for use in (latents.require, lambda: latents.claim(Identity("extract", {}, {}, {}))):
        with pytest.raises(StaleTableError, match="latents/ae-64 is of form 1, and this program knows form 2"):
            use()
    captions = Table(str(tmp_path), "captions/vlm", CAPTIONS)
    write_old_manifest(captions, "caption", {"prompt": "Describe."})
    manifest = captions.require()
    assert (manifest.schema_version, manifest.rows_of) == (1, "") and manifest.config == {"prompt": "Describe."}


def test_which_rows_a_table_is_about_is_recorded_and_changes_no_fingerprint(table: Table) -> None:
    about = replace(IDENTITY, rows_of="images")
    assert about.fingerprint == IDENTITY.fingerprint
    assert table.claim(about).rows_of == table.require().rows_of == "images"
    assert table.claim(IDENTITY).rows_of == "images"


def test_a_damaged_shard_and_a_damaged_manifest_are_named(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "captions/vlm", CAPTIONS)
    table.write_shard("00000", rows("a"))
    path = tmp_path / "captions/vlm/00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"00000\.parquet is damaged"):
        table.read_shard("00000")
    table.write_file("_manifest.json", b'{"fingerprint": ')
    with pytest.raises(ValueError, match=r"_manifest\.json is not what this version wrote"):
        table.read_manifest()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(str(tmp_path), "captions/vlm", CAPTIONS)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"cannot write .*00000\.parquet: the disk is full: free space there"):
        table.write_shard("00000", rows("a"))
    assert list((tmp_path / "captions/vlm").iterdir()) == []


def test_absolute_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("data") == str(tmp_path / "data")
    assert absolute_uri("s3://bucket/data/") == "s3://bucket/data"
