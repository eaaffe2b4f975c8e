"""The table of published models: sizes, diffusers' configurations, and models known by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from jobs.zoo import main
from sana_model.files.published_configs import diffusers_transformer_config, transformer_config_from_diffusers
from sana_model.nn.transformer import SanaTransformer
from sana_model.zoo.published import PUBLISHED, PublishedModel, find_published
from tests.support.golden import PLAIN, SANA_1_5, golden, inputs, nvlabs_weights
from tests.support.peers import assert_close

SIZES = {"sana-0.6b": 591_747_872, "sana-1.6b": 1_604_462_752, "sana-1.5-4.8b": 4_721_825_952, "sana-1.5-1.6b": 1_604_641_952}
PIPELINES = [model for model in PUBLISHED if model.kind == "pipeline"]


@pytest.mark.parametrize("model", PIPELINES, ids=lambda model: model.id)
def test_a_published_transformer_has_its_size_and_diffusers_configuration(model: PublishedModel) -> None:
    assert model.config is not None
    settings = diffusers_transformer_config(model.config)
    with torch.device("meta"):
        ours = SanaTransformer(model.config)
        theirs = SanaTransformer2DModel.from_config(settings)
    assert sum(weight.numel() for weight in ours.parameters()) == sum(weight.numel() for weight in theirs.parameters())
    for start, size in SIZES.items():
        if model.short.startswith(start):
            assert sum(weight.numel() for weight in ours.parameters()) == size
    foreign = {name: value for name, value in theirs.config.items() if not name.startswith("_")}  # as diffusers publishes it
    assert transformer_config_from_diffusers(foreign, theirs.state_dict(), Path("x")) == model.config


def test_names_are_found_and_unique() -> None:
    assert len({model.id for model in PUBLISHED}) == len(PUBLISHED)
    shorts = [model.short for model in PUBLISHED if model.short]
    assert len(set(shorts)) == len(shorts) == 30
    name = "Sana_1600M_1024px_BF16"
    for path in ("sana-1.6b-1024", f"hub/models--Efficient-Large-Model--{name}/snapshots/0", f"{name}.pth"):
        found = find_published(path)
        assert found is not None and found.id == "Efficient-Large-Model/Sana_1600M_1024px_BF16", path
    assert find_published("mine.pth") is None and find_published("zoo://pipeline") is None


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PUBLISHED)


@torch.inference_mode()
def test_a_published_file_is_known_by_its_name(tmp_path: Path) -> None:
    """Sana 1.5, with NVlabs' own velocity, and a teacher of Sana-Sprint, which looks like it."""
    torch.save({"state_dict": nvlabs_weights(SANA_1_5)}, tmp_path / "SANA1.5_1.6B_1024px.pth")
    model, sample = SanaTransformer.from_pretrained(tmp_path / "SANA1.5_1.6B_1024px.pth"), inputs()
    assert model.config == replace(SANA_1_5, time_input="whole", null_caption="caption_mask")
    timestep = torch.tensor([599.64, 8.946])
    assert_close(model(sample.latents, timestep, sample.caption_embeds, sample.caption_mask), golden("forward.sana-1.5"))
    teacher = tmp_path / "Sana_Sprint_1.6B_1024px_teacher.pth"
    (tmp_path / "SANA1.5_1.6B_1024px.pth").rename(teacher)
    assert SanaTransformer.from_pretrained(teacher).config.time_input == "unit"
    torch.save({"state_dict": nvlabs_weights(PLAIN)}, tmp_path / "mine.pth")
    assert SanaTransformer.from_pretrained(tmp_path / "mine.pth").config.time_input == "whole"
