"""What is told before a training: of its dataset, and in plain words of what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.score.config import ImageFilter
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.table import Table
from pipelines.train.config import GridConfig, PositionConfig, TrainConfig
from pipelines.train.engine.config import EngineConfig, LoraConfig, OptimConfig
from pipelines.train.loop.config import WorkerResources
from pipelines.train.preflight.run import GIB, Preflight, format_preflight, run_preflight
from sana_model.nn.config import TextEncoderConfig
from tests.support.training_world import PATH, STREAM, add_captioner, make_pipeline, make_shards, make_table, write_table


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    init = make_pipeline(tmp_path_factory.mktemp("pipeline") / "init")
    engine = EngineConfig(zero_stage=0, dtype="fp32")
    return TrainConfig(
        latents=PATH, init=init, num_steps=30, micro_batch_size=4, global_batch_size=8, data=STREAM, engine=engine
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset")
    make_table(
        folder, make_shards([20, 17], ("64x64", "64x64", "64x64", "64x64", "64x64", "64x64", "64x64", "64x64", "32x128"))
    )
    return str(folder)


def look(dataset: str, training: TrainConfig) -> Preflight:
    return run_preflight(dataset, training, device_gib=80.0)


def test_counts_the_dataset(dataset: str, training: TrainConfig) -> None:
    result = look(dataset, training)
    (table,) = result.dataset.tables
    assert (table.rows, table.shards, table.draws) == (37, 2, 37)
    assert dict(result.dataset.buckets) == {(8, 8): 33, (4, 16): 4}
    assert (result.step.height, result.step.width) in {(8, 8), (4, 16)}
    # "User Prompt: a red square": the token at 0, the instruction's last one, and three words
    assert max(result.dataset.caption_tokens) == 5 and result.step.caption_tokens == 5
    assert result.sizes.transformer == result.sizes.trained
    assert result.problems == []
    text = format_preflight(result)
    assert "37 samples in 2 shards, weight 1: 37 in an epoch, 100.0% of it" in text
    assert "an epoch is 37 samples, 4.6 steps; the training is 6.5 epochs" in text
    assert "8 images = 4 in a micro-batch x 1 workers x 2 accumulated" in text
    assert "512 image tokens" in text and "none found" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"micro_batch_size": 8}, "1 of 2 buckets, with 4 samples, have fewer than one micro-batch for each worker"),
        (
            {"prompts": TextEncoderConfig(instruction="", max_tokens=2)},
            "% of the captions are longer than 2 tokens, and are cut",
        ),
        ({"optim": OptimConfig(warmup_steps=31)}, "warmup_steps=31 and decay_steps=0 are more than num_steps=30"),
        ({"num_workers": 4, "global_batch_size": 16}, "num_workers=4 need a shard each"),
        ({"positions": PositionConfig(base_size=16)}, "made for 16x16 tokens, the images have about 8x8"),
        ({"positions": PositionConfig(base_size=64)}, "set positions.scale"),
        ({"latents": "latents/none"}, "there is no table 'latents/none'"),
        ({"data": replace(STREAM, captioners=("a", "c"))}, "there is no table 'captions/c'"),
    ],
)
def test_says_what_is_wrong(dataset: str, training: TrainConfig, changes: dict[str, object], problem: str) -> None:
    result = look(dataset, replace(training, **changes))  # type: ignore[arg-type]
    assert any(problem in found for found in result.problems), result.problems
    assert problem in format_preflight(result)


def test_counts_what_captions_and_filters_let_in(training: TrainConfig, tmp_path: Path) -> None:
    make_table(tmp_path, make_shards([20, 20]))
    few = {f"{index:064x}": ("a thing", 28.0) for index in range(10)}
    add_captioner(tmp_path, "few", {"00000": few, "00001": {}})
    rows = [{"id": row_id, "score": float(index), "detail": None} for index, row_id in enumerate(few)]
    scores = Table(str(tmp_path), "image_scores/aesthetic", IMAGE_SCORES)
    write_table(scores, Identity("score_images", {}, {}, {}), {"00000": rows, "00001": []})
    of_few = replace(STREAM, captioners=("few",))
    assert look(str(tmp_path), replace(training, data=of_few)).dataset.draws == 10
    filtered = replace(of_few, image_filters={"aesthetic": ImageFilter(min=6.0)})
    assert look(str(tmp_path), replace(training, data=filtered)).dataset.draws == 4
    Path(scores.shard_uri("00001")).unlink()
    problems = look(str(tmp_path), replace(training, data=filtered)).problems
    assert any(f"until this is mended: {scores.uri} has no shard 00001" in problem for problem in problems)


def test_more_than_a_gpu_has_is_the_first_problem(training: TrainConfig, tmp_path: Path) -> None:
    grid = GridConfig(prompts=["a red square"] * 4)
    preset = replace(
        training,
        init=None,
        preset="sana-0.6b",
        autoencoder="hf://mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        text_encoder="Efficient-Large-Model/gemma-2-2b-it",
        resources=WorkerResources(num_gpus=1),
        engine=EngineConfig(zero_stage=0, dtype="bf16", checkpoint_blocks=1),
        grid=grid,
    )
    result = run_preflight(str(tmp_path), preset, device_gib=16.0)
    assert result.memory.total > 16 * GIB
    gib = f"{result.memory.total / GIB:.1f}"
    assert result.problems[0].startswith(f"{gib} GiB are more than the 16 GiB of a GPU: take a smaller micro_batch_size")
    assert (result.sizes.transformer, result.sizes.autoencoder) == (591_747_872, 312_250_275)
    adapters = run_preflight(str(tmp_path), replace(preset, lora=LoraConfig()), device_gib=16.0)
    assert adapters.memory.total < 16 * GIB and adapters.memory.moment == "drawing a grid"
    assert adapters.sizes.trained < 0.03 * adapters.sizes.transformer
