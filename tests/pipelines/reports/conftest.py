"""The dataset that all report pages are made from."""

import pytest

from tests.support.report_world import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("report"))
