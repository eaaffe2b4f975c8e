"""The train stage, on a real local Ray: it learns, it goes on exactly where it was killed, it says what is wrong."""

import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from PIL import Image

from pipelines.score.config import SelectionConfig
from pipelines.tables.errors import MissingTableError, StaleTableError, TrainingError, TrainingStopped
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.runs import RunRequest
from pipelines.train.config import GridConfig, TrainConfig
from pipelines.train.engine.checkpoints import read_weights
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.loop.desk import OnNotice, OnTrainProgress, TrainProgress
from pipelines.train.run import TrainResult, run_train
from pipelines.train.stream.captions import DroppedCaption, encode_captions
from pipelines.train.stream.config import FlowConfig
from sana_model.pipeline import TextToImage
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table


@dataclass(frozen=True)
class World:
    folder: Path
    config: TrainConfig

    def train(
        self,
        name: str,
        config: TrainConfig | None = None,
        *,
        on_progress: OnTrainProgress = lambda progress: None,
        on_notice: OnNotice = lambda notice: None,
    ) -> TrainResult:
        """Train in the folder of this name, with an MLflow run of this name."""
        tracking = TrackingConfig(uri=f"sqlite:///{self.folder}/mlflow.db")
        return run_train(
            str(self.folder / "dataset"),
            config or self.config,
            output_dir=str(self.folder / name),
            run_request=RunRequest.make(name, {"seed": 0}, tracking=tracking, output_dir=self.folder, key=name),
            on_progress=on_progress,
            on_notice=on_notice,
        )

    def client(self, name: str) -> tuple[mlflow.MlflowClient, str]:
        """And the id of the last MLflow run of this name."""
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("sana")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
        return client, next(run.info.run_id for run in runs if run.info.run_name == name)

    def metric(self, name: str, key: str) -> dict[int, float]:
        """By step, each of which comes once."""
        client, run_id = self.client(name)
        history = client.get_metric_history(run_id, key)
        assert len({metric.step for metric in history}) == len(history)
        return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> World:
    folder = tmp_path_factory.mktemp("train")
    make_table(folder / "dataset", make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    config = TrainConfig(
        latents=PATH,
        init=make_pipeline(folder / "init"),
        num_steps=160,
        micro_batch_size=8,
        global_batch_size=16,
        data=STREAM,
        engine=EngineConfig(zero_stage=0, dtype="fp32"),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=10),
        grid=GridConfig(prompts=["a red square", "a blue square"], every=80, num_steps=4),
        checkpoint_every=20,
        max_failures=0,
    )
    return World(folder, config)


@pytest.fixture(scope="module")
def straight(world: World) -> TrainResult:
    """A training that nothing disturbs."""
    return world.train("straight")


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return TextToImage.from_pretrained(result.pipeline).transformer.state_dict()


def test_learns(world: World, straight: TrainResult) -> None:
    assert straight.num_steps == 160 and not straight.was_done
    assert straight.loss_end < 0.4 * straight.loss_start
    assert [step for step, _ in straight.losses] == list(range(10, 161, 10))
    assert world.metric("straight", "loss") == pytest.approx(dict(straight.losses))
    rates = world.metric("straight", "lr")
    assert rates[10] == pytest.approx(2e-3 * 10 / 11) and rates[160] < 1e-6
    assert 0 <= world.metric("straight", "data_wait_share")[160] < 1
    assert world.metric("straight", "epoch")[160] > 30
    assert world.metric("straight", "loss_sigma.0.4-0.6")
    assert world.metric("straight", "tokens_per_second")[160] > 0 and world.metric("straight", "grad_norm")
    assert world.metric("straight", "ema_decay")[160] == pytest.approx(161 / 170)


def test_says_in_mlflow_what_it_is(world: World, straight: TrainResult) -> None:
    client, run_id = world.client("straight")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "0"}
    assert run.data.tags["checkpoint"] == straight.checkpoint and run.data.tags["version.torch"] == torch.__version__
    assert len(run.data.tags["mlflow.source.git.commit"].removesuffix("-dirty")) == 40
    read = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert read.keys() == straight.inputs.keys() == {PATH, "captions/a", "captions/b", "scores/clip/a", "scores/clip/b"}
    assert all(straight.inputs[name].startswith(digest) for name, digest in read.items())


def test_ends_in_a_pipeline_with_the_average_weights(world: World, straight: TrainResult) -> None:
    pipeline = TextToImage.from_pretrained(straight.pipeline)
    assert pipeline.flow_shift == 2.0 and pipeline.text_encoder.config.instruction == "User Prompt: "
    assert all(weight.dtype == torch.float32 for weight in pipeline.transformer.parameters())
    assert isinstance(pipeline(["a red square"], num_steps=2)[0], Image.Image)
    averages = read_weights(straight.checkpoint)
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, averages[name]), name


