"""The whole demo as one job that is submitted from outside: everything that it reads and writes is on S3."""

import uuid

import pytest

from pipelines.evaluate.metric import metric_table
from pipelines.storage.files import read_file
from pipelines.tables.table import REPORT
from tests.support.cluster.faults import Jobs

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # 6 minutes; test_faults.py runs its data stages and training one by one

SMALL = "--world.num_images 40 --world.num_prompts 4 --ingest.rows_per_shard 20 --draw.num_steps 4 --train.num_steps 4"


def test_the_demo(jobs: Jobs) -> None:
    name = f"demo-{uuid.uuid4().hex[:6]}"  # anew on a cluster that is kept
    uri = f"s3://bucket/{name}"
    places = ["--dataset_uri", uri, "--ingest.source", f"{uri}-raw", "--tracking.experiment", name]
    command = ["python", "-m", "jobs.demo", "--config", "jobs/configs/demo.yaml", *places, *SMALL.split()]
    jobs.run(name, command)
    assert f"report    {uri}/{REPORT}\nMLflow    http://" in jobs.tail(name)
    assert len(read_file(f"{uri}/{REPORT}")) > 1000
    assert metric_table(uri, "after", "clip_score").require().num_rows == 4
    jobs.run(name, command)
    assert jobs.log(name).read_text().count("all there already, nothing to do") == 21
