"""What a job on the cluster has made, against what the same chain made undisturbed."""

import subprocess
import sys

import mlflow
import pyarrow as pa
from mlflow.entities import Run

from pipelines.tables.table import Table
from pipelines.train.loop.record import TrainingRecord
from sana_model.files.filesystems import open_filesystem
from tests.support.cluster.stages import DATA_STAGES, NUM_STEPS, TRAIN, Stage
from tests.support.drawn import read_drawn

UNDISTURBED = "s3://bucket/undisturbed"


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


def copy_inputs(stage: Stage, dataset_uri: str) -> None:
    """What was there, undisturbed, before the stage began."""
    stages = [*DATA_STAGES, TRAIN]
    for made in stages[: stages.index(stage)]:
        for table in (made.table(UNDISTURBED), made.table(UNDISTURBED).rejects()):
            filesystem, source = open_filesystem(table.uri)
            for file in filesystem.find(source):
                filesystem.cp_file(file, file.replace(source, f"{open_filesystem(dataset_uri)[1]}/{table.path}", 1))


def check_training(dataset_uri: str, run: Run) -> None:
    """Losses and samples of every step are those of the undisturbed training; MLflow has each step once."""
    record, expected = (TrainingRecord.read(f"{uri}/train") for uri in (dataset_uri, UNDISTURBED))
    assert record is not None and record.result is not None and expected is not None and expected.result is not None
    assert record.result["losses"] == expected.result["losses"] and len(record.result["losses"]) == NUM_STEPS
    drawn, others = (read_drawn(f"{uri}/train/drawn") for uri in (dataset_uri, UNDISTURBED))
    assert drawn == others and len(drawn) == NUM_STEPS
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [tuple(point) for point in expected.result["losses"]]
