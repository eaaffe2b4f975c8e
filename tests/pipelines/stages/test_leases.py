"""A writer that slept until its lease was taken over writes nothing when it wakes; stages write only in the ways tried."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage.files import find_files, read_file
from pipelines.storage.lease import LEASE, LeaseConfig, Leases, process_start
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGES
from pipelines.tables.table import Table

ROOT = Path(__file__).parents[3]
WRITER = ROOT / "tests/support/sleeping_writer.py"
STAGES = ("ingest", "caption", "score", "extract", "draw", "evaluate", "stages")
WITH_TICKET = {"write_shard", "write_file", "write_json", "write_manifest", "claim", "write_plan", "write_output"}
"""Ways of writing in which the lease is looked at right before."""
OTHER_WRITES = {"write_file", "upload_folder", "move_file", "remove_file", "remove_files", "swap"}
"""Functions of `storage` that look at no lease."""


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.parametrize("storage", ["local", "s3"])
def test_a_writer_that_slept_until_its_lease_was_taken_over_writes_nothing(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "data") if storage == "local" else f"{request.getfixturevalue('bucket_uri')}/data"
    (tmp_path / "list.csv").write_text("url\nhttp://localhost/a.png\n")
    command = [sys.executable, str(WRITER), uri, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not is_stopped(writer.pid):
            assert writer.poll() is None and process_start(writer.pid), "it ended before it slept"
            time.sleep(0.05)
        images = Table(uri, "images", IMAGES)
        with Leases(LeaseConfig(seconds=60.0)) as leases:
            ticket = leases.take(images.uri).ticket
            images.write_manifest(images.require(), ticket=ticket)
            before = {name: read_file(f"{uri}/{name}") for name in find_files(uri)}
            writer.send_signal(signal.SIGCONT)
            told, _ = writer.communicate(timeout=120)
            assert [line.rpartition(" ")[2] for line in told.splitlines()] == ["lost"] * 9, told
            assert {name: read_file(f"{uri}/{name}") for name in find_files(uri)} == before
    finally:
        writer.kill()


def test_two_writers_at_once_one_is_refused_and_the_other_s_claim_stands(tmp_path: Path) -> None:
    """Whatever the stage: all take the lease in `run_stream`, or before."""
    images = Table(str(tmp_path), "images", IMAGES)
    with Leases() as first, Leases() as second:
        first.take(images.uri)
        with pytest.raises(ValueError, match="is being written by"):
            second.take(images.uri)
        images.claim(Identity("ingest", {}, {}, {}), ticket=first.take(images.uri).ticket)
    assert (tmp_path / "images" / LEASE).exists() is False


def calls_without_lease(source: str) -> Iterator[str]:
    """What a stage's module writes without a look at a lease."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipelines.storage"):
            yield from (alias.name for alias in node.names if alias.name in OTHER_WRITES)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", "") or (node.func.id if isinstance(node.func, ast.Name) else "")
            is_other = isinstance(node.func, ast.Name) and name in ("claim", "write_file")  # functions, not a table's methods
            given = {keyword.arg for keyword in node.keywords}
            given |= {getattr(each, "id", getattr(each, "attr", "")) for each in node.args}
            if name in WITH_TICKET and not is_other and not given & {"ticket", "own"}:
                yield f"{name} in line {node.lineno}"


def test_stages_write_only_in_ways_that_look_at_the_lease() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(calls_without_lease(path.read_text()))
        for stage in STAGES
        for path in sorted((ROOT / "pipelines" / stage).rglob("*.py"))
    }
    others = {path: calls for path, calls in found.items() if calls}
    assert others == {
        "pipelines/ingest/lists.py": ["write_file"],  # it checks the ticket itself: "a copied list" above
    }
    planted = "from pipelines.storage.files import write_file\ntable.write_manifest(manifest)\ntable.claim(identity)"
    assert len(list(calls_without_lease(planted))) == 3
