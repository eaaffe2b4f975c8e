"""The record of a training in its output folder, also one that an earlier version of this program wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.tables.errors import StaleTableError
from pipelines.tables.identity import Identity
from pipelines.train.loop.record import RECORD, TrainingRecord

BEFORE = Identity(
    "train", {"num_steps": 5, "data": {"caption_dropout": 0.1}}, {"init": "sha256:1"}, {"latents/tiny-64": "1234"}
)


def test_a_longer_training_is_told_to_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    TrainingRecord.claim(str(tmp_path), BEFORE).finish({"loss_end": 0.5})
    for step in (3, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "x").touch()
    for num_steps, told in ((9, "--train.resume_from {}/checkpoints/step-000005"), (4, "delete the folder")):
        with pytest.raises(StaleTableError, match=f"config.num_steps: 5 -> {num_steps}") as error:
            TrainingRecord.claim(str(tmp_path), replace(BEFORE, config={**BEFORE.config, "num_steps": num_steps}))
        assert told.format(tmp_path) in str(error.value)
    other = replace(BEFORE, config={"num_steps": 5, "data": {"caption_dropout": 0.1, "captioners": ["a"]}})
    with pytest.raises(StaleTableError, match=r"other captions, .*--train\.resume_from .*/step-000005"):
        TrainingRecord.claim(str(tmp_path), replace(other, inputs={**BEFORE.inputs, "captions/a": "5678"}))


def test_a_finished_training_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    """Its configuration named no captioners: the same training now is another one, and is told what differs."""
    content = {"fingerprint": "of then", **BEFORE.values(), "result": {"loss_end": 0.5}}
    (tmp_path / RECORD).write_text(json.dumps(content))
    found = TrainingRecord.read(str(tmp_path))
    assert found is not None and (found.identity, found.result) == (BEFORE, {"loss_end": 0.5})
    data = {"caption_dropout": 0.1, "captioners": ("a",)}
    now = replace(BEFORE, config={"num_steps": 5, "data": data}, inputs={**BEFORE.inputs, "captions/a": "5678"})
    with pytest.raises(StaleTableError, match="holds a training with other settings") as error:
        TrainingRecord.claim(str(tmp_path), now)
    assert "config.data.captioners: (absent) -> ['a']\n  inputs.captions/a: (absent) -> '5678'" in str(error.value)
