"""Settings and the local Ray that all tests share."""

import os
import time
from collections.abc import Iterator

import pytest
import ray
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on CPU tensors; read where Triton is first imported

# One thread a process: the tiny models of the tests gain nothing from two, and threads that wait for a busy core lose much.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def no_tracking_of_another_file() -> None:
    """MLflow writes the last database into the environment, where the next job would take it for its user's wish."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def linear_of_torch() -> Iterator[None]:
    """An engine with ZeRO stage 3 replaces `linear` for the rest of the process by one that rounds a bfloat16 sum once more.

    Not by `monkeypatch`: set up first of all, it would undo a test's changes after those of the test's other fixtures.
    """
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole run of pytest: starting one takes longer than most tests.

    It has more logical CPUs than cores, so that an actor that waits does not hold up one that computes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon a checkpoint of Ray Train counts
        _start_ray(attempts=3)
        yield
        ray.shutdown()


def _start_ray(attempts: int) -> None:
    """Ray gives up a start after 30 seconds, which is too soon on a busy machine."""
    try:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    except (Exception, SystemExit):  # Ray raises one or the other, by what was too slow
        ray.shutdown()
        if attempts == 1:
            raise
        _start_ray(attempts - 1)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage starts an actor: its shards are made in this process."""
    from tests.support.without_ray import run_without_ray

    run_without_ray(monkeypatch)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, default=float("inf"), help="skip tests not begun at this time (seconds since 1970)")
    parser.addoption("--begin-with", type=int, default=0, help="number of the test file to begin with, counted around")


@pytest.hookimpl(trylast=True)  # after -m has taken away what is not asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = list(dict.fromkeys(item.path for item in items))
    if first := config.getoption("--begin-with") % max(len(files), 1):
        order = {path: number for number, path in enumerate(files[first:] + files[:first])}
        items.sort(key=lambda item: order[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(f"no time is left for {item.nodeid}")  # the summary shows one line for each reason
