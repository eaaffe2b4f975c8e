"""One local Ray for all tests here: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """More logical CPUs than cores: what waits does not hold up what computes."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
