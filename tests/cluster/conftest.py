"""The cluster that the tests of this folder share, and the table of what the faults cost."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from infra.local.cluster import Cluster
from infra.local.hosts import HostConfig
from infra.local.rights import MissingRightsError, check_rights
from pipelines.shapes.drawing import write_folder
from pipelines.storage.files import upload_folder
from tests.support.cluster.checks import UNDISTURBED
from tests.support.cluster.faults import Fault, Jobs
from tests.support.cluster.stages import DATA_STAGES, NUM_IMAGES, RAW, TRAIN, last_stages
from tests.support.s3 import environment

FOLDER = "SANA_CLUSTER"
"""Environment variable: the folder of a cluster that is up, to be used and left; unless set, one is made and taken away."""

_faults: list[Fault] = []


@pytest.fixture(scope="module", autouse=True)
def no_tracking_of_another_file() -> None:
    """Here all files share the cluster's MLflow, which `cluster` names in the environment until the end."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four hosts, with images on their S3 at RAW; this process reaches S3 and MLflow."""
    try:
        check_rights()
    except MissingRightsError as error:
        pytest.skip(str(error))
    folder = os.environ.get(FOLDER)
    cluster = Cluster.load(Path(folder)) if folder else Cluster.up(tmp_path_factory.mktemp("cluster"), HostConfig())
    try:
        raw = tmp_path_factory.mktemp("raw")
        write_folder(raw, 0, NUM_IMAGES)
        for facts in raw.glob("*.json"):
            facts.unlink()
        (raw / "broken.png").write_bytes(b"no image")
        reach = {name: value for name, value in cluster.environment().items() if not name.startswith("RAY")}
        with environment(reach):
            upload_folder(raw, RAW)
            yield cluster
    finally:
        if not folder:
            cluster.down()


@pytest.fixture(scope="session")
def jobs(cluster: Cluster) -> Jobs:
    log_dir = cluster.folder / "jobs"
    log_dir.mkdir(exist_ok=True)
    return Jobs(cluster=cluster, log_dir=log_dir)


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs) -> Mapping[str, float]:
    """The whole chain, job by job, to UNDISTURBED; the seconds of each. A cluster that is kept remembers them."""
    memory = jobs.cluster.folder / "undisturbed.json"
    if memory.exists():
        return dict(json.loads(memory.read_text()))
    stages = [*DATA_STAGES, TRAIN, *last_stages(UNDISTURBED)]
    commands = {stage.name: stage.command(UNDISTURBED, "undisturbed") for stage in stages}
    seconds = {name: jobs.run(f"undisturbed {name}", command) for name, command in commands.items()}
    memory.write_text(json.dumps(seconds))
    return seconds


@pytest.fixture(scope="session")
def faults() -> list[Fault]:
    """What was done, for the closing table."""
    return _faults


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _faults:
        terminalreporter.section("faults")
        for fault in _faults:
            terminalreporter.write_line(fault.line())