def test_draws_grids_on_the_way(world: World, straight: TrainResult) -> None:
    assert [step for step, _ in straight.grids] == [80, 160]
    for _, path in straight.grids:
        assert Image.open(path).size == (64 + 2 + 64, 64)
    client, run_id = world.client("straight")
    logged = [Path(artifact.path).name for artifact in client.list_artifacts(run_id, "images")]
    for step in (80, 160):
        assert any(name.replace("%", "+").startswith(f"samples+step+{step}+") for name in logged), logged


def test_done_is_done(world: World, straight: TrainResult) -> None:
    again = world.train("straight", replace(world.config, log_every=7, max_failures=5))
    assert again == replace(straight, was_done=True)


def test_other_settings_are_refused(world: World, straight: TrainResult) -> None:
    other = replace(world.config, flow=FlowConfig(shift=4.0), optim=replace(world.config.optim, lr=1e-3))
    with pytest.raises(StaleTableError, match="holds a training with other settings") as error:
        world.train("straight", other)
    assert "config.flow.shift: None -> 4.0\n  config.optim.lr: 0.002 -> 0.001\nGive" in str(error.value)


@dataclass(frozen=True)
class Disturbed:
    """A training in three starts: stopped by Ctrl-C, then killed, then to its end; and what was seen on the way."""

    stopped: TrainingStopped
    stopped_status: str
    killed: TrainingError
    killed_status: str
    checkpoints: list[set[str]]  # after each start
    notices: list[str]  # of the last start
    result: TrainResult

    @property
    def stopped_step(self) -> int:
        found = re.match(r"stopped at step (\d+), with a checkpoint", str(self.stopped))
        assert found is not None, self.stopped
        return int(found[1])


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [process for process in children if process.name().startswith("ray::RayTrainWo")]


@pytest.fixture(scope="module")
def disturbed(world: World) -> Disturbed:
    """One training, so that each start of a worker (seconds of imports) shows more than one thing."""
    config = replace(world.config, keep_checkpoints=20)
    sent: list[int] = []

    def interrupt_driver(progress: TrainProgress) -> None:
        if progress.step >= 30 and not sent:
            sent.append(progress.step)
            os.kill(os.getpid(), signal.SIGINT)

    def kill_worker(progress: TrainProgress) -> None:
        if progress.step >= 70:
            for process in workers():
                process.kill()

    def terminate_worker(progress: TrainProgress) -> None:
        if progress.step >= 100 and len(sent) == 1:
            sent.append(progress.step)
            for process in workers():
                process.terminate()

    def state() -> tuple[str, set[str]]:
        client, run_id = world.client("disturbed")
        return client.get_run(run_id).info.status, {path.name for path in (world.folder / "disturbed/checkpoints").iterdir()}

    with pytest.raises(TrainingStopped) as stopped:
        world.train("disturbed", config, on_progress=interrupt_driver)
    stopped_status, first = state()
    with pytest.raises(TrainingError) as killed:
        world.train("disturbed", config, on_progress=kill_worker)
    killed_status, second = state()
    notices: list[str] = []
    sparse = replace(config, checkpoint_every=1000)  # the only checkpoints are that of the notice and the last
    result = world.train("disturbed", sparse, on_progress=terminate_worker, on_notice=notices.append)
    assert len(sent) == 2
    checkpoints = [first, second, state()[1]]
    return Disturbed(stopped.value, stopped_status, killed.value, killed_status, checkpoints, notices, result)


def test_ctrl_c_ends_it_at_once_with_a_checkpoint(disturbed: Disturbed) -> None:
    assert 30 <= disturbed.stopped_step < 160
    assert f"step-{disturbed.stopped_step:06d}" in disturbed.checkpoints[0] and disturbed.stopped_status == "KILLED"


def test_a_killed_worker_ends_it_and_the_next_start_resumes(disturbed: Disturbed) -> None:
    assert "run it again to go on from the last checkpoint" in str(disturbed.killed) and disturbed.killed_status == "FAILED"
    assert any(notice.startswith("goes on from the checkpoint of step ") for notice in disturbed.notices)


def test_a_worker_that_will_be_killed_saves_first_and_goes_on(disturbed: Disturbed) -> None:
    _, before, after = disturbed.checkpoints
    noticed, last = sorted(after - before)
    assert "step-000100" <= noticed < last == "step-000160"


