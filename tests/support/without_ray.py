"""Run a stage's shards in this process: by the readers, workers and writers that Ray's processes run, one shard after another.

For tests of what a stage makes, refuses, resumes or rebuilds. That each stage does so on Ray too is shown by the demo
(tests/jobs/demo), and for the stages that it lacks by a test of their own; what Ray adds is tested in tests/pipelines/stages.
"""

import pickle
from collections.abc import Iterator

import pytest
import ray
from ray import cloudpickle

from pipelines.stages import run
from pipelines.stages.contract import Outcome
from pipelines.stages.shards import ShardJob, stream_in_process


def run_without_ray(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone no stage starts an actor."""
    patch.setattr(run, "stream_shards", _stream_shards)


def _stream_shards(job: ShardJob, missing: list[str], *, alone: bool) -> Iterator[Outcome]:
    job = ray.get(ray.put(job)) if ray.is_initialized() else pickle.loads(cloudpickle.dumps(job))  # as an actor gets it
    yield from stream_in_process(job, missing, alone=alone)
