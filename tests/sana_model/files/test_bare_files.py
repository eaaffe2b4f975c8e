"""Weights files with diffusers' names and no configuration beside them: what their tensors show, and what is asked for."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.convert import main
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import ControlNetConfig, SanaConfig
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import FAMILIES, LITE, assert_same_tensors, nvlabs_state, scramble

SMALL = SanaConfig(dim=1152, depth=1, num_cross_heads=16, ffn_dim=96, in_channels=8, caption_dim=48, time_input="whole")
"""Of a published width."""
NORMED = replace(SMALL, qk_norm=True, cross_qk_norm=True)
SPRINT = replace(NORMED, guidance_embeds=True, time_input="unit")
LARGE = replace(SMALL, dim=2240, num_cross_heads=20)
"""Of the width of the published models with and without positions."""


def bare(folder: Path, config: SanaConfig, name: str = "x.safetensors") -> Path:
    """A transformer's weights file with diffusers' names, alone in its folder."""
    scramble(SanaTransformer(config)).save_pretrained(folder / "all", layout="diffusers")
    (folder / "bare").mkdir(exist_ok=True)
    return (folder / "all" / "diffusion_pytorch_model.safetensors").rename(folder / "bare" / name)


@pytest.mark.filterwarnings("ignore:.*positional embedding")
def test_a_transformer_is_known_by_its_tensors(tmp_path: Path) -> None:
    for config in (SMALL, SPRINT):
        path = bare(tmp_path, config)
        loaded = SanaTransformer.from_pretrained(path)
        assert loaded.config == config
        assert_same_tensors(loaded.state_dict(), scramble(SanaTransformer(config)).state_dict())
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(path).items()}
        save_file(prefixed | {"vae.decoder.conv_in.weight": torch.zeros(1)}, path)
        assert_same_tensors(SanaTransformer.from_pretrained(path).state_dict(), loaded.state_dict())


def test_what_tensors_do_not_show_is_asked_for_or_told(tmp_path: Path) -> None:
    path = bare(tmp_path, NORMED)
    with pytest.raises(ValueError, match=r"may hold Sana 1\.5 or a teacher of Sana-Sprint"):
        SanaTransformer.from_pretrained(path)
    with pytest.warns(UserWarning, match="taken to have none and 1024 px"):
        assert SanaTransformer.from_pretrained(path, time_input="whole").config == NORMED
    path = bare(tmp_path, LARGE)
    with pytest.raises(ValueError, match="does not tell whether its model has a positional embedding"):
        SanaTransformer.from_pretrained(path)
    for given in ({"position_scale": None}, {"position_scale": 2.0, "base_size": 128}):
        assert SanaTransformer.from_pretrained(path, **given).config == replace(LARGE, **given)  # type: ignore[arg-type]
    named = path.rename(path.with_name("Sana_1600M_2Kpx_BF16_diffusers.safetensors"))
    assert SanaTransformer.from_pretrained(named).config == replace(LARGE, position_scale=1.0, base_size=64)


def test_a_pth_without_positions_is_told_or_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {config.dim: nvlabs_state(config) for config in (SMALL, LARGE)}
    for one in state.values():
        del one["pos_embed"]
    torch.save({"state_dict": state[1152]}, tmp_path / "small.pth")
    with pytest.warns(UserWarning, match=r"small\.pth does not tell .* \(it holds no pos_embed\)"):
        SanaTransformer.from_pretrained(tmp_path / "small.pth")
    torch.save({"state_dict": state[2240]}, tmp_path / "large.pth")
    torch.save({"state_dict": state[2240]}, tmp_path / "Sana_1600M_4Kpx_BF16.pth")
    known = SanaTransformer.from_pretrained(tmp_path / "Sana_1600M_4Kpx_BF16.pth").config
    assert (known.position_scale, known.base_size) == (2.0, 128)
    command = [str(tmp_path / "large.pth"), str(tmp_path / "out"), "--layout", "sana"]
    assert main(command) == 1
    assert "Pass position_scale=None if it has none" in capsys.readouterr().err
    for flags, wanted in ((["--position_scale=0"], (None, 32)), (["--position_scale=1", "--base_size=64"], (1.0, 64))):
        assert main([*command, *flags]) == 0
        found = SanaTransformer.from_pretrained(tmp_path / "out").config
        assert (found.position_scale, found.base_size) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_an_autoencoder_is_known_by_its_tensors(tmp_path: Path, name: str) -> None:
    model = scramble(DCAutoencoder(FAMILIES[name]))
    model.save_pretrained(tmp_path, layout="diffusers")  # type: ignore[attr-defined]
    (tmp_path / "config.json").unlink()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="scaling_factor="):
        DCAutoencoder.from_pretrained(path)
    loaded = DCAutoencoder.from_pretrained(path, scaling_factor=FAMILIES[name].scaling_factor)
    assert replace(loaded.config, decoder_variant=None) == replace(FAMILIES[name], decoder_variant=None)
    assert (loaded.config.decoder == "lite") == (name == LITE)
    assert_same_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:.*positional embedding")
def test_a_controlnet_is_known_by_its_tensors_and_never_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = replace(SMALL, depth=2)
    controlnet = scramble(SanaControlNet(ControlNetConfig(**{**asdict(deep), "depth": 1, "form": "diffusers"})))
    controlnet.save_pretrained(tmp_path, layout="diffusers")  # type: ignore[attr-defined]
    (tmp_path / "config.json").unlink()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = SanaControlNet.from_pretrained(path)
    assert loaded.config == controlnet.config
    assert_same_tensors(loaded.state_dict(), controlnet.state_dict())
    assert SanaControlNet.from_pretrained(path, form="nvlabs").config.form == "nvlabs"
    with pytest.raises(ValueError, match="holds a ControlNet, not a linear DiT"):
        SanaTransformer.from_pretrained(path)
    assert main([str(path), str(tmp_path / "out"), "--layout", "sana"]) == 0
    assert "a ControlNet of the form diffusers" in capsys.readouterr().out
    assert SanaControlNet.from_pretrained(tmp_path / "out").config == controlnet.config

    transformer = SanaTransformer(deep)
    steering = SanaControlNet.from_transformer(transformer, depth=1)
    steering.save_pretrained(tmp_path / "both.pth", layout="nvlabs", transformer=transformer)
    assert main([str(tmp_path / "both.pth"), str(tmp_path / "two"), "--layout", "sana"]) == 0
    assert_same_tensors(SanaControlNet.from_pretrained(tmp_path / "two").state_dict(), steering.state_dict())
    assert_same_tensors(SanaTransformer.from_pretrained(tmp_path / "two").state_dict(), transformer.state_dict())
    assert main([str(tmp_path / "both.pth"), str(tmp_path / "three"), "--layout", "diffusers"]) == 1
    assert "would compute another function" in capsys.readouterr().err
