"""Lists of URLs and keys, with a real server that answers as the web does."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ingest import lists
from pipelines.ingest.config import DownloadConfig, IngestConfig
from pipelines.ingest.download import fetch_all
from pipelines.ingest.lists import PIECE_ROWS, copy_again
from pipelines.ingest.readers import count_samples, read_parts
from pipelines.ingest.run import run_ingest
from pipelines.ingest.sources import Part, Source, find_source, list_parts
from pipelines.storage.errors import StorageError
from pipelines.storage.lease import Leases
from pipelines.tables.errors import DamagedShardError, StaleTableError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row
from pipelines.tables.table import Table
from tests.pipelines.ingest.test_sources import write_files, write_tar
from tests.support.hostile_images import encode, noise
from tests.support.image_server import ImageServer
from tests.support.without_ray import run_without_ray

FAST = DownloadConfig(timeout=1.0, first_wait=0.05, attempts=3, allow_private=True)
IMAGE = encode(noise(), "PNG")


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with ImageServer({f"{number}.png": encode(noise(64, 64 + number), "PNG") for number in range(8)}).running() as running:
        yield running


def found(source: Source) -> list[Row]:
    parts = list_parts(source)
    for part in parts:
        count_samples(source, part)
    return read_parts(source, parts).to_pylist()


def list_source(path: Path, **options: object) -> Source:
    return find_source(
        str(path), "auto", copies_uri=str(path.parent / "copies"), exclude=str(path.parent / "copies"), **options
    )


def test_what_the_web_answers(server: ImageServer) -> None:
    expected = {
        "/good/1.png": None,
        "/moved/2.png": None,
        "/flaky/3.png": None,
        "/busy/4.png": None,
        "/good/none.png": "http_404",
        "/loop/1.png": "too_many_redirects",
        "/slow/1.png": "timeout",
        "/large/x": "too_many_bytes",
        "/endless/x": "too_many_bytes",
        "/cut/5.png": "download_failed",
        "/noai/6.png": "robots_tag",
    }
    results = fetch_all([server.url + path for path in expected], FAST, 100_000, 2**30)
    for (path, reason), result in zip(expected.items(), results, strict=True):
        if reason is None:
            assert result == server.images[path.rsplit("/", 1)[-1]], path
        else:
            assert isinstance(result, RowRefused) and (result.reason, bool(result.detail)) == (reason, True), path
    tries = {path: server.answers[path] for path in expected}
    assert {path for path, count in tries.items() if count == 1} >= {"/good/none.png", "/large/x", "/endless/x", "/noai/6.png"}
    assert (tries["/flaky/3.png"], tries["/busy/4.png"], tries["/slow/1.png"], tries["/cut/5.png"]) == (2, 2, 3, 3)
    assert server.agents == {FAST.user_agent}
    allowed = fetch_all([server.url + "/noai/6.png"], replace(FAST, obey_robots_tag=False), 100_000, 2**30)
    assert allowed == [server.images["6.png"]]


def test_nobody_there_and_no_url() -> None:
    results = fetch_all(
        ["http://127.0.0.1:9/x.png", "http://[broken/x.png", "nowhere://x"], replace(FAST, attempts=1), 1000, 2**30
    )
    assert [result.reason for result in results if isinstance(result, RowRefused)] == ["download_failed", "bad_url", "bad_url"]


def test_a_host_is_not_stormed(server: ImageServer) -> None:
    urls = [f"{server.url}/paused/{number % 8}.png?{number}" for number in range(24)]
    server.images |= {f"{number % 8}.png?{number}": IMAGE for number in range(24)}
    assert fetch_all(urls, replace(FAST, connections_per_host=3, timeout=30), 100_000, 2**30) == [IMAGE] * 24
    assert 2 <= server.most_at_once <= 3


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_lists_in_every_form(tmp_path: Path, server: ImageServer, ending: str) -> None:
    urls = [f"{server.url}/good/{number}.png" for number in (0, 1)] + [f"{server.url}/good/gone.png", None]
    rows = [{"URL": url, "TEXT": f'a, "quoted"\ncaption {index}', "license": "CC0"} for index, url in enumerate(urls)]
    path = tmp_path / f"list.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\nno json\n[1]\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["URL", "TEXT", "license"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    source = list_source(path, download=FAST)
    assert source.kind == "list"
    first, second, gone, empty, *bad = found(source)
    assert first["image_bytes"] == server.images["0.png"]
    assert (first["source_uri"], first["caption"]) == (urls[0], 'a, "quoted"\ncaption 0')
    assert json.loads(second["metadata"]) == {"license": "CC0"}
    assert (gone["error"], gone["source_uri"], gone["image_bytes"]) == ("http_404", urls[2], None)
    assert (empty["error"], empty["source_uri"]) == ("no_url", f"{path}#3")
    assert [row["error"] for row in bad] == (["no_url"] * 2 if ending == "jsonl" else [])
    assert "list_error" in json.loads(bad[0]["metadata"]) if bad else True


def test_keys_of_a_file_system(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/photos/a.jpg", IMAGE)
    memory.pipe_file("/elsewhere/b.jpg", IMAGE + b"b")
    (tmp_path / "keys.csv").write_text("key,text\nphotos/a.jpg,one\nphotos/gone.jpg,two\nmemory://elsewhere/b.jpg,three\n")
    rows = found(list_source(tmp_path / "keys.csv", base_uri="memory://bucket", max_bytes=len(IMAGE)))
    assert [row["error"] for row in rows] == [None, "missing_source", "too_many_bytes"]
    assert (rows[0]["image_bytes"], rows[0]["source_uri"]) == (IMAGE, "memory://bucket/photos/a.jpg")
    write_files(tmp_path, {"set/images/1.png": IMAGE, "set/metadata.csv": b"file_name,text\nimages/1.png,from the table\n"})
    with pytest.raises(ValueError, match=r"1 for 'folder', 1 for 'list'"):
        find_source(str(tmp_path / "set"), "auto")
    options = {"copies_uri": str(tmp_path / "copies")}
    [row] = found(find_source(str(tmp_path / "set"), "list", **options))
    assert (row["image_bytes"], row["caption"]) == (IMAGE, "from the table")
    memory.rm("/bucket", recursive=True)
    memory.rm("/elsewhere", recursive=True)


def test_a_key_that_no_file_system_takes_costs_its_row(tmp_path: Path) -> None:
    """Some file systems connect, or want arguments, when they are opened."""
    bad = ["ftp://127.0.0.1:1/a.jpg", "github://x/y", "reference://x", "generic://x", "dir://x", "s3://", "a\0b.png", "a::b"]
    expected = [*["bad_url"] * 5, *["unreadable"] * 2, "missing_source"]
    (tmp_path / "good.png").write_bytes(IMAGE)
    keys = ["good.png", *(key for one in bad for key in (one, "good.png"))]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"url": key}) + "\n" for key in keys))
    source = list_source(tmp_path / "list.jsonl")
    assert count_samples(source, Part("list.jsonl", 0)) == len(keys)
    rows = read_parts(source, [Part("list.jsonl", 0)]).to_pylist()
    assert [row["error"] for row in rows[1::2]] == expected
    assert [row["image_bytes"] for row in rows[::2]] == [IMAGE] * (len(bad) + 1)
    images = [{"bytes": IMAGE, "path": "x"}, {"bytes": None, "path": bad[0]}, {"bytes": IMAGE, "path": "x"}]
    pq.write_table(pa.table({"image": images}), tmp_path / "images.parquet")
    source = find_source(str(tmp_path / "images.parquet"), "parquet")
    found = read_parts(source, [Part("images.parquet", 0)])
    assert found["error"].to_pylist() == [None, "bad_url", None]


def test_records_of_json_need_not_be_alike(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    records = [{"url": "a.png"}, {"score": 1, "text": "a cat", "url": "a.png"}, {"url": 7}, {"url": "a.png", "text": None}]
    lines = ["{broken", *(json.dumps(record) for record in records)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    rows = found(list_source(tmp_path / "list.jsonl"))
    assert [(row["error"], row["caption"]) for row in rows] == [
        ("no_url", None), (None, None), (None, "a cat"), ("no_url", None), (None, None)
    ]  # fmt: skip
    assert "list_error" in json.loads(rows[0]["metadata"]) and json.loads(rows[2]["metadata"]) == {"score": 1}


def test_slices_of_long_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ingest.lists.PIECE_ROWS", 10)
    monkeypatch.setattr("pipelines.ingest.lists.ROW_GROUP", 4)
    write_files(tmp_path, {f"{number}.png": bytes([number]) for number in range(25)})
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"{number}.png" for number in range(25)))
    source = list_source(tmp_path / "list.csv")
    assert PIECE_ROWS > 10 and count_samples(source, Part("list.csv", 0)) == 25
    for start, stop in [(0, 3), (3, 11), (9, 10), (10, 20), (7, None), (24, None), (0, None)]:
        rows = read_parts(source, [Part("list.csv", 0, start=start, stop=stop)]).to_pylist()
        assert [row["image_bytes"][0] for row in rows] == list(range(25))[start:stop], (start, stop)
    (tmp_path / "list.csv").unlink()  # what was planned can be read still
    assert len(read_parts(source, [Part("list.csv", 0)])) == 25
    copies = sorted((tmp_path / "copies").iterdir())
    for gone, slices in ((copies[2], [(20, None), (15, 23)]), (copies[1], [(12, None), (5, 14)])):
        gone.unlink()
        for start, stop in slices:
            with pytest.raises(StorageError, match=r"copy of .*list\.csv is gone"):
                read_parts(source, [Part("list.csv", 0, start=start, stop=stop)])


def test_a_copy_that_is_gone_is_made_again_from_the_same_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PIECE_ROWS", 10)
    monkeypatch.setattr(lists, "ROW_GROUP", 5)
    write_files(tmp_path, {f"{number}.png": bytes([number]) for number in range(25)})
    content = "path\n" + "\n".join(f"{number}.png" for number in range(25))
    (tmp_path / "list.csv").write_text(content)
    source, part = list_source(tmp_path / "list.csv"), Part("list.csv", len(content), start=12, stop=15)
    with Leases() as leases:
        ticket = leases.take(str(tmp_path / "images")).ticket
        assert count_samples(source, part, ticket) == 25
        first, second, _ = sorted((tmp_path / "copies").iterdir())
        second.write_bytes(first.read_bytes())
        with pytest.raises(DamagedShardError, match=r"the copy of .*list\.csv, is damaged \(it is a copy of _lists/"):
            read_parts(source, [part])
        second.unlink()
        copy_again(source, [part], ticket)
        assert [row["image_bytes"][0] for row in read_parts(source, [part]).to_pylist()] == [12, 13, 14]
        second.unlink()
        (tmp_path / "list.csv").write_text(content + "\n3.png")
        with pytest.raises(ValueError, match=f"the list was changed since: it had {len(content)} bytes"):
            copy_again(source, [part], ticket)


def test_slices_are_read_and_fetched_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is rows from here and there."""
    write_files(tmp_path, {f"{number}.png": bytes([number]) for number in range(40)})
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"{number}.png" for number in range(40)))
    source = list_source(tmp_path / "list.csv")
    count_samples(source, Part("list.csv", 0))
    calls: Counter[str] = Counter()
    for function in (lists.read_file, lists.fetch_named):
        name = function.__name__
        monkeypatch.setattr(lists, name, lambda *given, call=function, name=name: (calls.update([name]), call(*given))[1])
    rows = read_parts(source, [Part("list.csv", 0, start=start, stop=start + 1) for start in range(0, 40, 2)])
    assert [content.as_py()[0] for content in rows["image_bytes"]] == list(range(0, 40, 2))
    assert calls == {"read_file": 1, "fetch_named": 1}


