"""The driver's part of judging checkpoints, with real Ray tasks and a judge that has no model."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pipelines.tables.errors import TrainingStopped
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoint_places import checkpoint_uri
from pipelines.train.engine.checkpoints import read_weights
from pipelines.train.engine.config import EngineConfig
from pipelines.train.engine.judgements import BestConfig, Judgement, read_best, read_judgements
from pipelines.train.judging import CheckpointJudge, Judging
from pipelines.train.loop.config import WorkerResources
from pipelines.train.loop.desk import Desk, OnTrainProgress, ToJudge, TrainProgress
from pipelines.train.run import TrainResult, run_train
from sana_model.pipeline import TextToImage
from tests.support.training_ranks import tiny_config
from tests.support.training_world import make_pipeline, make_shards, make_table
from tests.support.waiting_judge import PATIENCE, judge_badly, judge_when_told

pytestmark = pytest.mark.usefixtures("local_ray")
SCORES = {2: 3.0, 4: 7.0, 6: 7.0, 10: 5.0}


def make_judge(
    folder: Path, judge: Callable[[TrainConfig, int, str], Judgement], said: list[str], *, wait_seconds: float = PATIENCE
) -> CheckpointJudge:
    judging = Judging(
        judge=judge,
        every=2,
        resources=WorkerResources(num_cpus=0.5),
        best=BestConfig(figure="score", direction="highest"),
        wait_seconds=wait_seconds,
    )
    for step in SCORES:
        Path(checkpoint_uri(str(folder / "checkpoints"), step)).mkdir(parents=True, exist_ok=True)
        Path(checkpoint_uri(str(folder / "checkpoints"), step), "part").touch()
    return CheckpointJudge(judging, tiny_config("zoo://pipeline"), str(folder), said.append)


def poll_until(judge: CheckpointJudge, ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ended():
        judge.poll([])
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_checkpoint_is_skipped_while_another_is_judged_and_the_last_one_waits(tmp_path: Path) -> None:
    said: list[str] = []
    judge = make_judge(tmp_path, partial(judge_when_told, str(tmp_path), SCORES), said)
    judge.poll([ToJudge(2, 0.25), ToJudge(2, 0.25)])
    poll_until(judge, (tmp_path / "began-2").exists)
    judge.poll([ToJudge(4, 0.5)])
    judge.poll([ToJudge(10, 0.5)])  # the training's last step
    why = "the judgement of step 2 has not ended (it reserves 0.5 CPU)"
    assert said == [f"step 4: not judged: {why} (the steps were held 0.50 s)"]
    (tmp_path / "go").touch()
    assert judge.finish() == []
    root = str(tmp_path / "checkpoints")
    judged = read_judgements(root)
    assert {step: dict(one.figures) for step, one in judged.items()} == {2: {"score": 3.0}, 4: {}, 10: {"score": 5.0}}
    assert judged[2].where.endswith("CPU") and judged[2].seconds["total"] > 0 and judged[2].held_seconds == 0.25
    assert said[1] == f"the training has ended; judgements are awaited for {PATIENCE:g} s at most: step 2, 10"
    assert said[2].startswith("step 2: score 3 (") and said[2].endswith("held 0.25 s); it is the best so far")
    best = read_best(root)
    assert best is not None and (best.step, best.value) == (10, 5.0)
    again = make_judge(tmp_path, judge_badly, said)
    again.poll([ToJudge(2, 0.0), ToJudge(4, 0.0)])  # a start that resumes asks for nothing twice
    assert again._running is None and not again._queue and again.best == best


def test_a_judge_that_fails_or_does_not_end_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    failing = make_judge(tmp_path / "failing", judge_badly, said)
    for step, told in ((1, "not judged by task: KeyError: 'a bug'"), (2, "not judged by task: ")):
        failing.poll([ToJudge(step, 0.0)])
        poll_until(failing, lambda step=step: step in failing.judgements)  # type: ignore[misc]
        assert told in said[-1] and failing.judgements[step].problems.keys() == {"task"}
    assert failing.finish() == [] and failing.best is None
    late = make_judge(tmp_path / "late", partial(judge_when_told, str(tmp_path), SCORES), said, wait_seconds=0.0)
    late.poll([ToJudge(6, 0.0)])
    late.poll([ToJudge(10, 0.0)])
    late.finish()
    for step in (6, 10):
        assert late.judgements[step].problems == {"skipped": "it has not ended 0 s after the training (it reserves 0.5 CPU)"}, (
            late.judgements
        )
    abandoned = make_judge(tmp_path / "abandoned", partial(judge_when_told, str(tmp_path), SCORES), said)
    abandoned.poll([ToJudge(6, 0.0)])
    abandoned.abandon()
    assert read_judgements(str(tmp_path / "abandoned/checkpoints")) == {}  # for the next start


@pytest.mark.slow
def test_what_a_stopped_training_left_unjudged_is_judged_by_the_next_start(tmp_path: Path) -> None:
    """Two workers; SIGTERM comes while the first judgement runs."""
    make_table(tmp_path / "dataset", make_shards([30, 20]))
    engine = EngineConfig(zero_stage=2, dtype="fp32")
    config = replace(tiny_config(make_pipeline(tmp_path / "init")), num_workers=2, num_steps=1500, engine=engine)
    config = replace(config, keep_checkpoints=1, checkpoint_every=50)
    scores = dict.fromkeys(range(0, 1501, 100), 1.0) | {100: 5.0}
    judging = Judging(
        judge=partial(judge_when_told, str(tmp_path), scores),
        every=100,
        resources=WorkerResources(num_cpus=0.5),
        best=BestConfig(figure="score", direction="highest"),
        wait_seconds=PATIENCE,
    )
    said: list[str] = []
    checkpoints = tmp_path / "run/checkpoints"

    def start(on_progress: OnTrainProgress = lambda progress: None) -> TrainResult:
        out, dataset = str(tmp_path / "run"), str(tmp_path / "dataset")
        return run_train(dataset, config, output_dir=out, judging=judging, on_progress=on_progress, on_notice=said.append)

    def stop(progress: TrainProgress) -> None:
        if (tmp_path / "began-100").exists() and progress.step > 250:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        start(stop)
    assert (checkpoints / "step-000100").is_dir() and 100 not in read_judgements(str(checkpoints))
    assert 200 in read_judgements(str(checkpoints))  # skipped
    (tmp_path / "go").touch()
    result = start()
    judged = {one.step: dict(one.figures) for one in result.judgements}
    assert judged[100] == {"score": 5.0} and judged[1500] == {"score": 1.0} and judged[200] == {}
    assert result.best is not None and result.best.step == 100
    kept = sorted(path.name for path in checkpoints.glob("step-*"))
    assert kept == ["step-000100", "step-001500"]
    weights = read_weights(str(checkpoints / "step-000100"))
    written = TextToImage.from_pretrained(tmp_path / "run/best").transformer.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in written.items())
    assert any(line.startswith("step 100: score 5") and line.endswith("it is the best so far") for line in said)


def test_a_checkpoint_is_asked_for_when_the_parts_of_all_ranks_are_written() -> None:
    desk = Desk()
    desk.add_part(10, 1, 2, 0.5)
    desk.add_part(20, 0, 2, 0.1)
    assert desk.look(0)[2] == []
    desk.add_part(10, 0, 2, 0.25)
    assert desk.look(0)[2] == [ToJudge(10, 0.5)] and desk.look(0)[2] == []
