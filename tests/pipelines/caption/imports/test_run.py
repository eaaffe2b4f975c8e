"""Captions that others made arrive at their images, by every layout and kind of key; what does not arrive is told."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.caption.imports import run as stage
from pipelines.caption.imports.config import ImportConfig
from pipelines.caption.imports.run import COUNTS, NOT_IMPORTED, CaptionImport
from pipelines.reports.captions import captions_report
from pipelines.stages.contract import Progress
from pipelines.tables.errors import StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGES, IMAGES_PATH, SCORES, Row
from pipelines.tables.table import Table
from tests.support.html_page import check_page
from tests.support.whole_dataset import image_row, write_table

VLM = "InternVL2-26B"


def make_images(dataset: str, uris: list[list[str]], metadata: dict[str, Row] | None = None) -> dict[str, str]:
    """Write `images` with an image for each URI, in shards; returns the ids by URI."""
    notes = metadata or {}
    rows = [
        [image_row(uri) | {"source_uri": uri, "metadata": json.dumps(notes[uri]) if uri in notes else None} for uri in shard]
        for shard in uris
    ]
    table = Table(dataset, IMAGES_PATH, IMAGES)
    write_table(table, Identity("ingest", {}, {}, {}), {f"{number:05}": (shard, []) for number, shard in enumerate(rows)})
    return {row["source_uri"]: row["id"] for shard in rows for row in shard}


def make_id(uri: str) -> str:
    return str(image_row(uri)["id"])


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def importer(dataset: Path | str, source: Path | str | list[str], **options: Any) -> CaptionImport:
    source = source if isinstance(source, list) else str(source)
    return CaptionImport(str(dataset), ImportConfig(**{"name": "vlm", "source": source, "clip": "nvlabs"} | options))


def captions_of(done: CaptionImport) -> dict[str, str]:
    """Captions by id. Checks what jobs.verify does: the rows and rejects of each shard are the images of that shard."""
    found: dict[str, str] = {}
    for shard in done.images.list_shards():
        rows = done.captions.read_shard(shard).to_pylist()
        refused = done.captions.rejects().read_shard(shard).to_pylist()
        images = done.images.read_shard(shard, ["id"])["id"].to_pylist()
        assert sorted([*(row["id"] for row in rows), *(row["id"] for row in refused)]) == sorted(images)
        assert all(row["num_tokens"] == len(row["caption"].split()) for row in rows)
        found |= {row["id"]: row["caption"] for row in rows}
    return found


def scores_of(done: CaptionImport) -> dict[str, float]:
    """Scores by id. Checks that the rows and rejects of each shard are the captions of that shard."""
    found: dict[str, float] = {}
    for shard in done.captions.list_shards():
        rows = done.scores.read_shard(shard).to_pylist()
        refused = done.scores.rejects().read_shard(shard, ["id"])["id"].to_pylist()
        captions = done.captions.read_shard(shard, ["id"])["id"].to_pylist()
        assert sorted([*(row["id"] for row in rows), *refused]) == sorted(captions)
        found |= {row["id"]: row["clip_score"] for row in rows}
    return found


def told(done: CaptionImport) -> list[tuple[str, str]]:
    content = fsspec.open(f"{done.captions.uri}/{NOT_IMPORTED}").open().read().decode()
    return [(row["reason"], row["key"]) for row in map(json.loads, content.splitlines())]


def test_nvlabs_folder_with_scores_and_another_vlm_beside(tmp_path: Path) -> None:
    """As asset/example_data of NVlabs' repository: the caption stands under the VLM's name, the score is a text."""
    raw = tmp_path / "raw"
    uris = [[f"{raw}/00000000.png", f"{raw}/sub/00000000.png"], [f"{raw}/sub/a.b.jpg"], [f"{raw}/c.png"]]
    ids = make_images(str(tmp_path / "data"), uris)
    for stem, caption, score in [
        ("00000000", "a cat", "27.1037"),
        ("sub/00000000", "a dog", "26.5"),
        ("sub/a.b", "a bird", None),
        ("sub/refused", "an image that ingest refused", "20"),
        ("d/c", "of another folder", "20"),
    ]:
        key = stem.rpartition("/")[2]
        write(raw / f"{stem}_{VLM}.json", {key: {VLM: caption}})
        write(raw / f"{stem}_VILA1-5-13B.json", {key: {"VILA1-5-13B": "another VLM's"}})
        if score:
            write(raw / f"{stem}_{VLM}_clip_score.json", {key: {VLM: score}})
    with pytest.raises(ValueError, match=r"say of which VLM to read them, such as --captions.vlm InternVL2-26B"):
        importer(tmp_path / "data", raw)
    done = importer(tmp_path / "data", raw, vlm=VLM)
    result = done.run()
    assert captions_of(done) == {ids[uris[0][0]]: "a cat", ids[uris[0][1]]: "a dog", ids[uris[1][0]]: "a bird"}
    assert result.rejects_by_reason == {"no_caption": 1}
    assert sorted(told(done)) == [("unmatched", "c"), ("unmatched", "refused")]
    counts = done.read_counts()
    assert (counts["captions"], counts["matched"], counts["scores"], counts["keys"]) == (5, {"path": 3}, 2, {VLM: 5})
    assert counts["other_files"] == {".json": 5}
    assert done.has_scores() and done.run_scores().was_done  # they were made along with the captions
    assert scores_of(done) == pytest.approx({ids[uris[0][0]]: 27.1037, ids[uris[0][1]]: 26.5})
    page = check_page(captions_report(str(tmp_path / "data"), "vlm"))
    assert "their words are counted" in page.text and "a dog" in page.text
    moved = tmp_path / "moved"
    raw.rename(moved)
    by_name = importer(tmp_path / "data", moved, name="moved", vlm=VLM, match="file_name")
    by_name.run()  # folders decide where names are the same, and "d/c" is the only c
    expected = {uris[0][1]: "a dog", uris[1][0]: "a bird", uris[2][0]: "of another folder"}
    assert captions_of(by_name) == {ids[uri]: caption for uri, caption in expected.items()}
    assert sorted(told(by_name)) == [("ambiguous", "00000000"), ("unmatched", "refused")]


def test_nvlabs_files_beside_tars(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    uris = [[f"{raw}/0.tar#./00.jpg", f"{raw}/0.tar#01.jpg"], [f"{raw}/deep/1.tar.gz#x/00.jpg"]]
    ids = make_images(str(tmp_path / "data"), uris)
    write(raw / f"0_{VLM}.json", {"00": {"prompt": "a cat"}, "01": {VLM: "a dog", "note": "x"}})
    write(raw / f"0_{VLM}_clip_score.json", {"00": {"prompt": 30}, "01": {VLM: "x"}, "02": {VLM: "25"}})
    write(raw / f"deep/1_{VLM}.json", {"x/00": {"caption": "a bird"}, "00": {VLM: "no member of the tar"}})
    write(raw / f"2_{VLM}.json", {"00": {VLM: "of a tar that was not ingested"}})
    write(raw / f"3_{VLM}.json", "{cut off")
    for source in (raw, f"{raw}/**/*_{VLM}.json"):
        done = importer(
            tmp_path / "data", source, name=VLM if source == raw else "by_pattern", vlm=None if source == raw else VLM
        )
        done.run()
        assert captions_of(done) == dict(zip(ids.values(), ["a cat", "a dog", "a bird"], strict=True))
        assert scores_of(done) == {ids[uris[0][0]]: 30}
        assert sorted(told(done)) == [
            ("bad_score", "01"), ("bad_score", "02"), ("unmatched", "00"), ("unmatched", "00"), ("unreadable", ""),
        ]  # fmt: skip


URIS = [
    ["/photos/a/cat.png", "/photos/b/cat.png", "https://host/x/dog.jpg?size=1"],
    ["s3://bucket/photos/bird.webp", "/sets/rows.parquet#7", "/sets/0.tar#0001.jpg"],
]
METADATA = {"/sets/0.tar#0001.jpg": {"URL": "https://host/fish.jpg", "key": "0001"}}


def rows_by(kind: str, ids: dict[str, str]) -> tuple[list[Row], list[str]]:
    """Rows with captions by some kind of key, and the URIs of the images that they are about."""
    keys = {
        "id": {"id": list(ids.values()), "of": list(ids)},
        "file_name": {
            "file_name": ["a/cat.png", "/photos/b/cat.png", "dog.jpg", "bird", "0001.jpg"],
            "of": [*URIS[0], URIS[1][0], URIS[1][2]],
        },
        "url": {
            "URL": ["https://host/x/dog.jpg?size=1", "https://host/fish.jpg"],
            "of": [URIS[0][2], URIS[1][2]],
        },
    }[kind]
    name, values = next(iter(keys.items()))
    return [
        {name: value, "text": f" caption {index} ", "clip_score": 20.5 + index} for index, value in enumerate(values)
    ], keys["of"]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows).append_column("image", pa.array([b"x"] * len(rows))), path, row_group_size=2)
        return
    lines = [json.dumps(row) for row in rows]
    if ".csv" in path.name or ".tsv" in path.name:
        mark = "\t" if ".tsv" in path.name else ","
        lines = [mark.join(map(str, line)) for line in (list(rows[0]), *(list(row.values()) for row in rows))]
    content = json.dumps(rows) if path.suffix == ".json" else "\n".join(lines)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


@pytest.mark.parametrize("kind", ["id", "file_name", "url"])
def test_tables_of_every_format_by_every_kind_of_key(kind: str, tmp_path: Path) -> None:
    ids = make_images(str(tmp_path / "data"), URIS, METADATA)
    rows, of = rows_by(kind, ids)
    expected = {ids[uri]: f"caption {index}" for index, uri in enumerate(of)}
    for name in ("x.parquet", "x.jsonl", "x.json", "x.csv", "x.tsv.gz", "x.ndjson.gz"):
        write_rows(tmp_path / name, rows)
        done = importer(tmp_path / "data", tmp_path / name, name=f"by-{name}")
        result = done.run()
        assert captions_of(done) == expected, name
        assert done.read_counts()["not_taken"] == {} and sum(done.read_counts()["matched"].values()) == len(rows)
        assert result.rejects_by_reason.get("no_caption", 0) == len(ids) - len(rows)
        assert scores_of(done) == {ids[uri]: 20.5 + index for index, uri in enumerate(of)}


def test_what_does_not_arrive_is_told(tmp_path: Path) -> None:
    ids = make_images(str(tmp_path / "data"), URIS, METADATA)
    rows: list[Row] = [
        {"file_name": "cat.png", "caption": "which of the two?"},
        {"file_name": "x/cat.png", "caption": "in another folder"},
        {"file_name": "b/cat.png", "caption": " "},
        {"file_name": "bird", "caption": ""},
        {"file_name": "bird.webp", "captions": ["first", "second", "third"]},
        {"file_name": "photos/bird", "text": "repeated", "similarity": 1e39},
        {"file_name": "7", "caption": "the row of a Parquet file has no file name"},
        {"width": 5, "caption": "of what?"},
        {"file_name": "0001", "caption": "a fish", "similarity": "high"},
    ]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in/a.jsonl", rows)
    (tmp_path / "in/b.jsonl").write_text('{"file_name": "none", "caption": "x"}\n{cut\n[1]\n')
    (tmp_path / "in/c.parquet").write_bytes(b"no Parquet")
    (tmp_path / "in/d.csv.gz").write_bytes(gzip.compress(b"file_name,caption\n" + b"none,x\n" * 500)[:-20])
    (tmp_path / "in/notes.md").write_text("x")
    done = importer(tmp_path / "data", tmp_path / "in")
    result = done.run()
    assert captions_of(done) == {ids[URIS[1][0]]: "first", ids[URIS[1][2]]: "a fish"}
    assert result.rejects_by_reason == {"no_caption": 3, "empty_caption": 1}
    counts = done.read_counts()
    lost = dict(counts["not_taken"])
    cut = sum(key == "none" for _, key in told(done)) - 1  # as many rows of the cut file as could be read
    assert lost.pop("unmatched") == 3 + cut
    assert lost == {
        "ambiguous": 1, "empty": 2, "repeated": 1, "others_of_a_list": 2, "no_key": 1, "unreadable": 4, "bad_score": 2,
    }  # fmt: skip
    assert counts["captions"] == sum(counts["matched"].values()) + 3 + cut + 1 + 2 + 1  # all are accounted for
    assert counts["keys"]["captions"] == 1 and counts["other_files"] == {".md": 1}
    assert not done.has_scores()
    lines = [json.loads(line) for line in (tmp_path / "data/captions/vlm" / NOT_IMPORTED).read_text().splitlines()]
    [ambiguous] = [line for line in lines if line["reason"] == "ambiguous"]
    assert (ambiguous["file"], ambiguous["row"], ambiguous["key"]) == (f"{tmp_path}/in/a.jsonl", 0, "cat.png")
    unreadable = {Path(line["file"]).name for line in lines if line["reason"] == "unreadable"}
    assert unreadable == {"b.jsonl", "c.parquet", "d.csv.gz"}
    by_name = importer(tmp_path / "data", tmp_path / "in/a.jsonl", name="by_name", match="file_name")
    by_name.run()
    assert ("ambiguous", "x/cat.png") in told(by_name)


def csv(*lines: str) -> str:
    return "\n".join(lines) + "\n"


FIRST, SECOND, THIRD = (make_id(uri) for uri in ("/p/a/cat.png", "/p/b/dog.png", "/p/c/7.png"))
LONG = "word " * 1000
ODD: dict[str, tuple[str, bytes | str, dict[str, str], dict[str, int]]] = {
    "a byte order mark": ("x.csv", "\ufeff" + csv("id,caption", f"{FIRST},über"), {FIRST: "über"}, {}),
    "UTF-16": ("x.csv", csv("id,caption", f"{FIRST},über").encode("utf-16"), {FIRST: "über"}, {}),
    "UTF-16 without a mark": ("x.csv", csv("id,caption", f"{FIRST},über").encode("utf-16-le"), {FIRST: "über"}, {}),
    "JSON lines in UTF-16": ("x.jsonl", json.dumps({"id": FIRST, "text": "a"}).encode("utf-16-be"), {FIRST: "a"}, {}),
    "JSON with a mark": ("x.json", '\ufeff{"dog": "a"}', {SECOND: "a"}, {}),
    "ids that come twice": (
        "x.csv", csv("id,caption", f"{FIRST},one", f"{FIRST},two", f"{SECOND},", f"{SECOND},b"),
        {FIRST: "one", SECOND: "b"}, {"repeated": 1, "empty": 1},
    ),
    "two columns of ids": ("x.csv", csv("id,image_id,caption", f"5,{FIRST},a", f"6,{SECOND},b"), {FIRST: "a", SECOND: "b"}, {}),
    "ids of others beside names": ("x.csv", csv("id,file_name,caption", "7,cat.png,a"), {FIRST: "a"}, {}),
    "ids in capitals": ("x.csv", csv("id,caption", f"{FIRST.upper()},a"), {FIRST: "a"}, {}),
    "long and without a text": (
        "x.csv", csv("id,caption", f"{FIRST},{LONG}", f"{SECOND}, \t ", f"{THIRD},\u200b\u2800"),
        {FIRST: LONG.strip()}, {"empty": 2},
    ),
    "scores that are none": (
        "x.csv", csv("id,text,clip_score", f"{FIRST},a,nan", f"{SECOND},b,-inf", f'{THIRD},c,"27,5"'),
        {FIRST: "a", SECOND: "b", THIRD: "c"}, {"bad_score": 3},
    ),
    "a truth value as a score": (
        "x.jsonl", json.dumps({"id": FIRST, "text": "a", "clip_score": True}), {FIRST: "a"}, {"bad_score": 1},
    ),
    "paths of Windows": (
        "x.csv", csv("file,path,text", "1,a\\cat.png,a", "2,D:\\b\\dog.png,b"), {FIRST: "a"}, {"unmatched": 1},
    ),
    "a comma without quotes": ("x.csv", csv("id,text", f"{FIRST},a,b", f"{SECOND},c"), {SECOND: "c"}, {"unreadable": 1}),
    "keys that come twice": ("x.json", '{"cat": "a", "dog": "b", "cat": "c"}', {FIRST: "a", SECOND: "b"}, {"repeated_key": 1}),
    "another key in a row": (
        "x.jsonl", json.dumps({"id": FIRST, "text": "a"}) + "\n" + json.dumps({"id": SECOND, "said": "b"}),
        {FIRST: "a"}, {"no_caption_key": 1},
    ),
}  # fmt: skip
NOTHING = {
    "": "x.csv has no rows",
    "id,caption\n": "x.csv has no rows",
    "id,caption\n7,a\n": r"id='7': an id is the hash of an image's bytes, 64 hexadecimal digits; .* give key_column",
    f"id,recap\n{FIRST},a\n": r"none of caption_keys \(caption, text, .*\) is among id, recap",
}
"""Tables of which nothing can be taken, and what is said of them."""


@pytest.mark.parametrize("what", ODD)
def test_odd_tables(tmp_path: Path, what: str) -> None:
    name, content, expected, lost = ODD[what]
    make_images(str(tmp_path / "data"), [["/p/a/cat.png", "/p/b/dog.png"], ["/p/c/7.png"]])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = importer(tmp_path / "data", tmp_path / name)
    done.run()
    assert captions_of(done) == expected and done.read_counts()["not_taken"] == lost
    assert len(told(done)) == sum(lost.values()) and not done.has_scores()


@pytest.mark.parametrize("content", NOTHING)
def test_tables_of_which_nothing_can_be_taken(tmp_path: Path, content: str) -> None:
    make_images(str(tmp_path / "data"), [["/p/a/cat.png"]])
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=NOTHING[content]):
        importer(tmp_path / "data", tmp_path / "x.csv").run()
    assert not (tmp_path / "data/captions/vlm/_manifest.json").exists()


def test_settings_that_say_what_is_what(tmp_path: Path) -> None:
    own = Table(str(tmp_path / "data"), "scores/own/vlm", SCORES)
    own.claim(Identity("score", {}, {}, {}))
    ids = make_images(str(tmp_path / "data"), URIS)
    bird = ids[URIS[1][0]]
    write_rows(tmp_path / "x.csv", [{"id": 7, "what": "bird.webp", "recaption": "a bird", "cosine": 0.31}])
    options: dict[str, Any] = {"key_column": "What", "caption_keys": ("Recaption",), "score_column": "cosine"}
    with pytest.raises(ValueError, match=r"none of the 0 captions .*no_key.*An image of the dataset: /photos/a/cat.png"):
        importer(tmp_path / "data", tmp_path / "x.csv").run()
    with pytest.raises(ValueError, match=r"at most 0.31.*give score_scale"):
        importer(tmp_path / "data", tmp_path / "x.csv", **options).run()
    with pytest.raises(ValueError, match=r"scores/own/vlm was made by jobs\.score, .* another folder \(captions\.clip"):
        importer(tmp_path / "data", tmp_path / "x.csv", **options, score_scale=100, clip="own").run()
    assert not (tmp_path / "data/captions/vlm/_manifest.json").exists()  # nothing was begun
    done = importer(tmp_path / "data", tmp_path / "x.csv", **options, score_scale=100)
    done.run()
    assert captions_of(done) == {bird: "a bird"} and scores_of(done) == pytest.approx({bird: 31})
    contents: list[Any] = [{"bird": "a bird"}, {"bird": ["a bird"]}, {"bird": {"any": "a bird", "n": 3}}]
    for number, content in enumerate([*contents, [{"path": "bird", "text": "a bird"}]]):
        done = importer(tmp_path / "data", write(tmp_path / "by_key.json", content), name=f"by_key{number}")
        done.run()
        assert captions_of(done) == {bird: "a bird"}
    write(tmp_path / "photos/bird.json", {"caption": "beside", "width": 3})
    with pytest.raises(ValueError, match="none of the"):
        importer(tmp_path / "data", tmp_path / "photos", name="beside").run()
    done = importer(tmp_path / "data", tmp_path / "photos", name="beside", match="file_name")
    done.run()
    assert captions_of(done) == {bird: "beside"}
    faults: list[tuple[dict[str, Any], str]] = [
        ({"name": "original"}, "original"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"source": []}, "source="),
        ({"score_scale": 0.0}, "score_scale=0.0 must be positive"),
    ]
    for faulty, named in faults:
        with pytest.raises(ValueError, match=named):
            ImportConfig(**{"name": "x", "source": "y"} | faulty)
    with pytest.raises(ValueError, match="holds no file of captions"):
        importer(tmp_path / "data", tmp_path / "none")


def files_of(table: Table) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(table.uri).glob("0*.parquet")}


def test_a_killed_import_resumes_with_the_missing_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [[f"/photos/{shard}-{row}.png" for row in range(3)] for shard in range(20)]
    make_images(str(tmp_path / "data"), uris)
    rows = [{"file_name": uri, "caption": uri, "clip_score": 30} for shard in uris for uri in shard[:2]]
    write_rows(tmp_path / "x.jsonl", rows)
    whole = importer(tmp_path / "data", tmp_path / "x.jsonl", name="whole")
    whole.run()

    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        if progress.done_shards == 11:
            raise Killed

    done = importer(tmp_path / "data", tmp_path / "x.jsonl")
    with pytest.raises(Killed):
        done.run(on_progress=kill)
    before = done.captions.list_shards()
    assert 11 <= len(before) < 20
    write_rows(tmp_path / "x.jsonl", rows[:-1])
    with pytest.raises(StaleTableError, match=r"config\.content"):
        importer(tmp_path / "data", tmp_path / "x.jsonl").run()
    write_rows(tmp_path / "x.jsonl", rows)
    made: list[str] = []
    make = CaptionImport._make_shard

    def noting(own: CaptionImport, shard: str, found: stage.Found) -> Any:
        made.append(shard)
        return make(own, shard, found)

    monkeypatch.setattr(CaptionImport, "_make_shard", noting)
    result = importer(tmp_path / "data", tmp_path / "x.jsonl").run()
    assert sorted(made) == sorted(set(whole.captions.list_shards()) - set(before)) and not result.was_done
    assert done.run_scores().num_rows == 40
    for one, other in ((done.captions, whole.captions), (done.scores, whole.scores)):
        assert one.list_shards() == other.list_shards()
        assert all(one.read_shard(shard) == other.read_shard(shard) for shard in other.list_shards())

    monkeypatch.setattr(stage, "CaptionIndex", None)  # a finished table needs none
    again = importer(tmp_path / "data", tmp_path / "x.jsonl")
    assert again.run().was_done and again.run_scores().was_done
    monkeypatch.undo()
    other_clip = importer(tmp_path / "data", tmp_path / "x.jsonl", clip="other", score_scale=2)
    assert other_clip.run().was_done and other_clip.run_scores().num_rows == 40
    assert set(scores_of(other_clip).values()) == {60.0}


def test_captions_and_dataset_on_s3(bucket_uri: str) -> None:
    dataset, raw = f"{bucket_uri}/data", f"{bucket_uri}/raw"
    uris = [[f"{raw}/{number}.png"] for number in range(3)]
    ids = make_images(dataset, uris)
    filesystem = fsspec.filesystem("s3")
    for number in range(3):
        for name, value in (("", f"caption {number}"), ("_clip_score", f"{20 + number}")):
            filesystem.pipe_file(f"{raw}/{number}_vlm{name}.json", json.dumps({f"{number}": {"vlm": value}}).encode())
    done = importer(dataset, raw)
    done.run()
    assert captions_of(done) == {ids[uri]: f"caption {number}" for number, [uri] in enumerate(uris)}
    assert scores_of(done) == {ids[uri]: 20 + number for number, [uri] in enumerate(uris)}
    assert done.run().was_done and filesystem.exists(f"{done.captions.uri}/{COUNTS}")
