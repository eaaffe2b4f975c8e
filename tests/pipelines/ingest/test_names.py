"""What rows of a list may name: each name ends as the right image or with the right reason, and nothing outside is read."""

import base64
import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ingest.download import fetch_named
from pipelines.ingest.names import find_allowed, resolve
from pipelines.ingest.readers import count_samples, read_parts
from pipelines.ingest.sources import Part, Source, find_source, list_parts
from pipelines.tables.rejects import RowRefused
from tests.support.hostile_images import encode, noise

IMAGE = encode(noise(), "PNG")
SECRET = b"SECRET of whoever runs the job"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder of lists with an image, and secrets outside it to which links lead."""
    for folder in ("lists/sub", "lists2", "outside", "base"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("lists/in.png", "lists/sub/in.png", "lists/a::b.png", "lists/%41 #?.png", "base/in.png"):
        (tmp_path / file).write_bytes(IMAGE)
    for file in ("outside/secret.png", "lists2/secret.png", "secret.png"):
        (tmp_path / file).write_bytes(SECRET)
    (tmp_path / "lists/link.png").symlink_to(tmp_path / "outside/secret.png")
    (tmp_path / "lists/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "lists/good_link.png").symlink_to("sub/in.png")
    (tmp_path / "lists/broken.png").symlink_to(tmp_path / "outside/gone.png")
    (tmp_path / "lists/loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "lists/pipe.png")
    return tmp_path


def read_list(path: Path, keys: list[str], **options: object) -> list[dict]:
    path.write_text("".join(json.dumps({"url": key}) + "\n" for key in keys))
    source = find_source(str(path), "list", copies_uri=f"{path.parent}/copies", **options)
    count_samples(source, Part(path.name, 0))
    return read_parts(source, list_parts(source)).to_pylist()


PATHS = {
    "in.png": None,
    "./sub/../in.png": None,
    "sub/in.png": None,
    "a::b.png": None,
    "%41 #?.png": None,
    "good_link.png": None,
    "{root}/lists/in.png": None,
    "file://{root}/lists/in.png": None,
    "local://{root}/lists/in.png": None,
    "{root}/outside/../lists/in.png": None,
    "../secret.png": "outside_folder",
    "sub/../../secret.png": "outside_folder",
    "{root}/secret.png": "outside_folder",
    "file://{root}/secret.png": "outside_folder",
    "local://{root}/secret.png": "outside_folder",
    "../lists2/secret.png": "outside_folder",  # a name that begins like the folder's
    "{root}/lists": "outside_folder",
    "/proc/self/environ": "outside_folder",
    "link.png": "outside_folder",
    "linked/secret.png": "outside_folder",
    "broken.png": "outside_folder",
    "/dev/zero": "outside_folder",
    "pipe.png": "unreadable",
    "loop.png": "unreadable",
    "sub": "unreadable",
    "gone.png": "missing_source",
    "in.png/x": "missing_source",
    "x" * 300: "unreadable",
    "a\0b": "unreadable",
    "~/secret.png": "missing_source",
    "FILE://{root}/secret.png": "unreadable",
    "file::{root}/secret.png": "missing_source",
    "simplecache::file://{root}/secret.png": "bad_url",
    "simplecache::http://127.0.0.1:9/x.png": "bad_url",
    "blockcache::http://127.0.0.1:9/x.png": "bad_url",
    "filecache::s3://bucket/x.png": "bad_url",
    "zip://secret.png::{root}/outside.zip": "bad_url",
    "zip://x::notazip": "bad_url",
    "tar://x::http://127.0.0.1:9/": "bad_url",
    "dir://x::file://{root}": "bad_url",
    "reference://x": "bad_url",
    "ftp://127.0.0.1:1/a.jpg": "bad_url",
    "sftp://127.0.0.1:1/a.jpg": "bad_url",
    "webhdfs://127.0.0.1:1/a.jpg": "bad_url",
    "github://x:y@main/z.png": "bad_url",
    "jupyter://127.0.0.1:1/x": "bad_url",
    "nowhere://x": "bad_url",
    "https::http://127.0.0.1/x": "bad_url",
    "//127.0.0.1:1/x.png": "private_address",
    "https://127.0.0.1:1/x.png": "private_address",
    "memory://bucket/gone.png": "missing_source",
    "memory://b::file://{root}/secret.png": "missing_source",  # the name of an object
}


def test_local_paths_and_protocols(world: Path) -> None:
    keys = [key.replace("{root}", str(world)) for key in PATHS]
    rows = read_list(world / "lists/list.jsonl", keys)
    assert dict(zip(PATHS, [row["error"] for row in rows], strict=True)) == PATHS
    assert {row["image_bytes"] for row in rows} == {IMAGE, None}
    assert not any("SECRET" in str(row) for row in rows)
    assert all("base_uri" in row["detail"] for row in rows if row["error"] == "outside_folder")


def test_the_folders_that_are_open(world: Path) -> None:
    keys = ["in.png", "../base/in.png", "../secret.png", f"{world}/lists/in.png", f"{world}/secret.png"]
    rows = read_list(world / "lists/list.jsonl", keys, base_uri=str(world / "base"))
    assert [row["error"] for row in rows] == [None, None, "outside_folder", None, "outside_folder"]
    rows = read_list(world / "lists/list.jsonl", ["lists/link.png", "outside/secret.png", "/etc/passwd"], base_uri=str(world))
    assert [row["error"] for row in rows] == [None, None, "outside_folder"]
    (world / "linked_list").symlink_to(world / "lists")  # the folder is what whoever runs the job has given
    assert [row["error"] for row in read_list(world / "linked_list/list.jsonl", ["in.png", "../secret.png"])] == [
        None, "outside_folder"
    ]  # fmt: skip


def test_paths_in_parquet_rows(world: Path) -> None:
    images = [{"bytes": None, "path": path} for path in ("in.png", "link.png", "/proc/self/environ", "../secret.png")]
    pq.write_table(pa.table({"image": [*images, {"bytes": IMAGE, "path": "/proc/self/environ"}]}), world / "lists/x.parquet")
    rows = read_parts(find_source(str(world / "lists/x.parquet"), "parquet"), [Part("x.parquet", 0)]).to_pylist()
    assert [row["error"] for row in rows] == [None, *["outside_folder"] * 3, None]
    assert {row["image_bytes"] for row in rows} == {IMAGE, None}


@pytest.mark.parametrize(
    ("key", "folder", "expected"),
    [
        ("//host/x.png", "/lists", "https://host/x.png"),
        ("//host/x.png", "http://a/b", "http://host/x.png"),
        ("/x.png", "http://a/b/c", "http://a/x.png"),  # not a file of this machine
        ("/x.png", "s3://bucket/lists", "/x.png"),
        ("x.png", "http://a/b", "http://a/b/x.png"),
        ("../x.png", "s3://bucket/lists", "s3://bucket/lists/../x.png"),
        ("DATA:image/png,x", "/lists", "data:image/png,x"),
        ("data.png", "/lists", "/lists/data.png"),
    ],
)
def test_what_a_key_means(key: str, folder: str, expected: str) -> None:
    assert resolve(key, folder) == expected


@pytest.mark.parametrize(
    ("uri", "folders", "allowed"),
    [
        ("s3://other/a::b?versionId=x.png", ["/lists"], True),
        ("gs://bucket/x.png", ["/lists"], True),
        ("hdfs://nn/data/x.png", ["hdfs://nn/data"], True),
        ("hdfs://nn/data/../x.png", ["hdfs://nn/data"], False),
        ("hdfs://nn/database/x.png", ["hdfs://nn/data"], False),
        ("hdfs://other/data/x.png", ["hdfs://nn/data"], False),
        ("hdfs://nn/data/x::file:///etc/passwd", ["hdfs://nn/data"], False),
        ("/etc/passwd", ["s3://bucket"], False),
        ("/etc/passwd", ["/"], True),
    ],
)
def test_folders_of_other_file_systems(uri: str, folders: list[str], allowed: bool) -> None:
    if allowed:
        assert find_allowed(uri, folders) == uri
    else:
        with pytest.raises(RowRefused):
            find_allowed(uri, folders)


BASE64 = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"data:image/png;base64,{BASE64}", IMAGE),
        (f"DATA:;charset=x;BASE64,{BASE64[:40]} \n {BASE64[40:].rstrip('=')}", IMAGE),
        (f"data:image/png;base64,{base64.urlsafe_b64encode(IMAGE).decode()}", IMAGE),
        (f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}", IMAGE),
        ("data:image/png," + "".join(f"%{byte:02x}" for byte in IMAGE), IMAGE),
        ("data:,plain%20text", b"plain text"),
        ("data:image/png;base64,", b""),
        ("data:image/png;base64", "bad_url"),
        ("data:image/png;base64,@@@@", "bad_url"),
        ("data:image/png;base64,AAAAA", "bad_url"),
        (f"data:image/png;base64,{'A' * 40_000}", "too_many_bytes"),
        (f"data:,{'%41' * 20_001}", "too_many_bytes"),
    ],
)
def test_data_urls(tmp_path: Path, url: str, expected: bytes | str) -> None:
    source = Source(str(tmp_path), None, "list", max_bytes=20_000)
    [found] = fetch_named(source, [("list.csv", source.resolve("list.csv", url))])
    assert (found.reason if isinstance(found, RowRefused) else found) == expected


def test_a_data_url_is_named_by_its_row(world: Path) -> None:
    rows = read_list(world / "lists/list.jsonl", ["in.png", f"data:image/png;base64,{BASE64}", "data:nothing"])
    assert [row["source_uri"] for row in rows[1:]] == [f"{world}/lists/list.jsonl#{index}" for index in (1, 2)]
    assert [row["error"] for row in rows] == [None, None, "bad_url"] and rows[1]["image_bytes"] == IMAGE


def test_many_large_files_are_read_in_turn(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in range(20):
        memory.pipe_file(f"/many/{name}", bytes([name]) * 1000)
        (tmp_path / str(name)).write_bytes(bytes([name]) * 1000)
    names = [f"memory://many/{name}" for name in range(20)] + [str(name) for name in range(20)]
    options = {"max_bytes": 1000, "max_shard_bytes": 30_500}
    source = Source(str(tmp_path), None, "list", **options)
    found = fetch_named(source, [("list.csv", source.resolve("list.csv", name)) for name in names])
    kept = [content for content in found if isinstance(content, bytes)]
    assert len(kept) == 30 and all(len(content) == 1000 for content in kept)
    assert {refused.reason for refused in found if isinstance(refused, RowRefused)} == {"shard_full"}
    memory.rm("/many", recursive=True)
