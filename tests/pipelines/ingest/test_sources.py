"""Folders, tars and Parquet files give the same rows, and what cannot be read is told."""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ingest.readers import SOURCE_ROWS, count_samples, read_parts
from pipelines.ingest.sources import Part, find_source, list_parts

IMAGE = b"the readers do not decode"


def read_all(uri: Path, **options) -> list[dict]:
    source = find_source(str(uri), "auto", **options)
    table = read_parts(source, list_parts(source))
    assert table.schema == SOURCE_ROWS
    return table.to_pylist()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_folder_with_captions_beside(tmp_path):
    files = {
        "a.jpg": IMAGE + b"a",
        "a.txt": "\ufeffA caption, with an é. \n".encode(),
        "deep/er/b.PNG": IMAGE + b"b",
        "deep/er/b.json": b'{"caption": "from json", "license": "CC0", "score": NaN}',
        "c [1] #?.webp": IMAGE + b"c",
        "c [1] #?.json": b'{"text": "named text"}',
        "d::e.png": IMAGE + b"g",
        "both.gif": IMAGE + b"d",
        "both.txt": b"from txt",
        "both.json": b'{"caption": "from json"}',
        "broken.tiff": IMAGE + b"e",
        "broken.json": b"{not json",
        "alone.bmp": IMAGE + b"f",
        "alone.txt": b"  \n",
        "annotations.json": b"{}",
        "readme.md": b"no image",
        ".hidden.jpg": IMAGE,
        ".cache/x.jpg": IMAGE,
    }
    write_files(tmp_path, files)
    rows = {row["source_uri"].removeprefix(f"{tmp_path}/"): row for row in read_all(tmp_path)}
    assert list(rows) == sorted(["a.jpg", "deep/er/b.PNG", "c [1] #?.webp", "d::e.png", "both.gif", "broken.tiff", "alone.bmp"])
    assert all(row["image_bytes"] == files[name] and row["error"] is None for name, row in rows.items())
    assert {name: row["caption"] for name, row in rows.items()} == {
        "a.jpg": "A caption, with an é.",
        "deep/er/b.PNG": "from json",
        "c [1] #?.webp": "named text",
        "d::e.png": None,
        "both.gif": "from txt",
        "broken.tiff": None,
        "alone.bmp": None,
    }
    assert json.loads(rows["deep/er/b.PNG"]["metadata"]) == {"license": "CC0", "score": None}
    assert json.loads(rows["both.gif"]["metadata"]) == {"caption": "from json"}
    assert "sidecar_error" in json.loads(rows["broken.tiff"]["metadata"])
    assert rows["a.jpg"]["metadata"] is None


def test_files_that_cannot_be_read(tmp_path):
    write_files(tmp_path, {"a.jpg": IMAGE, "b.jpg": IMAGE, "c.jpg": IMAGE, "c.txt": b"gone soon"})
    source = find_source(str(tmp_path), "auto")
    parts = list_parts(source)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "b.jpg").mkdir()
    (tmp_path / "c.txt").unlink()
    rows = read_parts(source, parts).to_pylist()
    assert [row["error"] for row in rows] == ["missing_source", "unreadable", None]
    assert rows[0]["source_uri"] == f"{tmp_path}/a.jpg" and rows[0]["image_bytes"] is None
    assert "c.txt" in json.loads(rows[2]["metadata"])["sidecar_error"]


def test_names_that_are_no_utf8(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"bad\xe9.png")]
    (tmp_path / names[0]).write_bytes(IMAGE)
    (tmp_path / names[1]).mkdir()
    rows = read_parts(find_source(str(tmp_path), "auto"), [Part(name, len(IMAGE)) for name in names]).to_pylist()
    assert [row["source_uri"] for row in rows] == [f"{tmp_path}/caf\\udce9.png", f"{tmp_path}/bad\\udce9.png"]
    assert rows[0]["image_bytes"] == IMAGE and "bad\\udce9.png" in rows[1]["detail"]


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_webdataset(tmp_path, name, mode):
    members = {
        "./0001.jpg": IMAGE + b"1",
        "./0001.txt": b"one",
        "./0001.json": b'{"url": "http://one"}',
        "0002.cls": b"7",
        "0002.png": IMAGE + b"2",
        "0003.json": b'{"caption": "three"}',
        "0003.jpg": IMAGE + b"3",
        "._0001.jpg": b"of a Mac",
    }
    write_tar(tmp_path / name, members, mode)
    for uri in (tmp_path, tmp_path / name):
        rows = read_all(uri)
        assert [row["source_uri"] for row in rows] == [
            f"{tmp_path}/{name}#{member}" for member in members if member[-3:] in "jpg png"
        ][:3]
        assert [row["caption"] for row in rows] == ["one", None, "three"]
        assert [row["image_bytes"][-1:] for row in rows] == [b"1", b"2", b"3"]
    assert json.loads(rows[0]["metadata"]) == {"url": "http://one"}
    source = find_source(str(tmp_path), "auto")
    assert count_samples(source, Part(name, 0)) == 3
    assert [row["caption"] for row in read_parts(source, [Part(name, 0, start=1, stop=3)]).to_pylist()] == [None, "three"]


