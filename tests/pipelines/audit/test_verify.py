"""Every way in which a dataset can be damaged is planted once, and found."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import verify as job
from pipelines.audit.seen_ids import SeenIds
from pipelines.audit.verify import Violation, verify_dataset
from pipelines.tables.identity import MANIFEST, Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, SCORES
from pipelines.tables.table import Table
from tests.support.whole_dataset import SHARDS, edit_manifest, make_dataset, write_table

Tables = dict[str, Table]


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return make_dataset(str(tmp_path / "data"))


def find(tables: Tables, *paths: str) -> list[Violation]:
    return list(verify_dataset(tables["images"].dataset_uri, paths=paths, num_threads=2))


def file(table: Table, shard: str) -> Path:
    return Path(table.shard_uri(shard))


def rewrite(table: Table, shard: str, change: Callable[[list[dict]], list[dict]]) -> None:
    rows = change(table.read_shard(shard).to_pylist())
    fingerprint = table.read_facts(shard).fingerprint
    table.write_shard(shard, pa.Table.from_pylist(rows, table.schema), fingerprint=fingerprint)


def test_a_whole_dataset_is_clean_wherever_it_lies(tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(tables) == []
    remote = make_dataset(f"memory://{tmp_path.name}")
    assert find(remote) == []
    assert job.main(["--dataset_uri", tables["images"].dataset_uri, "--threads", "3"]) == 0
    assert "14 shards, 274 rows read" in capsys.readouterr().out


def test_a_truncated_file(tables: Tables) -> None:
    path = file(tables["captions/a"], "00000")
    path.write_bytes(path.read_bytes()[:-30])
    (found,) = find(tables, "captions/a")
    assert found.file == "captions/a/00000.parquet" and "is damaged" in found.problem
    assert "python -m jobs.repair moves it aside, and jobs.caption or jobs.import_captions makes it again" in found.remedy
    assert found.action is not None and found.action.files == ("captions/a/00000.parquet", "rejects/captions/a/00000.parquet")


@pytest.mark.parametrize("path", ["images", "image_embeds/clip", "captions/a", "scores/clip/a", "latents/ae-64", "rejects"])
def test_a_flipped_bit_anywhere(tables: Tables, path: str) -> None:
    table = tables["images"].rejects() if path == "rejects" else tables[path]
    name = file(table, "00001")
    content = name.read_bytes()
    for place in np.random.default_rng(0).choice(len(content), 10, replace=False).tolist():
        name.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = find(tables, "images" if path == "rejects" else path)
        assert [one.file for one in found] == [f"{table.path}/00001.parquet"], place
    name.write_bytes(content)
    assert find(tables) == []


def test_a_lost_row_and_a_doubled_one(tables: Tables) -> None:
    rewrite(tables["captions/a"], "00000", lambda rows: rows[1:])
    rewrite(tables["captions/b"], "00000", lambda rows: [*rows, rows[0]])
    found = {one.file: one.problem for one in find(tables)}
    assert "lacks 1 id" in found["captions/a/00000.parquet"]
    assert "more than once" in found["captions/b/00000.parquet"]
    assert found["captions/a/_manifest.json"] == "tells of 40 rows, there are 39"
    assert found["captions/b/_manifest.json"] == "tells of 39 rows, there are 40"
    assert len(found) == 4, "the scores are not blamed for what their captions have lost"


def test_a_row_of_another_shard_and_one_both_kept_and_refused(tables: Tables) -> None:
    images, captions = tables["images"], tables["captions/b"]
    stranger = images.read_shard("00000").to_pylist()[0]["id"]
    rewrite(captions, "00001", lambda rows: [{**rows[0], "id": stranger}, *rows[1:]])
    problems = [one.problem for one in find(tables, "captions/b")]
    assert any("that images has not in this shard" in problem for problem in problems)
    assert any("lacks 1 id" in problem for problem in problems)
    refused = captions.rejects().read_shard("00001").to_pylist()[0]["id"]
    rewrite(captions, "00001", lambda rows: [*rows[:-1], {**rows[0], "id": refused}])
    assert any("refused at the same time" in one.problem for one in find(tables, "captions/b"))


def test_each_table_is_compared_with_the_one_that_it_is_about_whatever_came_first(tables: Tables) -> None:
    scores = tables["scores/clip/b"]
    assert list(scores.require().inputs) == ["image_embeds/clip", "captions/b"]
    unsaid = tables["captions/b"].rejects().read_shard("00001").to_pylist()[0]["id"]  # it has an embedding
    rewrite(scores, "00001", lambda rows: [*rows, {**rows[0], "id": unsaid}])
    problems = [one.problem for one in find(tables, scores.path)]
    assert any("that captions/b has not in this shard" in problem for problem in problems)
    edit_manifest(scores, rows_of="")  # then the first input counts, to which the rejected row is a stranger
    assert any("that image_embeds/clip has not in this shard" in one.problem for one in find(tables, scores.path))


def test_scores_of_the_original_captions_are_about_those_images_that_came_with_one(tables: Tables) -> None:
    images, uri = tables["images"], tables["images"].dataset_uri
    rewrite(images, "00001", lambda rows: [{**row, "caption": "told"} if index < 3 else row for index, row in enumerate(rows)])
    ids = images.read_shard("00001")["id"].to_pylist()
    scores = [{"id": row_id, "clip_score": 25.0} for row_id in ids[:2]]
    refused = [reject({"id": ids[2]}, RowRefused("no_embedding", ""))]
    inputs = {path: tables[path].require().fingerprint for path in ("image_embeds/clip", "images")}
    table = Table(uri, "scores/clip/original", SCORES)
    identity = Identity("score", {}, {"clip": "sha256:clip"}, inputs, rows_of="images")
    write_table(table, identity, {"00000": ([], []), "00001": (scores, refused)})
    assert find(tables) == []
    rewrite(table, "00001", lambda rows: rows[:1])
    assert any("lacks 1 id" in one.problem for one in find(tables, table.path))
    rewrite(table, "00001", lambda rows: [*scores, {"id": ids[3], "clip_score": 1.0}])
    assert any("hold 1 id" in one.problem and "that images has not" in one.problem for one in find(tables, table.path))


def test_embeddings_of_another_width_than_the_manifests(tables: Tables) -> None:
    table = tables["image_embeds/clip"]
    identity = replace(table.require().identity(), config={"width": 5})
    for shard in SHARDS:
        table.rejects().write_shard(shard, table.rejects().read_shard(shard), fingerprint=identity.fingerprint)
        table.write_shard(shard, table.read_shard(shard), fingerprint=identity.fingerprint)
    edit_manifest(table, config={"width": 5}, fingerprint=identity.fingerprint)
    problems = [one.problem for one in find(tables, table.path)]
    assert len(problems) == 2 and all(
        "other columns" in problem and "[4]" in problem and "[5]" in problem for problem in problems
    )


def test_an_edited_manifest(tables: Tables) -> None:
    edit_manifest(tables["captions/a"], config={"prompt": "Something else."})
    edit_manifest(tables["scores/clip/a"], num_rows=7, rejects_by_reason={"other": 1})
    found = [(one.file, one.problem) for one in find(tables)]
    assert ("captions/a/_manifest.json", "was edited: its fingerprint is not that of its content") in found
    assert ("scores/clip/a/_manifest.json", "tells of 7 rows, there are 39") in found
    assert ("scores/clip/a/_manifest.json", "tells of 1 rejects for other, there are 0") in found
    edit_manifest(tables["captions/b"], inputs=3)
    Path(tables["latents/ae-64"].uri, MANIFEST).write_text("{")
    Path(tables["images"].uri, MANIFEST).unlink()
    files = {one.file for one in find(tables)}
    assert {"latents/ae-64/_manifest.json", "images/_manifest.json", "captions/b/_manifest.json"} <= files


def test_scores_that_are_no_numbers(tables: Tables) -> None:
    rewrite(tables["scores/clip/a"], "00000", lambda rows: [{**rows[0], "clip_score": float("nan")}, *rows[1:]])
    (found,) = find(tables)
    assert found.file == "scores/clip/a/00000.parquet" and "has scores that are not finite for 1 id" in found.problem


def test_an_image_whose_bytes_changed(tables: Tables) -> None:
    rewrite(tables["images"], "00000", lambda rows: [{**rows[0], "image_bytes": b"others"}, *rows[1:]])
    (found,) = find(tables)
    assert found.file == "images/00000.parquet" and "has other bytes than its id says for 1 id" in found.problem


def test_an_image_that_lies_in_two_shards(tables: Tables) -> None:
    first = tables["images"].read_shard("00000").to_pylist()[5]
    rewrite(tables["images"], "00001", lambda rows: [*rows[:-1], first])
    found = find(tables, "images")
    assert [one.problem for one in found] == [f"holds {first['id'][:16]}… which 00000.parquet holds too"]
    assert found[0].file == "images/00001.parquet"


def test_files_that_are_missing_or_too_many(tables: Tables) -> None:
    captions = tables["captions/a"]
    file(captions, "00000").unlink()
    file(tables["captions/b"].rejects(), "00001").unlink()
    file(tables["scores/clip/a"], "00001").rename(file(tables["scores/clip/a"], "00007"))
    Path(tables["latents/ae-64"].uri, ".00001.parquet.abc.tmp").write_bytes(b"half")
    found = {one.file: one.problem for one in reversed(find(tables))}
    assert "is missing, of a table that was complete" in found["captions/a/00000.parquet"]
    assert found["rejects/captions/b/00001.parquet"] == "is missing"
    assert "about no shard of the table's inputs" in found["scores/clip/a/00007.parquet"]
    assert "leftover" in found["latents/ae-64/.00001.parquet.abc.tmp"]


def test_a_shard_of_another_schema_or_of_another_making(tables: Tables) -> None:
    captions = tables["captions/a"]
    rows = captions.read_shard("00000")
    other = CAPTIONS.set(2, pa.field("num_tokens", pa.int64(), nullable=False))
    Table(captions.dataset_uri, captions.path, other).write_shard("00000", rows.cast(other))
    captions.write_shard("00001", captions.read_shard("00001"), fingerprint="another")
    problems = {one.file: one.problem for one in find(tables, "captions/a")}
    assert "int64" in problems["captions/a/00000.parquet"] and "int32" in problems["captions/a/00000.parquet"]
    assert problems["captions/a/00001.parquet"].startswith("was made by another")


def test_a_stale_table_is_told_and_not_compared(tables: Tables) -> None:
    edit_manifest(tables["captions/a"], fingerprint="0" * 64)
    problems = [one.problem for one in find(tables, "scores/clip/a")]
    assert len(problems) == 1 and "captions/a was made anew" in problems[0]


def test_the_command_tells_each_violation_and_fails(tables: Tables, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tables["captions/a"], "00000", lambda rows: rows[1:])
    uri = tables["images"].dataset_uri
    assert job.main(["--dataset_uri", uri]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("captions/a/00000.parquet: lacks 1 id") and told[-1].endswith("2 violations")
    assert job.main(["--dataset_uri", uri, "--tables", "[captions/b, images]"]) == 0
    assert job.main(["--dataset_uri", uri, "--tables", "[captions/none]"]) == 1
    assert "no table 'captions/none'" in capsys.readouterr().err
    assert job.main(["--dataset_uri", f"{uri}/nothing"]) == 1


def test_ids_come_twice_in_many() -> None:
    digests = {number: [f"{number:02x}{row * 2654435761:016x}" for row in range(2000)] for number in range(80)}
    ids = {str(number): [digest.ljust(64, "0") for digest in here] for number, here in digests.items()}
    ids["77"][100] = ids["3"][7]
    with SeenIds(list(ids)) as seen:
        threads = [threading.Thread(target=seen.add, args=item) for item in ids.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(seen.suspects()) == [(ids["3"][7][:16], ["3", "77"])]
