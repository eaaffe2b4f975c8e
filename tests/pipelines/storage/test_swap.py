"""Compare and swap on a local disk and on S3: of many writers one wins, and a conflict between writes is tried again."""

import threading
from pathlib import Path

import boto3
import pytest

from pipelines.storage.errors import StorageError
from pipelines.storage.swap import read_if_there, swap
from sana_model.files.retry import Backoff
from tests.support.s3 import BUCKET, Fault, FaultyProxy

URI = f"s3://{BUCKET}"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_writers_that_swap_at_once_one_succeeds(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path) if where == "local" else request.getfixturevalue("bucket_uri")
    uri, expected = f"{folder}/file", None
    for turn in range(3):
        winners = []
        barrier = threading.Barrier(6)

        def compete(number: int, expected: bytes | None = expected, turn: int = turn, barrier: threading.Barrier = barrier,
                    winners: list[bytes] = winners) -> None:  # fmt: skip
            content = f"{turn} {number}".encode()
            barrier.wait()
            if swap(uri, expected, content):
                winners.append(content)

        threads = [threading.Thread(target=compete, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert winners == [read_if_there(uri)]
        expected = winners[0]
    assert not swap(uri, b"else", None) and read_if_there(uri) == expected
    assert swap(uri, expected, None) and read_if_there(uri) is None


def test_a_conflict_between_writes_is_no_answer(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever swaps looks again, and repeats it if the file is as it was."""
    faults: list[Fault] = []
    monkeypatch.setattr(proxy, "draw", lambda method: faults.pop() if method in ("PUT", "DELETE") and faults else None)
    monkeypatch.setattr("pipelines.storage.swap.CONFLICT_BACKOFF", Backoff(first=0.01, longest=0.1))
    expected: bytes | None = None
    for content in (b"one", b"two", None):
        faults += ["409"] * 3
        assert swap(f"{URI}/swapped", expected, content) and faults == []
        assert read_if_there(f"{URI}/swapped") == content
        expected = content
    assert not swap(f"{URI}/swapped", b"else", b"three")
    faults += ["409"] * 4
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/swapped: .*in conflict with it 4 times"):
        swap(f"{URI}/swapped", None, b"four")


@pytest.mark.parametrize("number", [1, 4])
def test_a_write_in_conflict_with_itself_has_succeeded(
    proxy: FaultyProxy, endpoint: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A write whose answer was late is repeated and refused: what lies there is its own."""
    writes: list[str] = []

    def draw(method: str) -> Fault | None:
        if method != "PUT":
            return None
        writes.append(method)
        if len(writes) == number:
            boto3.client("s3", endpoint_url=endpoint).put_object(Bucket=BUCKET, Key=f"own{number}", Body=b"mine")
        return "409"

    monkeypatch.setattr(proxy, "draw", draw)
    monkeypatch.setattr("pipelines.storage.swap.CONFLICT_BACKOFF", Backoff(first=0.01, longest=0.1))
    assert swap(f"{URI}/own{number}", None, b"mine") and len(writes) == number
