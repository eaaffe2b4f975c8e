"""Two submissions of one stage at once: one of them works, the other is refused, and no shard is written twice."""

import uuid

import boto3
import pytest

from infra.local.servers import BUCKET
from pipelines.tables.schema import IMAGES
from pipelines.tables.table import Table
from tests.support.cluster.faults import PATIENCE, Jobs
from tests.support.cluster.stages import INGEST, NUM_IMAGES, NUM_SHARDS

pytestmark = pytest.mark.cluster


def count_versions(prefix: str) -> dict[str, int]:
    """How often each object was written."""
    versions: dict[str, int] = {}
    for page in boto3.client("s3").get_paginator("list_object_versions").paginate(Bucket=BUCKET, Prefix=prefix):
        for version in page.get("Versions", []):
            versions[version["Key"]] = versions.get(version["Key"], 0) + 1
    return versions


def test_the_second_submission_is_refused(jobs: Jobs) -> None:
    boto3.client("s3").put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    experiment = f"twice-{uuid.uuid4().hex[:6]}"  # anew on a cluster that is kept
    uri = f"s3://{BUCKET}/{experiment}"
    started = {name: jobs.start(name, INGEST.command(uri, experiment)) for name in ("first", "second")}
    codes = {name: job.wait(PATIENCE) for name, job in started.items()}
    assert sorted(codes.values()) == [0, 1], {name: jobs.tail(name) for name in codes}
    (refused,) = (name for name, code in codes.items() if code == 1)
    assert "is being written by raysubmit_" in jobs.tail(refused) and "Traceback" not in jobs.tail(refused)
    table = Table(uri, INGEST.path, IMAGES)
    assert table.require().complete and table.require().num_rows == NUM_IMAGES
    shards = {key: count for key, count in count_versions(f"{experiment}/").items() if key.endswith(".parquet")}
    assert len(shards) == 2 * NUM_SHARDS and set(shards.values()) == {1}
