"""One local Ray for all tests here: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest
import ray
import s3fs

from tests.support.s3 import BUCKET, s3_environment, serve_s3


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """More logical CPUs than cores: what waits does not hold up what computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon a checkpoint of Ray Train counts
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def bucket_uri() -> Iterator[str]:
    """A bucket on an S3 of its own, which this process and those that it starts find in their environment."""
    with serve_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(endpoint).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"s3://{BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()
