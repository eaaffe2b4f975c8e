"""Configurations read from published files, where those are ambiguous, and variants that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import (
    FAMILIES,
    TINY,
    diffusers_autoencoder,
    diffusers_transformer,
    scramble,
)


def test_sanas_published_spelling_of_conv_is_understood(tmp_path):
    diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_block_type": "Conv"}))
    assert DCAutoencoder.from_pretrained(tmp_path).config == FAMILIES["dc-ae-f32c32-sana-1.1"]


def test_a_feed_forward_width_that_rounds_down_survives_diffusers(tmp_path):
    config = replace(TINY, dim=352, ffn_dim=480)
    assert int(480 / 352 * 352) == 479
    SanaTransformer(config).save_pretrained(tmp_path, layout="diffusers")
    assert SanaTransformer2DModel.from_pretrained(tmp_path).transformer_blocks[0].ff.conv_point.weight.shape[1] == 480


@pytest.mark.parametrize(("scale", "base_size"), [(1.0, 64), (2.0, 128)])
def test_positional_embedding_is_read_from_the_weights(scale, base_size, tmp_path):
    config = replace(TINY, position_scale=scale, base_size=base_size, depth=1)
    scramble(SanaTransformer(config)).save_pretrained(tmp_path / "some-name.pth", layout="nvlabs")
    assert SanaTransformer.from_pretrained(tmp_path / "some-name.pth", num_cross_heads=4).config == config


def test_published_autoencoder_weights_need_the_scale_that_they_do_not_hold(tmp_path):
    scramble(DCAutoencoder(FAMILIES["dc-ae-f64c128-in-1.0"])).save_pretrained(tmp_path / "ours.pth", layout="nvlabs")
    assert DCAutoencoder.from_pretrained(tmp_path / "ours.pth").config == FAMILIES["dc-ae-f64c128-in-1.0"], "ours tells it"
    torch.save({"state_dict": torch.load(tmp_path / "ours.pth")["state_dict"]}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="scaling_factor="):
        DCAutoencoder.from_pretrained(tmp_path / "x.pth")


def test_unsupported_siblings_are_refused_by_name(tmp_path):
    diffusers_transformer(TINY).save_pretrained(tmp_path / "dit")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"guidance_embeds": True, "guidance_embeds_scale": 0.2}))
    with pytest.raises(ValueError, match=r"guidance_embeds_scale=0\.2"):
        SanaTransformer.from_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"timestep_scale": 0.5}))
    with pytest.raises(ValueError, match=r"timestep_scale=0\.5"):
        SanaTransformer.from_pretrained(tmp_path / "dit")
    diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]).save_pretrained(tmp_path / "ae")
    config = json.loads((tmp_path / "ae" / "config.json").read_text())
    (tmp_path / "ae" / "config.json").write_text(json.dumps(config | {"encoder_out_shortcut": False}))
    with pytest.raises(ValueError, match="encoder_out_shortcut=False"):
        DCAutoencoder.from_pretrained(tmp_path / "ae")
