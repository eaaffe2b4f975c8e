"""An S3 for the tests that store a dataset there."""

from collections.abc import Iterator

import pytest
import s3fs

from tests.support.s3 import BUCKET, s3_environment, serve_s3


@pytest.fixture(scope="module")
def bucket_uri() -> Iterator[str]:
    """A bucket on an S3 of its own, which this process and those that it starts find in their environment."""
    with serve_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(endpoint).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"s3://{BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()