def test_whatever_disturbed_it_the_result_is_exactly_that_of_an_undisturbed_training(
    world: World, straight: TrainResult, disturbed: Disturbed
) -> None:
    client, run_id = world.client("disturbed")
    assert client.get_run(run_id).info.status == "FINISHED"
    result = disturbed.result
    assert world.metric("disturbed", "loss") == pytest.approx(dict(result.losses))  # one run, each step once
    partial = -(-disturbed.stopped_step // 10) * 10  # the mean of this report is over the steps after the stop alone
    for found, expected in zip(result.losses, straight.losses, strict=True):
        assert found == expected or found[0] == partial
    assert result.loss_start == straight.loss_start and result.loss_end == straight.loss_end
    for name, weight in weights(result).items():
        assert torch.equal(weight, weights(straight)[name]), name


def test_what_fails_in_a_worker_is_one_message(world: World, tmp_path: Path) -> None:
    pipeline = TextToImage.from_pretrained(str(world.config.init))
    preset = replace(world.config, init=None, preset="tiny", text_encoder=str(tmp_path / "t"), autoencoder=str(tmp_path / "a"))
    pipeline.text_encoder.save_pretrained(tmp_path / "t")
    narrow = replace(pipeline.autoencoder.config, latent_channels=4)
    type(pipeline.autoencoder)(narrow).save_pretrained(tmp_path / "a")
    with pytest.raises(TrainingError) as error:
        world.train("wrong", preset)
    assert "holds latents of 8 channels, the transformer takes 4" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_driver_can_tell_at_once(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_workers=4 need a shard each"):
        world.train("early", replace(world.config, num_workers=4, global_batch_size=32))
    with pytest.raises(MissingTableError, match="there is no table 'latents/other'"):
        world.train("early", replace(world.config, latents="latents/other"))
    make_table(tmp_path, make_shards([8]), complete=False)
    with pytest.raises(ValueError, match="is not complete"):
        run_train(str(tmp_path), world.config, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"global_batch_size=12 must be a multiple of micro_batch_size \* num_workers = 8"):
        replace(world.config, global_batch_size=12)
    with pytest.raises(ValueError, match="init and preset are both missing"):
        replace(world.config, init=None)
    with pytest.raises(ValueError, match="preset=huge is none of sana"):
        replace(world.config, preset="huge")
    shares = SelectionConfig(policy="proportions", proportions={"a": 1, "typo": 1})
    with pytest.raises(ValueError, match="proportions gives a share to typo, and only"):
        replace(world.config, data=replace(world.config.data, selection=shares))
    with pytest.raises(TrainingError, match="init has dim=64 and preset=shapes 128: leave preset out"):
        world.train("other-shape", replace(world.config, preset="shapes"))
    with pytest.raises(ValueError, match="give text_encoder and autoencoder too"):
        replace(world.config, init=None, preset="tiny")


def test_null_captions_among_others(world: World) -> None:
    encoder = TextToImage.from_pretrained(str(world.config.init)).text_encoder
    null, null_embeds = DroppedCaption.encode(encoder, "own_mask"), encoder.null()[0]
    embeds, mask = encode_captions(encoder, ["a red square", "lost", "blue"], [False, True, False], null)
    told, told_mask = encoder.encode(["a red square", "blue"])
    assert torch.equal(embeds[[0, 2]], told) and torch.equal(mask[[0, 2]], told_mask)
    width = null_embeds.shape[1]
    assert torch.equal(embeds[1:2, :width], null_embeds) and not embeds[1, width:].any()
    assert mask[1].tolist() == [True] * width + [False] * (mask.shape[1] - width)
    only, only_mask = encode_captions(encoder, ["lost", "too"], [True, True], null)
    assert torch.equal(only, null_embeds.expand_as(only)) and only_mask.shape == (2, width)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_lost_workers_are_replaced(world: World, zero_stage: int) -> None:
    """Two workers in bf16; one of them is killed, and the training goes on by itself."""
    engine = EngineConfig(zero_stage=zero_stage, dtype="bf16")
    config = replace(world.config, num_workers=2, num_steps=80, grid=GridConfig(), engine=engine, max_failures=1)
    straight = world.train(f"undisturbed-{zero_stage}", config)
    killed: list[int] = []

    def kill_one(progress: TrainProgress) -> None:
        workers = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::RayTrainWo")]
        if progress.step >= 40 and workers and not killed:
            os.kill(workers[-1].pid, signal.SIGKILL)
            killed.append(progress.step)

    result = world.train(f"lost-{zero_stage}", config, on_progress=kill_one)
    assert killed and killed[0] < 80
    assert result.losses == straight.losses
    for name, weight in weights(result).items():
        assert torch.equal(weight, weights(straight)[name]), name