def test_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,size\nx,1\n")
    with pytest.raises(ValueError, match=r"a.csv has no column of URLs.*name, size"):
        found(list_source(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("link\nx.png\n")
    assert [row["error"] for row in found(list_source(tmp_path / "b.csv", url_column="link"))] == ["missing_source"]
    (tmp_path / "c.csv").write_text("url,text\n")
    assert count_samples(list_source(tmp_path / "c.csv"), Part("c.csv", 0)) == 0
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(ValueError, match=r"d.parquet cannot be read as a list"):
        found(find_source(str(tmp_path / "d.parquet"), "list", copies_uri=str(tmp_path / "copies")))


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    """Tars, or folders, with a log of the same name beside each."""
    log = pa.table({"url": ["http://x/1.jpg", "http://x/2.jpg"], "status": ["success", "failed_to_download"]})
    beside = json.dumps({"url": "http://x/1.jpg", "caption": "one", "width": 64, "status": "success"}).encode()
    members = {"000000000.jpg": IMAGE, "000000000.json": beside, "000000000.txt": b"one"}
    write_tar(tmp_path / "tars/00000.tar", members)
    write_files(tmp_path / "files", {f"00000/{name}": content for name, content in members.items()})
    for folder in ("tars", "files"):
        pq.write_table(log, tmp_path / folder / "00000.parquet")
        (tmp_path / folder / "00000_stats.json").write_text('{"count": 2}')
        [row] = found(find_source(str(tmp_path / folder), "auto"))
        assert (row["image_bytes"], row["caption"], json.loads(row["metadata"])["width"]) == (IMAGE, "one", 64)
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"jpg": [IMAGE], "caption": ["one"], "url": ["http://x/1.jpg"]}), tmp_path / "parquet/0.parquet")
    [row] = found(find_source(str(tmp_path / "parquet"), "auto"))
    assert (row["image_bytes"], json.loads(row["metadata"])) == (IMAGE, {"url": "http://x/1.jpg"})