def test_a_compressed_tar_is_read_through_twice_and_not_for_each_image(tmp_path, monkeypatch):
    rewinds = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda reader: (rewinds.append(1), rewind(reader))[1])
    members = {
        f"{index:02}.{ending}": np.random.default_rng(index).bytes(9000) if ending == "jpg" else b'{"text": "one"}'
        for index in range(20)
        for ending in ("jpg", "json", "txt")
    }
    write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    rows = read_all(tmp_path / "x.tar.gz")
    assert [row["image_bytes"] for row in rows] == [members[name] for name in members if name.endswith("jpg")]
    assert len(rewinds) <= 2


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_truncated_tar_keeps_what_came_before(tmp_path, name, mode, kept):
    contents = [np.random.default_rng(index).bytes(3000) for index in range(20)]
    path = tmp_path / name
    write_tar(path, {f"{index:04}.jpg": content for index, content in enumerate(contents)}, mode)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    *rows, last = read_all(path)
    assert 3 <= len(rows) <= 16
    assert [row["image_bytes"] for row in rows] == contents[: len(rows)]
    assert all(row["error"] is None for row in rows)
    assert (last["error"], last["source_uri"], last["image_bytes"]) == ("truncated", str(path), None)


def test_tar_cut_at_each_place_is_told(tmp_path):
    """Also within a header or between two members, where Python's tarfile ends as if all were well."""
    path = tmp_path / "x.tar"
    write_tar(path, {f"{index}.jpg": bytes([index]) * 700 for index in range(3)})
    content = path.read_bytes()
    sample = 512 + 1024  # header and content, padded
    for cut, complete in [
        (sample, 1),
        (sample + 100, 1),
        (sample + 512, 1),
        (sample + 600, 1),
        (2 * sample, 2),
        (3 * sample, 3),
    ]:
        path.write_bytes(content[:cut])
        *rows, last = read_all(path)
        assert (len(rows), last["error"]) == (complete, "truncated"), cut
        assert count_samples(find_source(str(path), "auto"), Part("x.tar", 0)) in (complete, complete + 1)
    path.write_bytes(b"no tar at all" * 100)
    assert [row["error"] for row in read_all(path)] == ["unreadable"]
    assert count_samples(find_source(str(path), "auto"), Part("x.tar", 0)) is None


