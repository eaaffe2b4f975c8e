"""The shapes of what a training will load: read where it lies, known by its name, or reported as not counted."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.train.config import PositionConfig, TrainConfig
from pipelines.train.preflight.models import find_shapes
from sana_model.nn.config import AUTOENCODER_PRESETS, PRESETS
from sana_model.pipeline import TextToImage
from tests.support.training_world import PATH, STREAM, make_pipeline


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    init = make_pipeline(tmp_path_factory.mktemp("pipeline") / "init")
    return TrainConfig(latents=PATH, init=init, num_steps=30, micro_batch_size=4, global_batch_size=8, data=STREAM)


def test_the_shapes_are_those_of_the_pipeline_that_lies_there(training: TrainConfig) -> None:
    problems: list[str] = []
    shapes = find_shapes(training, problems)
    pipeline = TextToImage.from_pretrained(str(training.init))
    assert problems == []
    assert shapes.transformer == pipeline.transformer.config and shapes.autoencoder == pipeline.autoencoder.config
    assert shapes.autoencoder_size == sum(weight.numel() for weight in pipeline.autoencoder.parameters())
    assert shapes.text_encoder_size == sum(weight.numel() for weight in pipeline.text_encoder.model.parameters())
    assert shapes.prompts == pipeline.text_encoder.config
    counter = shapes.caption_counter
    assert counter is not None and all(weight.is_meta for weight in counter.model.parameters())  # it holds no weights


def test_positions_of_the_training_are_in_the_transformers_shape(training: TrainConfig) -> None:
    found = find_shapes(replace(training, positions=PositionConfig(base_size=16)), [])
    assert found.transformer == replace(find_shapes(training, []).transformer, base_size=16)


def test_published_models_are_known_by_name_and_others_are_reported(training: TrainConfig, tmp_path: Path) -> None:
    name, config = next((name, config) for name, config in AUTOENCODER_PRESETS.items() if "-" in name)
    preset = replace(training, init=None, preset="tiny", autoencoder=f"hf://someone/{name}-diffusers", text_encoder="no/model")
    problems: list[str] = []
    shapes = find_shapes(preset, problems)
    assert shapes.autoencoder == config and shapes.transformer.in_channels == config.latent_channels
    assert (shapes.text_encoder, shapes.text_encoder_size, shapes.caption_counter) == (None, 0, None)
    assert problems == ["the text encoder no/model is not on this machine: its memory is not counted"]
    problems.clear()
    assert find_shapes(replace(preset, autoencoder="hf://someone/else"), problems).autoencoder is None
    assert "the autoencoder hf://someone/else is not on this machine: its memory is not counted" in problems


def test_an_init_that_is_not_there_yet_takes_its_shape_from_the_preset(training: TrainConfig, tmp_path: Path) -> None:
    missing = replace(training, init=f"file://{tmp_path}/none", preset="tiny")
    problems: list[str] = []
    shapes = find_shapes(missing, problems)
    assert shapes.transformer == PRESETS["tiny"]
    assert problems[0] == f"init=file://{tmp_path}/none is not there (yet): its shape is taken from preset=tiny"
    with pytest.raises(FileNotFoundError):
        find_shapes(replace(missing, preset=None), [])