def test_failed_downloads_are_tried_again_in_new_shards(
    tmp_path: Path, server: ImageServer, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fails_before = 1
    paths = ["/good/0.png", "/flaky/1.png", "/page/2.png", "/good/none.png", "/flaky/3.png", "/good/4.png"]
    (tmp_path / "list.csv").write_text("url,text\n" + "".join(f"{server.url}{path},{path}\n" for path in paths))
    config = IngestConfig(
        source=str(tmp_path / "list.csv"),
        rows_per_shard=4,
        max_reject_share=1,
        download=replace(FAST, attempts=1),
    )
    dataset = str(tmp_path / "dataset")
    result = run_ingest(dataset, config)
    assert result.rejects_by_reason == {"http_500": 2, "not_an_image": 1, "http_404": 1}
    run_without_ray(monkeypatch)
    images = Table(dataset, IMAGES_PATH, IMAGES)
    before = {shard: images.read_shard(shard) for shard in images.list_shards()}
    config = replace(config, license="CC0")
    assert run_ingest(dataset, config).was_done and images.require().license == "CC0"
    with pytest.raises(StaleTableError, match="obey_robots_tag: True -> False"):
        run_ingest(dataset, replace(config, download=replace(config.download, obey_robots_tag=False)))

    again = run_ingest(dataset, replace(config, retry_rejects=True))
    assert (again.num_shards, again.found_shards, again.num_rows) == (3, 2, 4)
    assert all(images.read_shard(shard) == table for shard, table in before.items())
    rows = images.read_shard("00002").to_pylist()
    assert [(row["source_uri"].removeprefix(server.url), row["caption"]) for row in rows] == [
        ("/flaky/1.png", "/flaky/1.png"),
        ("/flaky/3.png", "/flaky/3.png"),
    ]
    assert run_ingest(dataset, replace(config, retry_rejects=True)).was_done
    assert server.answers["/good/none.png"] == 1 and server.answers["/flaky/1.png"] == 2


def test_what_a_shard_had_no_room_for_and_what_was_not_allowed(tmp_path: Path, server: ImageServer, local_ray: None) -> None:
    """Both are told, and come into new shards later."""
    images = [encode(noise(64, 64 + number), "PNG") for number in range(6)]
    write_files(tmp_path, {f"{number}.png": content for number, content in enumerate(images)})
    names = [f"{number}.png" for number in range(6)]
    (tmp_path / "list.csv").write_text("url\n" + "\n".join([f"{server.url}/good/7.png", *names]) + "\n")
    config = IngestConfig(
        source=str(tmp_path / "list.csv"),
        max_shard_bytes=5 * len(images[0]) // 2,
        max_reject_share=1,
        download=replace(FAST, allow_private=False),
    )
    dataset = str(tmp_path / "dataset")
    result = run_ingest(dataset, config)
    assert (result.num_rows, result.rejects_by_reason) == (2, {"shard_full": 4, "private_address": 1})
    again = run_ingest(dataset, replace(config, retry_rejects=True))
    assert (again.num_shards, again.num_rows) == (3, 6), "as many rows in each new shard as the full one had room for"
    allowed = run_ingest(dataset, replace(config, retry_rejects=True, download=FAST))
    assert (allowed.num_shards, allowed.num_rows) == (3, 6), "what finished shards were asked for once is not asked again"
