"""Preference scores on tiny weights, against what their published code gives for the same weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.preference.aesthetic import Aesthetic
from pipelines.evaluate.preference.config import AestheticConfig, HpsConfig, ImageRewardConfig, PickScoreConfig
from pipelines.evaluate.preference.hps import Hps
from pipelines.evaluate.preference.image_reward import ImageReward
from pipelines.evaluate.preference.pick_score import PickScore
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import to_png
from tests.support import preference_world as world
from tests.support.metric_models import tensors, write_bert, write_clip

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("preference.json").read_text())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


def scores(metric: Metric[Any]) -> list[list[float]]:
    """The scores of each picture with each prompt, in batches of three."""
    rows = [{"id": f"{number}", "image_bytes": to_png(image)} for number, image in enumerate(world.pictures())]
    prepared = [metric.prepare(row) for row in rows]
    by_prompt = []
    for prompt in world.PROMPTS:
        judged = metric.judge([{**row, "prompt": prompt, "picture": own} for row, own in zip(rows, prepared, strict=True)])
        assert all(isinstance(row, dict) and list(row) == [metric.name] for row in judged)
        by_prompt.append([row[metric.name] for row in judged])  # type: ignore[index]
    return [list(column) for column in zip(*by_prompt, strict=True)]


def check(metric: Metric[Any], tolerance: float = 1e-5) -> None:
    found, golden = torch.tensor(scores(metric)), torch.tensor(GOLDEN[metric.name])
    worst = (found - golden).abs().max().item()
    print(f"{metric.name}: furthest from the published code's {worst:.2e}, on scores of {golden.abs().max().item():.3f}")
    assert worst <= tolerance * golden.abs().max().item()
    assert golden.std() > 1e-3 * golden.abs().max()  # the scores do tell pictures and prompts apart


def test_image_reward_equals_its_package(tmp_path: Path, bert: str) -> None:
    state = tensors(world.image_reward_shapes())
    unused = {"blip.vision_proj.weight": torch.ones(2), "blip.text_encoder.embeddings.position_ids": torch.arange(48)[None]}
    torch.save(state | unused, tmp_path / "ImageReward.pt")
    config = ImageRewardConfig(model=str(tmp_path / "ImageReward.pt"), tokenizer=bert)
    check(ImageReward(config))
    found, versions = ImageReward.find_models(config)
    assert found == config and set(versions) == {"model", "tokenizer"}
    state.pop("mlp.layers.7.bias")
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"holds no ImageReward: .*head\.4\.bias"):
        ImageReward(config)
    torch.save({"a": torch.ones(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="holds no ImageReward: there is no 'blip"):
        ImageReward(config)


def test_hps_equals_its_package(tmp_path: Path, clip: str) -> None:
    state = tensors(world.open_clip_shapes())
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS.pt")
    config = HpsConfig(model=str(tmp_path / "HPS.pt"), processor=clip)
    check(Hps(config))
    assert set(Hps.find_models(config)[1]) == {"model", "processor"}
    torch.save({"state_dict": state | {"visual.more": torch.ones(1)}}, tmp_path / "HPS.pt")
    with pytest.raises(ValueError, match=r"holds no CLIP of open_clip .*visual\.more"):
        Hps(config)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "HPS.pt")
    with pytest.raises(ValueError, match="holds no CLIP of open_clip: there is no 'visual"):
        Hps(config)


def test_pick_score_equals_its_package(clip: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"  # as where a model lies without its processor, which is another's
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        bare.joinpath(name).write_bytes(Path(clip, name).read_bytes())
    config = PickScoreConfig(model=str(bare), processor=clip)
    check(PickScore(config))
    assert set(PickScore.find_models(config)[1]) == {"model", "processor"}


def test_aesthetic_is_the_head_on_clip(clip: str, tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "head.pth")
    config = AestheticConfig(model=clip, head=str(tmp_path / "head.pth"))
    found = scores(Aesthetic(config))
    with torch.no_grad():
        expected = layers(ClipModel(clip).embed_images(world.pictures()))[:, 0]
    assert torch.tensor(found) == pytest.approx(expected[:, None].expand(-1, len(world.PROMPTS)).numpy(), rel=1e-5)
    with pytest.raises(ValueError, match=r"head=.* takes embeddings of 24 numbers, model=zoo://clip gives 128"):
        Aesthetic(replace(config, model="zoo://clip"))
