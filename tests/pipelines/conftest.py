"""One local Ray for all tests here: starting one takes longer than most tests."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """More logical CPUs than cores: what waits does not hold up what computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon a checkpoint of Ray Train counts
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
