"""Tables: whole shards, manifests that refuse, on a local folder and on another filesystem."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage.errors import StorageError
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS
from pipelines.tables.table import Table, absolute_uri

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


def test_a_damaged_shard_and_a_damaged_manifest_are_named(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "captions/vlm", CAPTIONS)
    table.write_shard("00000", rows("a"))
    path = tmp_path / "captions/vlm/00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"00000\.parquet is damaged"):
        table.read_shard("00000")
    table.write_file("_manifest.json", b'{"fingerprint": ')
    with pytest.raises(ValueError, match=r"_manifest\.json is no manifest"):
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
