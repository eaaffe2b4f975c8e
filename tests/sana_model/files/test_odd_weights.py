"""Weights files that are not quite what they should be: read right, or refused in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_model.files.pipeline import load_parts
from sana_model.files.published_configs import diffusers_transformer_config, transformer_config_from_diffusers
from sana_model.nn.config import AUTOENCODER_PRESETS, ControlNetConfig, SanaConfig
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, nvlabs_state, scramble

HEADS = {"num_cross_heads": TINY.num_cross_heads}
State = dict[Any, Tensor]
REFUSED: list[tuple[Callable[[State], State], str]] = [
    (lambda state: dict(enumerate(state.values())), "0 must be the name of a plain tensor"),
    (lambda state: {name: value.to("meta") for name, value in state.items()}, "is on the device meta, without values"),
    (lambda state: {name: value.to_sparse() for name, value in state.items()}, "its tensor is torch.sparse_coo"),
    (lambda state: {name: value.to(torch.int8) for name, value in state.items()}, r"int8 \(quantized weights are not read\)"),
    (lambda state: {name: value.to(torch.complex64) for name, value in state.items()}, "no floating-point numbers in"),
    (lambda state: state | {"pos_embed": torch.zeros(64, TINY.dim)}, r"pos_embed \(64, 64\) is no sine-cosine embedding"),
    (lambda state: state | {"pos_embed": torch.zeros(1, 63, TINY.dim)}, "is no sine-cosine embedding of a square"),
    (lambda state: state | {"pos_embed": torch.ones(1, 1, TINY.dim)}, "is no sine-cosine embedding of a square"),
    (lambda state: state | {"pos_embed": torch.full((1, 64, TINY.dim), 7.0)}, "is no sine-cosine embedding of a square"),
    (lambda state: state | {"pos_embed": torch.full((1, 64, TINY.dim), float("nan"))}, "is no sine-cosine embedding"),
]


def test_what_is_no_weight_is_named(tmp_path: Path) -> None:
    state, path = nvlabs_state(TINY), tmp_path / "x.pth"
    for change, message in REFUSED:
        torch.save({"state_dict": change(state)}, path)
        with pytest.raises(ValueError, match=message):
            SanaTransformer.from_pretrained(path, **HEADS)


def test_weights_of_several_dtypes_get_the_one_that_holds_all(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in nvlabs_state(TINY).items()}
    mixed = {name: value.float() if value.ndim == 1 else value for name, value in state.items()}
    small = {name: value.to(torch.float8_e4m3fn) for name, value in state.items() if name != "pos_embed"}
    for found, wanted in ((mixed, torch.float32), (small | {"pos_embed": state["pos_embed"]}, torch.bfloat16)):
        torch.save({"state_dict": found}, tmp_path / "x.pth")
        model = SanaTransformer.from_pretrained(tmp_path / "x.pth", **HEADS)
        assert {weight.dtype for weight in model.parameters()} == {wanted}
        name = "x_embedder.proj.weight"
        assert (model.patch_embed.proj.weight.flatten() == found[name].to(wanted).flatten()).all()


def test_settings_that_no_model_has_are_named() -> None:
    for scale in (float("nan"), -1.0, 0.0, "a", True):
        with pytest.raises(ValueError, match=r"position_scale=.* must be a finite number above 0"):
            replace(TINY, position_scale=scale)
        with pytest.raises(ValueError, match=r"scaling_factor=.* must be a finite number above 0"):
            replace(AUTOENCODER_PRESETS["tiny"], scaling_factor=scale)
    settings, state = diffusers_transformer_config(TINY), SanaTransformer(TINY)
    named = {name: value for name, value in settings.items() if name != "sample_size"}
    exported = {f"{name}": value for name, value in _diffusers_state(state).items()}
    for changed, message in (
        (named, "x: sample_size=None in its configuration must be a whole number from 1"),
        (settings | {"patch_size": 0}, "x: patch_size=0 in its configuration"),
        (settings | {"patch_size": 2}, "says patch_size=2, and its weights are of 1: the two are of different models"),
        (settings | {"num_cross_attention_heads": "4"}, "num_cross_attention_heads='4' in its configuration"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_config_from_diffusers(changed, exported, Path("x"))


def _diffusers_state(model: SanaTransformer) -> dict[str, Tensor]:
    from sana_model.files import key_maps
    from sana_model.files.checkpoint import export

    return export(model.state_dict(), key_maps.diffusers_names(model.config))


def test_the_average_of_a_controlnet_comes_with_that_of_its_transformer(tmp_path: Path) -> None:
    base = SanaConfig(**{**vars(TINY), "depth": 2})
    transformer = scramble(SanaTransformer(base))
    config = ControlNetConfig(**{**vars(base), "depth": 1, "form": "nvlabs"})
    scramble(SanaControlNet(config)).save_pretrained(  # type: ignore[attr-defined]
        tmp_path / "x.pth", layout="nvlabs", transformer=transformer
    )
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    doubled = {name: value * (1 if name == "pos_embed" else 2) for name, value in content["state_dict"].items()}
    torch.save(content | {"state_dict_ema": doubled}, tmp_path / "x.pth")
    plain, average = (SanaControlNet.from_pretrained(tmp_path / "x.pth", use_ema=use_ema) for use_ema in (False, True))
    assert torch.equal(average.control_proj.weight, 2 * plain.control_proj.weight)


def test_a_pipeline_without_its_transformer_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "pipeline.json").write_text('{"prompts": {}, "flow_shift": 3.0}')
    with pytest.raises(FileNotFoundError, match=r"has no transformer/, autoencoder/, text_encoder/.*incomplete"):
        load_parts(tmp_path)
