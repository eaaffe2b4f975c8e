"""The training's workers without Ray: other world sizes, damaged checkpoints, bad steps, validation."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from pipelines.tables.chance import is_held_out
from pipelines.tables.errors import TrainingError
from pipelines.tracking.config import TrackingConfig
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoints import Checkpoint, read_weights
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.loop.config import BadStepConfig
from pipelines.train.stream.config import ValidationConfig, WeightedTable
from pipelines.train.stream.stream import TrainingStream
from pipelines.train.worker import TrainWorker
from tests.support.drawn import read_drawn
from tests.support.s3 import BUCKET, s3_environment, serve_s3
from tests.support.training_ranks import BUCKETS, tiny_config, train_on_ranks
from tests.support.training_world import (
    PATH,
    STREAM,
    add_captioner,
    make_pipeline,
    make_row,
    make_shards,
    make_source,
    make_table,
)

SIZES = [30, 20, 26]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = tiny_config(make_pipeline(tmp_path_factory.mktemp("init")))
    return replace(config, data=replace(STREAM, shuffle_shards=1), checkpoint_every=5, record_samples=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_table(folder, make_shards(SIZES, BUCKETS))
    return folder


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_two_workers_then_one_then_two(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    """One training on a mixture, whose world size and ZeRO stage change: no sample that is due is lost, none comes twice."""
    make_table(tmp_path / "more", make_shards([7, 5], BUCKETS, first=100))
    mixture = [WeightedTable(latents=PATH), WeightedTable(latents=PATH, dataset_uri=str(tmp_path / "more"), weight=1.5)]
    config = replace(config, latents=mixture)
    turns = [(2, 3, 5), (1, 1, 12), (2, 2, 60)]
    for num_workers, zero_stage, num_steps in turns:
        engine = EngineConfig(zero_stage=zero_stage, dtype="fp32")
        part = replace(config, num_workers=num_workers, engine=engine, num_steps=num_steps)
        trained = train_on_ranks(tmp_path, dataset, [("run", part)])["run"]
        assert trained.error is None and list(trained.losses) == list(range(1, num_steps + 1))
    drawn = read_drawn(str(tmp_path / "run" / "drawn"))
    assert list(drawn) == list(range(1, 61)) and all(len(samples) == 4 for samples in drawn.values())
    counts = Counter(sample for samples in drawn.values() for sample in samples)
    states = Checkpoint.open(str(tmp_path / "run" / "checkpoints" / "step-000060")).states
    buffers = [state["stream"]["buffers"] for state in states]
    counts.update((epoch, sample_id) for buffer in buffers for rows in buffer.values() for epoch, _, sample_id in rows)
    ended = min(state["stream"]["epoch"] for state in states)
    assert ended >= 2 and set(counts.values()) == {1}
    sources, numbers = config.sources(str(dataset)), (range(sum(SIZES)), range(100, 112))
    due = [
        {
            (draw, sample_id)
            for source, indices in zip(sources, numbers, strict=True)
            for sample_id in (str(make_row(index)["id"]) for index in indices)
            for epoch in range(num_epochs)
            for draw in source.draws(sample_id, epoch=epoch, seed=config.seed)
        }
        for num_epochs in (ended, ended + 3)
    ]
    assert due[0] <= counts.keys() <= due[1] and len(due[0]) > ended * 90


def test_damaged_checkpoints_give_way_to_the_one_before(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    config = replace(config, keep_checkpoints=3)
    straight = train_on_ranks(tmp_path, dataset, [("straight", replace(config, num_steps=20)), ("run", config)])["straight"]
    folder = tmp_path / "run"
    samples = read_drawn(str(tmp_path / "straight" / "drawn"))
    (folder / "checkpoints" / "step-000010" / "rank-00000.json").unlink()  # a kill in the middle of the write
    trained = train_on_ranks(tmp_path, dataset, [("run", replace(config, num_steps=15))])["run"]
    assert trained.losses == {step: loss for step, loss in straight.losses.items() if step <= 15}
    newest = folder / "checkpoints" / "step-000015" / "rank-00000-moments.safetensors"
    os.truncate(newest, newest.stat().st_size - 8)
    trained = train_on_ranks(tmp_path, dataset, [("run", replace(config, num_steps=20))])["run"]
    assert trained.losses == straight.losses
    assert read_drawn(str(folder / "drawn")) == samples
    assert steps_in(folder) == [10, 15, 20]


def test_nothing_begins_anew_over_damaged_checkpoints(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    train_on_ranks(tmp_path, dataset, [("run", replace(config, num_steps=5))])
    os.truncate(tmp_path / "run" / "checkpoints" / "step-000005" / "rank-00000-weights.safetensors", 10)
    error = train_on_ranks(tmp_path, dataset, [("run", config)])["run"].error
    assert error is not None and "none of the 1 checkpoints" in error and "has 10 bytes in place of" in error
    assert steps_in(tmp_path / "run") == [5]


def test_checkpoints_that_stay(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    kept = replace(config, num_steps=12, checkpoint_every=2, keep_checkpoints=1, keep_every=6)
    other = replace(config, num_steps=4, resume_from=str(tmp_path / "kept" / "checkpoints" / "step-000012"))
    trained = train_on_ranks(tmp_path, dataset, [("kept", kept), ("other", replace(other, num_steps=15))])
    assert steps_in(tmp_path / "kept") == [6, 12]
    assert list(trained["other"].losses) == list(range(1, 16))  # it went on from the other folder's checkpoint
    assert min(read_drawn(str(tmp_path / "other" / "drawn"))) == 13


def test_a_captioner_that_is_added_changes_no_sample(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    """A training with one captioner more goes on from another's checkpoint: the same samples, with new captions among them."""
    shutil.copytree(dataset, tmp_path / "dataset")
    entries = {name: {row["id"]: ("new", 35.0) for row in rows} for name, rows in make_shards(SIZES, BUCKETS).items()}
    add_captioner(tmp_path / "dataset", "c", entries)
    longer = replace(config, num_steps=20)
    data = replace(config.data, captioners=("a", "b", "c"))
    more = replace(longer, data=data, resume_from=str(tmp_path / "before/checkpoints/step-000010"))
    trained = train_on_ranks(tmp_path, tmp_path / "dataset", [("before", config), ("more", more), ("straight", longer)])
    before, after = trained["straight"].losses, trained["more"].losses
    assert trained["more"].error is None and list(after) == list(before) == list(range(1, 21))
    assert all((before[step] == after[step]) == (step <= 10) for step in before)
    drawn, others = (read_drawn(str(tmp_path / name / "drawn")) for name in ("more", "straight"))
    assert list(drawn) == list(range(11, 21)) and all(drawn[step] == others[step] for step in drawn)


