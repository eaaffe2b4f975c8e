"""Keys of S3 as buckets have them: each is the object of that very name; a list may ask for a version."""

import io
import json
import os
import tarfile

import boto3
import pytest

from pipelines.ingest.config import DownloadConfig
from pipelines.ingest.download import fetch_all
from pipelines.ingest.readers import count_samples, read_parts
from pipelines.ingest.sources import Part, find_source, list_parts
from pipelines.storage.errors import StorageError
from pipelines.storage.files import read_file, write_file
from tests.support.s3 import faulty_s3

KEYS = ("a::b.png", "zip::c.png", "s3::d.png", "e?versionId=f.png", "e.png", "g#h.png", "i+%41 j.png", "k//l.png", "?x=1.png",
        "[m]*.png", "n .png", "ü::日.png")  # fmt: skip


@pytest.fixture(scope="module")
def client(bucket_uri: str) -> object:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    return client


def test_keys_of_a_folder(bucket_uri: str, client: object) -> None:
    for key in KEYS:
        client.put_object(Bucket="bucket", Key=f"folder/{key}", Body=key.encode())
        client.put_object(Bucket="bucket", Key=f"folder/{key[:-4]}.txt", Body=f"caption of {key}".encode())
    source = find_source(f"{bucket_uri}/folder", "auto")
    rows = read_parts(source, list_parts(source)).to_pylist()
    assert {row["source_uri"].removeprefix(f"{bucket_uri}/folder/"): row["image_bytes"].decode() for row in rows} == {
        key: key for key in KEYS
    }
    assert all(row["caption"] == f"caption of {row['image_bytes'].decode()}" for row in rows)


def test_tars_and_other_files_with_such_names(bucket_uri: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    write_file(f"{bucket_uri}/tars/x::y.tar", buffer.getvalue())
    assert read_file(f"{bucket_uri}/tars/x::y.tar") == buffer.getvalue()
    source = find_source(f"{bucket_uri}/tars/x::y.tar", "auto")
    assert [row["image_bytes"] for row in read_parts(source, list_parts(source)).to_pylist()] == [b"abc"]


def test_keys_of_a_list(bucket_uri: str, client: object) -> None:
    old = client.put_object(Bucket="bucket", Key="v.png", Body=b"old")["VersionId"]
    client.put_object(Bucket="bucket", Key="v.png", Body=b"new")
    client.put_object(Bucket="bucket", Key="empty.png", Body=b"")
    client.put_object(Bucket="bucket", Key="large.png", Body=bytes(2000))
    client.put_object(Bucket="bucket", Key="lists/a::b.png", Body=b"named")
    expected = {
        f"{bucket_uri}/v.png?versionId={old}": b"old",
        f"{bucket_uri}/v.png": b"new",
        f"{bucket_uri}/v.png?versionId=none-such": "missing_source",
        f"{bucket_uri}/empty.png": b"",
        f"{bucket_uri}/large.png": "too_many_bytes",
        f"{bucket_uri}/gone.png": "missing_source",
        f"{bucket_uri}-none/x.png": "missing_source",
        f"{bucket_uri}/": "unreadable",
        f"{bucket_uri}": "unreadable",
        "s3://": "unreadable",
        "a::b.png": b"named",
        f"{bucket_uri}/x::file:///etc/passwd": "missing_source",
    }
    write_file(f"{bucket_uri}/lists/list.jsonl", "".join(json.dumps({"url": key}) + "\n" for key in expected).encode())
    source = find_source(f"{bucket_uri}/lists/list.jsonl", "auto", copies_uri=f"{bucket_uri}/copies", max_bytes=1000)
    count_samples(source, Part("list.jsonl", 0))
    rows = read_parts(source, list_parts(source)).to_pylist()
    found = [row["error"] or row["image_bytes"] for row in rows]
    assert dict(zip(expected, found, strict=True)) == expected


def test_a_storage_that_does_not_answer_is_not_asked_for_each_key(bucket_uri: str) -> None:
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.share, proxy.faults = 1.0, ("503",)
        with pytest.raises(StorageError, match=f"cannot read {bucket_uri}"):
            fetch_all([f"{bucket_uri}/{number}" for number in range(1000)], DownloadConfig(), 1000, 1000)
        assert proxy.requests["GET"] < 1000
