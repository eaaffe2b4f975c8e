"""The table of published models: sizes, diffusers' configurations, and models known by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from jobs.zoo import main
from pipelines.workers.models import is_hub_id
from sana_model.files.kinds import is_sprint
from sana_model.files.places import resolve
from sana_model.files.published_configs import diffusers_transformer_config, transformer_config_from_diffusers
from sana_model.nn.transformer import SanaTransformer
from sana_model.zoo.published import PUBLISHED, PublishedModel, find_published, name_near
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
    nested = find_published(f"models/{name}_ControlNet_HED/checkpoints/Sana_600M_512px.pth")
    assert nested is not None and nested.short == "sana-0.6b-512"  # a file's own name counts before its folder's
    assert name_near("dc-ae-f32c32-sana-1.2") == "; did you mean hf://mit-han-lab/dc-ae-f32c32-sana-1.1?"
    assert find_published("mine.pth") is None and find_published("zoo://pipeline") is None


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("short name") and len(lines) == len(PUBLISHED)


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
    for name in ("Sana_Sprint_0.6B_1024px.pth", "Sana_Sprint_0.6B_1024px_teacher.pth"):  # names of others
        named = (tmp_path / "mine.pth").rename(tmp_path / name)
        assert SanaTransformer.from_pretrained(named).config.time_input == "whole" and not is_sprint(named)
        named.rename(tmp_path / "mine.pth")


def test_what_is_not_there_or_not_read_is_told_with_what_was_meant() -> None:
    meant = {
        "sana-1.6b-1025": "did you mean sana-1.6b-102",
        "Sana-Sprint-1.6B": "did you mean sana-sprint-1.6b?",
        "efficient-large-model/sana_600m_512px": r"did you mean hf://Efficient-Large-Model/Sana_600M_512px\?",
    }
    for path, message in meant.items():
        with pytest.raises(FileNotFoundError, match=message):
            resolve(path)
    with pytest.raises(FileNotFoundError, match=r"did you mean sana-sprint-1\.6b\?"):
        is_hub_id("Sana-Sprint-1.6B")
    with pytest.raises(ValueError, match="nunchaku-sana is not read here: 4-bit SVDQuant weights are not read"):
        resolve("hf://nunchaku-tech/nunchaku-sana")
