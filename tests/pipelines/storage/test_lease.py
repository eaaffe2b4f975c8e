"""Leases between real processes: refused, renewed, expired, taken over, lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from pipelines.stages.contract import Progress, Resources
from pipelines.stages.run import run_shards
from pipelines.storage.errors import LeaseHeldError, LeaseLostError
from pipelines.storage.lease import LEASE, LeaseConfig, Leases, hold, read_lease, shared, submission_id
from pipelines.storage.swap import read_if_there, swap
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS
from pipelines.tables.table import Table
from tests.support.stage_workers import Upper, read_ids

ROOT = Path(__file__).parents[3]
SHORT = LeaseConfig(seconds=2)


class Holder:
    """tests/support/lease_holder.py as a process of its own."""

    def __init__(self, uri: str, seconds: float = 2, owner: str = "-", elsewhere: str | None = None):
        arguments = [uri, str(seconds), owner, *([elsewhere] if elsewhere else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.lease_holder", *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self) -> str:
        output: IO[str] | None = self.process.stdout
        assert output is not None
        return output.readline().strip()

    def end(self) -> None:
        self.process.communicate("end\n")


@pytest.fixture
def start() -> Iterator[type[Holder]]:
    holders: list[Holder] = []

    class Kept(Holder):
        def __init__(self, *args: object, **settings: object):
            super().__init__(*args, **settings)  # type: ignore[arg-type]
            holders.append(self)

    yield Kept
    for holder in holders:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "captions/llava")


def test_a_second_writer_is_refused_while_the_first_is_alive_and_told_who_it_is(uri: str, start: type[Holder]) -> None:
    first = start(uri, owner="night run")
    assert first.read() == "held"
    record = read_lease(uri)
    assert record is not None and record.owner == "night run" and record.pid == first.process.pid
    with pytest.raises(LeaseHeldError) as refused, hold(uri, SHORT):
        pass
    for told in (uri, "night run", f"process {first.process.pid} on {record.host}", record.since, "lease runs until"):
        assert told in str(refused.value)
    first.end()
    assert read_lease(uri) is None
    with hold(uri, SHORT):
        assert read_lease(uri) is not None


def test_a_writer_on_another_host_that_renews_is_not_taken_over(uri: str, start: type[Holder]) -> None:
    first = start(uri, elsewhere="another host")
    assert first.read() == "held"
    second = start(uri)
    assert second.read().startswith("refused")
    first.end()


def test_a_dead_writer_of_this_host_is_taken_over_at_once(uri: str, start: type[Holder]) -> None:
    first = start(uri, seconds=600)
    assert first.read() == "held"
    first.process.kill()
    first.process.wait()
    began = time.monotonic()
    with hold(uri):
        assert time.monotonic() - began < 60
    assert read_lease(uri) is None


def test_a_dead_writer_of_another_host_is_taken_over_when_its_lease_has_expired(uri: str, start: type[Holder]) -> None:
    first = start(uri, seconds=4, elsewhere="another host")
    assert first.read() == "held"
    first.process.kill()
    renewed = json.loads(Path(uri, LEASE).read_text())["renewed"]
    with hold(uri, SHORT):
        assert time.time() >= renewed + 4


def test_a_restarted_job_goes_on_at_once_and_its_former_process_stops(uri: str, start: type[Holder]) -> None:
    first = start(uri, seconds=4, owner="job-7")
    assert first.read() == "held"
    with hold(uri, LeaseConfig(owner="job-7", seconds=600)) as lease:
        assert first.read().startswith("lost")
        lease.check()


def test_a_writer_that_slept_too_long_finds_its_lease_lost(uri: str, start: type[Holder]) -> None:
    first = start(uri, elsewhere="another host")
    assert first.read() == "held"
    os.kill(first.process.pid, signal.SIGSTOP)
    with hold(uri, SHORT) as taken:
        os.kill(first.process.pid, signal.SIGCONT)
        lost = first.read()
        assert lost.startswith("lost") and str(os.getpid()) in lost and "writes nothing more" in lost
        taken.check()
        record = read_lease(uri)
    assert record is not None and record.token == taken.ticket.token


def test_tasks_see_that_the_lease_is_lost(uri: str) -> None:
    with pytest.raises(LeaseLostError), hold(uri) as lease:
        lease.ticket.check()
        content = read_if_there(f"{uri}/{LEASE}")
        assert swap(f"{uri}/{LEASE}", content, content and content.replace(lease.ticket.token.encode(), b"other"))
        with pytest.raises(LeaseLostError):
            lease.ticket.check()
        raise RuntimeError("what went wrong because of it")
    assert read_if_there(f"{uri}/{LEASE}") is not None  # the other's


def test_a_stage_whose_lease_is_lost_stops_and_writes_nothing(tmp_path: Path, local_ray: None) -> None:
    table = Table(str(tmp_path), "captions/upper", CAPTIONS)
    ids = {f"{number:05d}": ["a"] for number in range(4)}

    def steal(progress: Progress) -> None:
        content = read_if_there(f"{table.uri}/{LEASE}")
        assert swap(f"{table.uri}/{LEASE}", content, content and content.replace(b'"token": "', b'"token": "x'))

    with pytest.raises(LeaseLostError, match="This job writes nothing more"):
        run_shards(
            table,
            Identity("caption", {}, {}, {}),
            list(ids),
            read_shard=partial(read_ids, ids),
            make_worker=Upper,
            resources=Resources(num_cpus=0.5),
            max_reject_share=0.9,
            on_progress=steal,
        )
    assert table.list_shards() == [] and table.rejects().list_shards() == []
    assert not table.require().complete


def test_the_leases_of_a_job_are_shared_by_what_it_calls_and_by_nobody_else(uri: str) -> None:
    with Leases(LeaseConfig(owner="job-7", seconds=30)) as leases:
        lease = leases.take(uri)
        with shared(leases) as given:
            assert given is leases and given.take(uri) is lease
        record = read_lease(uri)
        assert record is not None and (record.owner, record.seconds, record.token) == ("job-7", 30, lease.ticket.token)
        for refused in (hold(uri), shared(None)):  # even in this process
            with pytest.raises(LeaseHeldError), refused as other:
                other.take(uri)  # type: ignore[attr-defined]  # hold() raised before
        other = leases.take(f"{uri}-other")
        assert other is not lease and read_lease(f"{uri}-other") is not None
    assert read_lease(uri) is None and read_lease(f"{uri}-other") is None


def test_a_job_whose_lease_is_lost_says_so_in_place_of_what_went_wrong(uri: str) -> None:
    with pytest.raises(LeaseLostError), Leases() as leases:
        leases.take(f"{uri}-other")
        token = leases.take(uri).ticket.token
        content = read_if_there(f"{uri}/{LEASE}")
        assert swap(f"{uri}/{LEASE}", content, content and content.replace(token.encode(), b"other"))
        raise RuntimeError("what went wrong because of it")
    assert read_lease(uri) is not None and read_lease(f"{uri}-other") is None


def test_the_owner_is_the_ray_job(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submission_id() is None
    settings = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(settings))
    with hold(uri):
        record = read_lease(uri)
    assert record is not None and record.owner == "raysubmit_1"


def test_a_file_that_is_no_lease_is_nobody_s(uri: str) -> None:
    Path(uri).mkdir(parents=True)
    Path(uri, LEASE).write_text("{half")
    with hold(uri):
        assert read_lease(uri) is not None


def test_a_lease_on_s3_refuses_and_is_released(bucket_uri: str, start: type[Holder]) -> None:
    uri = f"{bucket_uri}/data/captions/llava"
    first = start(uri)
    assert first.read() == "held"
    with pytest.raises(LeaseHeldError), hold(uri, SHORT):
        pass
    first.end()
    with hold(uri, SHORT) as lease:
        lease.check()
    assert read_lease(uri) is None