def test_checkpoints_on_s3(tmp_path: Path, dataset: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # of another server
        root = f"s3://{BUCKET}/runs"
        local = train_on_ranks(tmp_path, dataset, [("local", replace(config, num_steps=8))])["local"]
        train_on_ranks(tmp_path, dataset, [("remote", replace(config, num_steps=5))], output_root=root)
        remote = train_on_ranks(tmp_path, dataset, [("remote", replace(config, num_steps=8))], output_root=root)["remote"]
        assert remote.error is None and remote.losses == local.losses
        assert read_drawn(f"{root}/remote/drawn") == read_drawn(str(tmp_path / "local" / "drawn"))
        weights = read_weights(f"{root}/remote/checkpoints/step-000008")
        for name, weight in read_weights(str(tmp_path / "local" / "checkpoints" / "step-000008")).items():
            assert weights[name].equal(weight)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one sample whose latents are not finite."""
    folder = tmp_path_factory.mktemp("broken")
    shards = make_shards([30, 20, 26])
    shards["00001"][7]["latents"] = b"\x00\x7e" * (8 * 8 * 8)  # float16 NaN
    make_table(folder, shards)
    return folder


def test_bad_steps(tmp_path: Path, broken: Path, config: TrainConfig) -> None:
    """The sample comes once an epoch of 19 steps."""
    config = replace(config, num_steps=30)

    def with_policy(policy: str) -> TrainConfig:
        return replace(config, bad_steps=BadStepConfig(policy=policy))  # type: ignore[arg-type]

    policies = [(policy, with_policy(policy)) for policy in ("stop", "skip", "roll_back")]
    trained = train_on_ranks(tmp_path, broken, policies)
    error = trained["stop"].error
    assert error is not None and "was bad: loss nan" in error and "bad_steps.policy=skip" in error
    for policy in ("skip", "roll_back"):
        assert trained[policy].error is None and 1 <= trained[policy].num_bad <= 3
        assert list(trained[policy].losses) == list(range(1, 31))
        assert all(loss < 10 for loss in trained[policy].losses.values())
        bad = make_shards([30, 20, 26])["00001"][7]["id"]
        drawn = read_drawn(str(tmp_path / policy / "drawn"))
        assert all(len(samples) >= 4 for samples in drawn.values())
        assert any(sample_id == bad for samples in drawn.values() for _, sample_id in samples) == (policy == "skip")
        assert all(
            weight.isfinite().all() for weight in read_weights(str(tmp_path / policy / "checkpoints/step-000030")).values()
        )


def test_a_loss_that_leaps(tmp_path: Path, config: TrainConfig) -> None:
    """One sample in 300 has latents thirty times as large; it comes in step 60, once there are steps enough to compare with."""
    shards = make_shards([100, 100, 100])
    plain = make_table(tmp_path / "plain", shards)
    stream = TrainingStream([make_source(plain)], config.data, micro_batch_size=config.micro_batch_size, seed=config.seed)
    batches = list(islice(stream, 120))
    leaps = batches[118].ids[0]  # the first of the two micro-batches of step 60
    for rows in shards.values():
        for row in rows:
            if row["id"] == leaps:
                latents = np.frombuffer(bytes(row["latents"]), np.float16)  # type: ignore[arg-type]
                row["latents"] = (30 * latents).tobytes()
    make_table(tmp_path / "dataset", shards)
    config = replace(config, num_steps=64, optim=OptimConfig(lr=1e-4), keep_every=55)
    policies: dict[str, BadStepConfig] = {
        policy: BadStepConfig(policy=policy, spike_factor=5.0)  # type: ignore[arg-type]
        for policy in ("stop", "skip", "roll_back")
    }
    configs = [(policy, replace(config, bad_steps=bad_steps)) for policy, bad_steps in policies.items()]
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    trained = train_on_ranks(tmp_path, tmp_path / "dataset", [("blind", config), *configs], tracking=tracking)
    assert trained["blind"].error is None and trained["blind"].num_bad == 0
    assert trained["blind"].losses[60] > 5 * trained["blind"].losses[59]
    error = trained["stop"].error
    assert error is not None and "the step after step 59 was bad: loss" in error and max(trained["stop"].losses) == 59
    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert experiment is not None
    for policy, told in (("skip", "it is passed over"), ("roll_back", "back at step 55, with the next samples")):
        result = trained[policy]
        assert result.error is None and result.num_bad == 1 and list(result.losses) == list(range(1, 65))
        assert max(list(result.losses.values())[50:]) < 5 * result.losses[50]
        (run,) = client.search_runs([experiment.experiment_id], f"tags.run_key = '{policy}'")
        assert run.data.tags["notice.001"].startswith("the step after step 59 was bad: loss ")
        assert run.data.tags["notice.001"].endswith(told) and run.data.metrics["bad_steps"] == 1
    weights = [read_weights(str(tmp_path / policy / "checkpoints/step-000055"), average=False) for policy in ("blind", "skip")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])  # until then nothing was another


def test_validation_is_the_same_on_any_number_of_workers(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    held_out = replace(config, num_steps=4, data=replace(STREAM, held_out_share=0.2), validation=ValidationConfig(every=2))
    held_out = replace(held_out, optim=OptimConfig(lr=1e-12), keep_best="validation_loss")
    one = train_on_ranks(tmp_path, dataset, [("one", held_out)])["one"]
    sharded = replace(held_out, num_workers=2, engine=EngineConfig(zero_stage=3, dtype="fp32"))
    two = train_on_ranks(tmp_path, dataset, [("two", sharded)])["two"]
    assert one.metrics["validation_loss"] == pytest.approx(two.metrics["validation_loss"], rel=1e-5)
    drawn = {sample_id for samples in read_drawn(str(tmp_path / "one" / "drawn")).values() for _, sample_id in samples}
    assert drawn and not any(is_held_out(sample_id, 0.2) for sample_id in drawn)


def test_what_cannot_be_validated_with(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    other = replace(config, data=replace(STREAM, held_out_share=1e-6))
    error = train_on_ranks(tmp_path, dataset, [("none", other)])["none"].error
    assert error is not None and "has no sample to validate with" in error
    with pytest.raises(ValueError, match=r"keep_best=validation_loss needs validation\.latents"):
        replace(config, keep_best="validation_loss")


@pytest.mark.slow
def test_skewed_buckets_on_two_workers_of_the_demo_model(tmp_path: Path, config: TrainConfig) -> None:
    """Twenty buckets, the first seventy times as frequent as the last, three epochs and more."""
    sides = [f"{8 * height}x{8 * width}" for height in range(4, 9) for width in (5, 6, 8, 10)]
    weights = 0.8 ** np.arange(20)
    buckets = np.random.default_rng(0).choice(sides, 600, p=weights / weights.sum())
    shards = {f"{shard:05d}": [make_row(i, buckets[i]) for i in range(100 * shard, 100 * shard + 100)] for shard in range(6)}
    make_table(tmp_path / "dataset", shards)
    config = replace(config, init="zoo://pipeline", num_workers=2, num_steps=125, micro_batch_size=8, global_batch_size=16)
    trained = train_on_ranks(tmp_path, tmp_path / "dataset", [("run", replace(config, log_every=25))])["run"]
    counts = Counter(sample for samples in read_drawn(str(tmp_path / "run" / "drawn")).values() for sample in samples)
    states = Checkpoint.open(str(tmp_path / "run" / "checkpoints" / "step-000125")).states
    assert trained.error is None and min(state["stream"]["epoch"] for state in states) >= 3
    buffers = [state["stream"]["buffers"] for state in states]
    counts.update((epoch, sample_id) for buffer in buffers for rows in buffer.values() for epoch, _, sample_id in rows)
    assert set(counts.values()) == {1} and len(set(buckets)) == 20
    assert {key for key in counts if key[0] < 3} == {
        (epoch, make_row(index)["id"]) for epoch in range(3) for index in range(600)
    }
    print(f"waiting for data: {trained.wait_share:.2%} of the time of the steps")
    assert trained.wait_share < 0.05


def test_a_problem_of_one_worker_alone_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that of all of them is not."""
    monkeypatch.setattr("pipelines.train.loop.worker.gather_objects", lambda problem: [problem, "the hub did not answer"])
    worker: Any = SimpleNamespace(world_size=2)
    with pytest.raises(RuntimeError, match="the hub did not answer") as caught:
        TrainWorker._raise_together(worker, None)
    assert not isinstance(caught.value, TrainingError)
    with pytest.raises(TrainingError, match="no such model"):
        TrainWorker._raise_together(worker, "no such model")