def huggingface_images(contents: list[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": content, "path": "x.jpg"} for content in contents])


@pytest.mark.parametrize(("column", "caption"), [("image", "text"), ("jpg", "caption"), ("image_bytes", "txt")])
def test_parquet(tmp_path, column, caption):
    contents = [IMAGE + bytes([index]) for index in range(10)]
    contents[4] = None
    images = huggingface_images(contents) if column == "image" else pa.array(contents, pa.binary())
    texts = pa.array([f" {i} " for i in range(10)])
    columns = {
        "thumbnail": pa.array([b"other bytes"] * 10),
        caption: {"caption": texts.dictionary_encode(), "txt": texts.cast(pa.string_view())}.get(caption, texts),
        column: images,
        "width": range(10),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=3)
    rows = read_all(tmp_path)
    missing = "missing_source" if column == "image" else "unreadable"  # of the one there is a path, of the other nothing
    assert [row["image_bytes"] for row in rows] == contents
    assert [row["caption"] for row in rows] == [str(index) for index in range(10)]
    assert [row["error"] for row in rows] == [None] * 4 + [missing] + [None] * 5
    assert (rows[7]["source_uri"], json.loads(rows[7]["metadata"])) == (f"{tmp_path}/x.parquet#7", {"width": 7})
    source = find_source(str(tmp_path / "x.parquet"), "auto")
    assert count_samples(source, Part("x.parquet", 0)) == 10
    sliced = read_parts(source, [Part("x.parquet", 0, start=2, stop=5), Part("x.parquet", 0, start=8)])
    assert sliced.to_pylist() == rows[2:5] + rows[8:]


def test_parquet_columns_by_config(tmp_path):
    pq.write_table(pa.table({"photo": [IMAGE], "title": ["named"], "text": ["not this"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet has no column of image bytes.*photo \(binary\), title"):
        read_all(tmp_path)
    with pytest.raises(ValueError, match="caption_column='heading'"):
        read_all(tmp_path, image_column="photo", caption_column="heading")
    [row] = read_all(tmp_path, image_column="photo", caption_column="title")
    assert (row["image_bytes"], row["caption"], json.loads(row["metadata"])) == (IMAGE, "named", {"text": "not this"})


def captions_by_key(rows: list[dict]) -> list[tuple[str | None, str | None]]:
    return [(row["caption_key"], row["caption"]) for row in rows]


def test_the_keys_of_captions_are_configuration_and_the_one_that_was_used_is_told(tmp_path):
    nvlabs = b'{"file_name": "0.jpg", "prompt": "a cat", "width": 8, "height": 8}'
    members = {
        "0.jpg": IMAGE + b"0",
        "0.json": nvlabs,
        "1.jpg": IMAGE + b"1",
        "1.json": b'{"Captions": [" ", "one", "two"], "prompt": null, "raw": "as found"}',
        "2.jpg": IMAGE + b"2",
        "2.json": b'{"TEXT": "upper case", "prompt": "after text", "raw": "as found"}',
        "3.jpg": IMAGE + b"3",
        "3.json": b'{"captions": [{"raw": "no text"}], "raw": "as found"}',
        "4.jpg": IMAGE + b"4",
        "4.txt": b"a file",
    }
    write_tar(tmp_path / "tar/x.tar", members)
    rows = read_all(tmp_path / "tar")
    expected = [("prompt", "a cat"), ("Captions", "one"), ("TEXT", "upper case"), (None, None), (".txt", "a file")]
    assert captions_by_key(rows) == expected
    assert json.loads(rows[0]["metadata"]) == {"file_name": "0.jpg", "width": 8, "height": 8}
    assert json.loads(rows[1]["metadata"]) == {"Captions": [" ", "one", "two"], "raw": "as found"}  # no caption is lost
    rows = read_all(tmp_path / "tar", caption_keys=("Raw", "prompt"))
    assert captions_by_key(rows) == [("prompt", "a cat"), *[("raw", "as found")] * 3, (".txt", "a file")]

    columns = {"image": [IMAGE, IMAGE], "prompt": ["after", "after"], "captions": [["one", "two"], None]}
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "parquet/x.parquet")
    assert captions_by_key(read_all(tmp_path / "parquet")) == [("prompt", "after")] * 2
    rows = read_all(tmp_path / "parquet", caption_keys=("CAPTIONS",))
    assert captions_by_key(rows) == [("captions", "one"), (None, None)]
    assert json.loads(rows[0]["metadata"]) == {"prompt": "after", "captions": ["one", "two"]}


def test_damaged_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [IMAGE * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert count_samples(find_source(str(path), "auto"), Part("x.parquet", 0)) is None
    assert [row["error"] for row in read_all(path)] == ["unreadable"]


def test_sources_of_no_kind_or_several(tmp_path):
    with pytest.raises(ValueError, match=r"holds nothing to ingest \(no files\): give a folder of images"):
        find_source(str(tmp_path), "auto")
    write_files(tmp_path, {"photos/x.zip": b"PK", "photos/notes.md": b""})
    with pytest.raises(ValueError, match=r"holds nothing to ingest \(1 .md files, 1 .zip files\)"):
        find_source(str(tmp_path / "photos"), "auto")
    for name, close in {"fotos": "photos", "phots/": "photos", "photos.tar": "photos"}.items():
        with pytest.raises(ValueError, match=rf"{name}' is not there \(did you mean {tmp_path}/{close}\?\): give a folder"):
            find_source(f"{tmp_path}/{name}", "auto")
    with pytest.raises(ValueError, match="'memory://nowhere/photos' is not there: give"):
        find_source("memory://nowhere/photos", "auto")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe' is a pipe, a socket or a device"):
        find_source(str(tmp_path / "pipe"), "auto")
    shutil.rmtree(tmp_path / "photos")
    write_files(tmp_path, {"a.jpg": IMAGE, "notes.md": b""})
    write_tar(tmp_path / "x.tar", {"b.jpg": IMAGE})
    with pytest.raises(ValueError, match=r"1 for 'folder', 1 for 'webdataset'.*source_kind"):
        find_source(str(tmp_path), "auto")
    assert [part.path for part in list_parts(find_source(str(tmp_path), "webdataset"))] == ["x.tar"]
    assert [part.path for part in list_parts(find_source(str(tmp_path), "folder"))] == ["a.jpg"]


def test_the_dataset_within_the_source_is_not_seen(tmp_path):
    write_files(tmp_path, {"a.jpg": IMAGE, "dataset/images/00000.parquet": b"", "dataset2/b.jpg": IMAGE})
    exclude = str(tmp_path / "dataset")
    source = find_source(str(tmp_path), "auto", exclude=exclude)
    assert [part.path for part in list_parts(source, exclude)] == ["a.jpg", "dataset2/b.jpg"]


def test_any_file_system():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/photos/a/b.jpg", IMAGE)
    memory.pipe_file("/photos/a/b.txt", b"seen")
    source = find_source("memory://photos", "auto")
    [row] = read_parts(source, list_parts(source)).to_pylist()
    assert (row["source_uri"], row["image_bytes"], row["caption"]) == ("memory://photos/a/b.jpg", IMAGE, "seen")
    memory.rm("/photos", recursive=True)
