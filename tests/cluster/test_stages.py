"""What is submitted to the cluster is what the jobs take: seen without one, in every run of the tests."""

import importlib

import pytest

from tests.support.cluster.stages import DATA_STAGES, TRAIN, Stage, last_stages


@pytest.mark.parametrize("stage", [*DATA_STAGES, TRAIN, *last_stages("data")], ids=lambda stage: stage.name)
def test_the_command_is_understood(stage: Stage) -> None:
    _, _, module, *arguments = stage.command("data", "experiment")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main([*arguments, "--print_config"])
    assert ended.value.code == 0
