"""An S3 for a module's tests, and a proxy before it that spoils answers for one test."""

from collections.abc import Iterator

import pytest

from tests.support.s3 import FaultyProxy, faulty_s3, serve_s3


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve_s3() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(endpoint: str) -> Iterator[FaultyProxy]:
    with faulty_s3(endpoint) as proxy:
        yield proxy
