"""Storage against a real HTTP S3 behind a proxy that spoils answers, and against local disks that refuse."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.storage import files
from pipelines.storage.errors import StorageError
from pipelines.storage.files import find_files, list_folder, open_file, read_file, remove_file, write_file
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.schema import IMAGES, SAMPLES, SCORES
from pipelines.tables.table import Table
from sana_model.files import filesystems, retry
from tests.support.s3 import BUCKET, FaultyProxy, s3_environment

URI = f"s3://{BUCKET}"


def pictures(count: int, size: int) -> pa.Table:
    content = [np.random.default_rng(row).bytes(size) for row in range(count)]
    ids = [f"{row:06d}" for row in range(count)]
    return pa.table({"id": ids, "prompt": ids, "seed": range(count), "image_bytes": content}, SAMPLES)


def test_spoiled_answers_change_nothing(proxy: FaultyProxy) -> None:
    proxy.share, proxy.faults = 0.3, ("500", "503", "reset", "cut", "slow")
    table = Table(f"{URI}/spoiled", "samples/x", SAMPLES)
    shards = {f"{number:05d}": pictures(20, 1000 + number) for number in range(12)}
    for shard, rows in shards.items():
        table.write_shard(shard, rows, figures={"psnr": 31.5})
    assert table.list_shards() == list(shards)
    for shard, rows in shards.items():
        assert table.read_shard(shard) == rows
        assert table.read_facts(shard).figures == {"psnr": 31.5}
    assert len(proxy.spoiled) == 5 and proxy.spoiled.total() > 10


@pytest.mark.parametrize("name", ["*", "a?", "[ab]", "**"])
def test_names_that_look_like_patterns_delete_only_themselves(proxy: FaultyProxy, name: str) -> None:
    root = f"{URI}/patterns/{len(name)}{ord(name[0])}"
    for folder in ("a", "ab", name):
        write_file(f"{root}/{folder}/x", b"kept")
    files.remove_files([f"{root}/{name}/x", f"{root}/{name}/absent"])
    assert list(find_files(root)) == ["a/x", "ab/x"]


@pytest.mark.parametrize(
    ("fault", "last"),
    [("503", "Service Unavailable|injected"), ("500", "Internal Server Error|injected"), ("reset", "onnection|closed")],
)
def test_a_storage_that_never_answers_is_given_up_with_a_clear_error(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str, last: str
) -> None:
    monkeypatch.setattr(retry, "STORAGE_ATTEMPTS", 2)
    proxy.share, proxy.faults = 1.0, (fault,)  # type: ignore[assignment]
    for call in (lambda: read_file(f"{URI}/a"), lambda: write_file(f"{URI}/a", b"x"), lambda: list_folder(f"{URI}/a")):
        with pytest.raises(StorageError, match=rf"cannot \w+ s3://bucket/a: gave up after 2 attempts, at last .*({last})"):
            call()


def test_no_server_no_bucket_no_file_no_access(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_folder("s3://elsewhere/data") == []
    with pytest.raises(StorageError, match=r"cannot write s3://elsewhere/data: there is no such bucket"):
        write_file("s3://elsewhere/data", b"x")
    with pytest.raises(FileNotFoundError):
        read_file(f"{URI}/absent")
    before = proxy.requests.total()
    proxy.share, proxy.faults = 1.0, ("403",)
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/x: access denied: check the credentials"):
        write_file(f"{URI}/x", b"x")
    assert proxy.requests.total() == before + 1, "what is forbidden is not asked for again"
    monkeypatch.setattr(retry, "STORAGE_ATTEMPTS", 2)
    monkeypatch.setattr(filesystems, "S3_OPTIONS", {**filesystems.S3_OPTIONS, "endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match=r"gave up after 2 attempts, at last .*127\.0\.0\.1:9"):
        read_file(f"{URI}/a")


def test_only_what_is_asked_for_is_fetched(proxy: FaultyProxy) -> None:
    table = Table(f"{URI}/ranges", "samples/x", SAMPLES)
    table.write_shard("00000", pictures(60, 50_000), figures={"psnr": 30.0})
    proxy.sent = 0
    assert table.read_facts("00000").num_rows == 60
    assert proxy.sent < 70_000
    assert table.read_shard("00000", ["id"]).num_rows == 60
    assert proxy.sent < 300_000
    with open_file(f"{URI}/ranges/samples/x/00000.parquet") as file:
        proxy.requests.clear()
        whole = file.read()
        assert proxy.requests["GET"] == 1
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1" == whole[-4:] == whole[:4] and len(whole) > 3_000_000


def test_a_small_shard_takes_one_request(proxy: FaultyProxy) -> None:
    table = Table(f"{URI}/small", "scores/clip/a", SCORES)
    table.write_shard("00000", pa.table({"id": ["x", "y"], "clip_score": pa.array([20.0, 30.0], pa.float32())}))
    proxy.requests.clear()
    assert table.read_shard("00000", ["id"])["id"].to_pylist() == ["x", "y"]
    assert proxy.requests == {"GET": 1}


def test_files_are_found_and_removed_and_listings_are_never_old(proxy: FaultyProxy, endpoint: str) -> None:
    write_file(f"{URI}/found/a/one", b"1")
    assert find_files(f"{URI}/found") == {"a/one": 1}
    code = "import sys; from pipelines.storage.files import write_file; write_file(sys.argv[1], b'22')"
    environment = {**os.environ, **s3_environment(endpoint)}
    subprocess.run([sys.executable, "-c", code, f"{URI}/found/two"], env=environment, check=True)
    assert find_files(f"{URI}/found") == {"a/one": 1, "two": 2}
    assert list_folder(f"{URI}/found") == ["a", "two"] and list_folder(f"{URI}/found", with_files=False) == ["a"]
    for _ in range(2):
        remove_file(f"{URI}/found/two")
    assert list_folder(f"{URI}/found") == ["a"]


def test_an_upload_that_is_killed_leaves_no_object(proxy: FaultyProxy) -> None:
    """Large enough for an upload in parts, each of which the proxy delays."""
    code = "import sys; from pipelines.storage.files import write_file; write_file(sys.argv[1], bytes(120 * 2**20))"
    process = subprocess.Popen([sys.executable, "-c", code, f"{URI}/killed/big"])
    try:
        deadline = time.monotonic() + 60
        while proxy.requests["PUT"] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        proxy.share, proxy.faults = 1.0, ("slow",)
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    proxy.share = 0.0
    assert proxy.requests["PUT"] >= 1 and list_folder(f"{URI}/killed") == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_stays(tiny_disk: Path) -> None:
    table = Table(str(tiny_disk), "samples/x", SAMPLES)
    table.write_shard("00000", pictures(10, 1000))
    with pytest.raises(StorageError, match=rf"cannot write {tiny_disk}/samples/x/00001\.parquet: the disk is full: free space"):
        table.write_shard("00001", pictures(20, 100_000))
    assert [path.name for path in (tiny_disk / "samples/x").iterdir()] == ["00000.parquet"]
    assert table.read_shard("00000") == pictures(10, 1000)


def test_a_read_only_disk_is_named(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match=rf"cannot write {tiny_disk}/x/a: the file system is read-only: choose a folder"):
        write_file(f"{tiny_disk}/x/a", b"x")


def test_a_file_over_the_limit_of_the_process_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*/big: a file as large is not allowed"):
            write_file(f"{tmp_path}/big", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_are_not_counted_and_go(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "samples/x", SAMPLES)
    table.write_shard("00000", pictures(1, 10))
    leftover = tmp_path / "samples/x/.00001.parquet.ab12.tmp"
    leftover.write_bytes(b"half")
    assert table.list_shards() == ["00000"]
    files.remove_leftovers(table.uri)
    assert not leftover.exists() and table.list_shards() == ["00000"]


@pytest.mark.parametrize("kept", [0, 3, 4, 1000, -1])
def test_a_shard_that_is_cut_anywhere_is_damaged(tmp_path: Path, kept: int) -> None:
    table = Table(str(tmp_path), "images", IMAGES)
    image = {"id": "a", "image_bytes": bytes(3000), "format": "PNG", "width": 1, "height": 1, "phash": "0", "source_uri": "x"}
    table.write_shard("00000", pa.Table.from_pylist([image], IMAGES))
    path = tmp_path / "images/00000.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    for read in (table.read_shard, table.read_facts):
        with pytest.raises(DamagedShardError, match=rf"{path} is damaged \(.*\): let python -m jobs\.repair move it aside"):
            read("00000")
