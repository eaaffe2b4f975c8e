"""Weights through all layouts and back, bit for bit, and against diffusers' own converters."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from safetensors.torch import load_file

from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import FAMILIES, LITE, TINY, assert_same_tensors, diffusers_autoencoder, nvlabs_state, scramble


@pytest.mark.parametrize("qk_norm", [False, True])
def test_nvlabs_to_ours_to_diffusers_to_ours_to_nvlabs_is_bit_for_bit(qk_norm, tmp_path):
    config = replace(TINY, qk_norm=qk_norm, cross_qk_norm=qk_norm)
    state = nvlabs_state(config)
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    told = {"time_input": "unit"} if qk_norm else {}
    first = SanaTransformer.from_pretrained(tmp_path / "published.pth", num_cross_heads=4, **told)
    assert first.config == replace(config, time_input="unit" if qk_norm else "whole", null_caption="caption_mask")
    first.save_pretrained(tmp_path / "ours")
    SanaTransformer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "diffusers", layout="diffusers")
    second = SanaTransformer.from_pretrained(tmp_path / "diffusers")
    assert second.config == first.config
    second.save_pretrained(tmp_path / "back.pth", layout="nvlabs")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert_same_tensors(back, state)


def test_nvlabs_weights_mean_what_the_published_converter_says(tmp_path):
    """diffusers' own converter and ours turn one .pth into the same diffusers tensors."""
    state = nvlabs_state(TINY)
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    ours = SanaTransformer.from_pretrained(tmp_path / "published.pth", num_cross_heads=4)
    ours.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    mine = load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")
    assert_same_tensors(mine, convert_sana_transformer_to_diffusers(dict(state)))


@pytest.mark.parametrize("config", [TINY, replace(TINY, qk_norm=True, cross_qk_norm=True, position_scale=2.0)])
def test_diffusers_loads_what_we_save(config, tmp_path):
    ours = scramble(SanaTransformer(config))
    ours.save_pretrained(tmp_path, layout="diffusers")
    theirs, report = SanaTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "again")
    assert_same_tensors(SanaTransformer.from_pretrained(tmp_path / "again").state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_autoencoder_layouts_round_trip_bit_for_bit(name, tmp_path):
    theirs = diffusers_autoencoder(FAMILIES[name])
    theirs.save_pretrained(tmp_path / "diffusers")
    first = DCAutoencoder.from_pretrained(tmp_path / "diffusers")
    first.save_pretrained(tmp_path / "ours")
    DCAutoencoder.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "published.pth", layout="nvlabs")
    published = torch.load(tmp_path / "published.pth", weights_only=True)["state_dict"]
    if name != LITE:  # whose last convolution diffusers' converter does not know
        assert_same_tensors(convert_autoencoder_dc_checkpoint_to_diffusers(dict(published)), theirs.state_dict())
    last = DCAutoencoder.from_pretrained(tmp_path / "published.pth", scaling_factor=0.5)
    assert last.config == replace(FAMILIES[name], scaling_factor=0.5)
    last.save_pretrained(tmp_path / "back", layout="diffusers")
    again, report = AutoencoderDC.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()) and again.config.scaling_factor == 0.5
    assert_same_tensors(dict(again.state_dict()), dict(theirs.state_dict()))
