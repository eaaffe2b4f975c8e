"""Hosts are lost and links are cut while jobs run: each job ends well by itself, and makes what it makes undisturbed."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping

import mlflow
import pyarrow as pa
import pytest
from mlflow.entities import Run

from infra.local.cluster import Cluster
from pipelines.tables.table import Table
from pipelines.train.loop.record import TrainingRecord
from sana_model.files.filesystems import open_filesystem
from tests.support.cluster.faults import FAULTS, Fault, Jobs, longest_pause, wait_for_middle
from tests.support.cluster.sockets import listeners, unguarded
from tests.support.cluster.stages import (
    CAPTION,
    CAPTION_NEXT,
    DATA_STAGES,
    EMBED,
    EXTRACT,
    INGEST,
    NUM_IMAGES,
    NUM_STEPS,
    PROMPTS,
    TRAIN,
    Stage,
    last_stages,
)
from tests.support.drawn import read_drawn

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

UNDISTURBED = "s3://bucket/undisturbed"
POWER_OFF, CUT = FAULTS
DISTURBED = [
    (INGEST, POWER_OFF),
    (CAPTION, POWER_OFF),
    (CAPTION_NEXT, CUT),
    (EMBED, POWER_OFF),
    (EXTRACT, POWER_OFF),
    (TRAIN, POWER_OFF),
    (TRAIN, CUT),
]


@pytest.fixture(scope="module")
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


def runs_of(experiment: str, stage: str) -> list[Run]:
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], f"tags.stage = '{stage}'"))


def contents(table: Table) -> dict[str, tuple[pa.Table, pa.Table]]:
    """Rows and rejects by shard."""
    return {shard: (table.read_shard(shard), table.rejects().read_shard(shard)) for shard in table.list_shards()}


def verify(dataset_uri: str) -> None:
    command = [sys.executable, "-m", "jobs.verify", "--dataset_uri", dataset_uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("clean\n"), done.stdout + done.stderr


def test_the_whole_chain(undisturbed: Mapping[str, float]) -> None:
    print({name: round(seconds) for name, seconds in undisturbed.items()})
    verify(UNDISTURBED)
    assert INGEST.table(UNDISTURBED).require().num_rejects == 1
    for stage in DATA_STAGES:
        manifest = stage.table(UNDISTURBED).require()
        assert manifest.complete and manifest.num_rows == NUM_IMAGES, stage.name
    for stage in last_stages(UNDISTURBED):
        assert stage.table(UNDISTURBED).require().num_rows == len(PROMPTS), stage.name
    for name in undisturbed:
        (run,) = runs_of("undisturbed", name)
        assert run.info.status == "FINISHED", name
        assert str(run.info.artifact_uri).startswith("mlflow-artifacts:/")


def copy_inputs(stage: Stage, dataset_uri: str) -> None:
    """What was there, undisturbed, before the stage began."""
    stages = [*DATA_STAGES, TRAIN]
    for made in stages[: stages.index(stage)]:
        for table in (made.table(UNDISTURBED), made.table(UNDISTURBED).rejects()):
            filesystem, source = open_filesystem(table.uri)
            for file in filesystem.find(source):
                filesystem.cp_file(file, file.replace(source, f"{open_filesystem(dataset_uri)[1]}/{table.path}", 1))


@pytest.mark.parametrize(("stage", "what"), DISTURBED, ids=lambda value: str(getattr(value, "name", value)).replace(" ", "-"))
def test_a_fault_changes_nothing(
    stage: Stage, what: str, jobs: Jobs, undisturbed: Mapping[str, float], faults: list[Fault]
) -> None:
    experiment = f"{stage.name} {what} {uuid.uuid4().hex[:6]}".replace(" ", "-")  # anew on a cluster that is kept
    dataset_uri = f"s3://bucket/{experiment}"
    copy_inputs(stage, dataset_uri)
    begin = time.monotonic()
    job = jobs.start(experiment, stage.command(dataset_uri, experiment))
    done, host = wait_for_middle(stage, dataset_uri, job, jobs.cluster)
    loose = loose_doors(jobs.cluster) if stage is TRAIN else []
    with FAULTS[what](jobs.cluster, host):
        assert stage.count_done(dataset_uri) < stage.num_parts - 2, "it was as good as done: nothing was disturbed"
        jobs.finish(experiment, job)
        seconds = time.monotonic() - begin
    faults.append(
        Fault(
            stage=stage.name,
            what=what,
            host=host,
            done=done,
            num_parts=stage.num_parts,
            undisturbed=undisturbed[stage.name],
            seconds=seconds,
            pause=longest_pause(stage.parts_uri(dataset_uri)),
        )
    )
    (run,) = runs_of(experiment, stage.name)
    assert run.info.status == "FINISHED"
    verify(dataset_uri)
    if stage is TRAIN:
        check_training(dataset_uri, run)
        assert len(loose) <= 1 and all(TRAIN.process in one for one in loose), (
            "torch's own meeting point of the workers knows no token; what else?\n" + "\n".join(loose)
        )
        return
    assert contents(stage.table(dataset_uri)) == contents(stage.table(UNDISTURBED))
    assert stage.table(dataset_uri).require().fingerprint == stage.table(UNDISTURBED).require().fingerprint


def loose_doors(cluster: Cluster) -> list[str]:
    """What listens to everybody and asks for no token, in words."""
    found = [one for host in cluster.hosts for one in listeners(cluster, host)]
    return [f"{one} answers {answers}" for one, answers in unguarded(cluster, found)]


def check_training(dataset_uri: str, run: Run) -> None:
    """Losses and samples of every step are those of the undisturbed training; MLflow has each step once."""
    record, expected = (TrainingRecord.read(f"{uri}/train") for uri in (dataset_uri, UNDISTURBED))
    assert record is not None and record.result is not None and expected is not None and expected.result is not None
    assert record.result["losses"] == expected.result["losses"] and len(record.result["losses"]) == NUM_STEPS
    drawn, others = (read_drawn(f"{uri}/train/drawn") for uri in (dataset_uri, UNDISTURBED))
    assert drawn == others and len(drawn) == NUM_STEPS
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [tuple(point) for point in expected.result["losses"]]
