"""What a training keeps of its checkpoints' judgements."""

from pathlib import Path

import pytest

from pipelines.train.engine.checkpoint_places import is_checkpoint
from pipelines.train.engine.judgements import (
    BestCheckpoint,
    BestConfig,
    Judgement,
    choose_best,
    find_named,
    read_judgements,
    write_best,
    write_judgements,
)


def test_the_best_is_the_first_of_the_highest_or_the_lowest() -> None:
    judged = [Judgement(step=step, figures={"fid": fid}) for step, fid in ((30, 5.0), (20, 9.0), (10, 5.0), (40, 9.0))]
    judged.append(Judgement(step=5, problems={"fid": "no model"}))
    for direction, step, value in (("lowest", 10, 5.0), ("highest", 20, 9.0)):
        config = BestConfig(figure="fid", direction=direction)  # type: ignore[arg-type]
        assert choose_best(judged, config) == BestCheckpoint(step=step, figure="fid", direction=direction, value=value)
    assert choose_best(judged, BestConfig(figure="clip_score", direction="highest")) is None


def test_the_files_beside_the_checkpoints(tmp_path: Path) -> None:
    root = str(tmp_path / "checkpoints")
    assert read_judgements(root) == {} and find_named(f"{root}/step-000010") == f"{root}/step-000010"
    with pytest.raises(FileNotFoundError, match=r"checkpoints/best: no checkpoint was chosen as the best there"):
        find_named(f"{root}/best")
    judgement = Judgement(step=20, figures={"fid": 5.0}, problems={"hps": "gone"}, seconds={"total": 2.0}, where="here")
    write_judgements(root, [judgement, Judgement(step=10)])
    write_best(root, BestCheckpoint(step=20, figure="fid", direction="lowest", value=5.0))
    assert read_judgements(root) == {10: Judgement(step=10), 20: judgement}
    assert find_named(f"{root}/best/") == f"{root}/step-000020"
    assert is_checkpoint(f"{root}/best") and is_checkpoint("s3://b/run/checkpoints/step-000020/")
    assert not is_checkpoint("data/train/pipeline") and not is_checkpoint(f"{root}/best/pipeline")
    (tmp_path / "checkpoints/judgements.json").write_text('[{"step": 1, "unknown": 2}]')
    with pytest.raises(ValueError, match=r"judgements\.json is damaged .*: move it away"):
        read_judgements(root)
