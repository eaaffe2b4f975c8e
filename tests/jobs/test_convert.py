"""Conversions of models that were never trained here: bit for bit, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.convert import main
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.quantized import precision_of
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import FAMILIES, LITE, TINY, assert_same_tensors, nvlabs_state, scramble

SPRINT = replace(
    TINY, dim=1152, depth=1, num_cross_heads=16, ffn_dim=96, qk_norm=True, cross_qk_norm=True, guidance_embeds=True
)


def test_sprint_goes_through_every_layout_and_back_bit_for_bit(tmp_path: Path) -> None:
    state = nvlabs_state(SPRINT)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    steps = [
        ("a.pth", "b", "diffusers"),
        ("b", "c", "sana"),
        ("c", "d.safetensors", "nvlabs"),
        ("d.safetensors", "e.pth", "nvlabs"),
    ]
    for source, output, layout in steps:
        assert main([str(tmp_path / source), str(tmp_path / output), "--layout", layout]) == 0
    assert_same_tensors(torch.load(tmp_path / "e.pth", weights_only=True)["state_dict"], state)
    assert_same_tensors(load_file(tmp_path / "d.safetensors"), state)
    config = SanaTransformer.from_pretrained(tmp_path / "e.pth").config
    assert (config.time_input, config.null_caption, config.guidance_embeds) == ("unit", "caption_mask", True)


def test_an_autoencoder_is_recognised_and_a_dtype_is_taken(tmp_path: Path) -> None:
    model = scramble(DCAutoencoder(FAMILIES[LITE]))
    model.save_pretrained(tmp_path / "ours")
    flags = ["--layout", "nvlabs", "--dtype", "bfloat16"]
    assert main(["--source", str(tmp_path / "ours"), "--output", str(tmp_path / "lite.pth"), *flags]) == 0
    again = DCAutoencoder.from_pretrained(tmp_path / "lite.pth")
    assert again.config == FAMILIES[LITE] and {weight.dtype for weight in again.parameters()} == {torch.bfloat16}


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": nvlabs_state(replace(SPRINT, guidance_embeds=False))}, tmp_path / "mine.pth")
    command = [str(tmp_path / "mine.pth"), str(tmp_path / "out"), "--layout", "sana"]
    assert main(command) != 0
    assert "may hold Sana 1.5 or a teacher of Sana-Sprint" in capsys.readouterr().err
    assert main([*command, "--time_input", "unit"]) == 0
    assert SanaTransformer.from_pretrained(tmp_path / "out").config.time_input == "unit"


def test_a_setting_that_does_not_apply_is_refused_and_not_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    pipeline, transformer, autoencoder = "zoo://pipeline", "zoo://pipeline/transformer", "zoo://pipeline/autoencoder"
    cases = [
        (pipeline, "out", ["--layout=sana", "--ema=true"], "ema=True does not apply: zoo://pipeline is a pipeline's folder"),
        (transformer, "out", ["--layout=sana", "--scaling_factor=2"], "scaling_factor=2.0 does not apply: .* a transformer"),
        (autoencoder, "out", ["--layout=sana", "--time_input=unit"], "time_input=unit does not apply: .* is an autoencoder"),
        (autoencoder, "out", ["--layout=sana", "--scaling_factor=0"], "scaling_factor=0.0 must be a finite number above 0"),
        (transformer, ".", ["--layout=nvlabs"], "is a folder, and layout nvlabs writes a file"),
        (transformer, "file", ["--layout=sana"], "is a file, and layout sana writes a folder"),
    ]
    for source, output, flags, message in cases:
        assert main([source, str(tmp_path / output), *flags]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_what_a_layout_leaves_out_of_a_pipeline_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo://pipeline", str(tmp_path / "x.pth"), "--layout", "nvlabs"]) == 0
    assert "x.pth: a pipeline's transformer, without its other models, in the layout nvlabs" in capsys.readouterr().out
    assert main(["zoo://pipeline", str(tmp_path / "x"), "--layout", "diffusers"]) == 0
    assert "diffusers prompts with its own instruction" in capsys.readouterr().out


def test_a_pipeline_is_written_with_fewer_bits_in_our_own_layout_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["zoo://pipeline", str(tmp_path / "out"), "--memory", "small", "--layout"]
    assert main([*command, "sana"]) == 0
    assert "a pipeline, transformer w8a8, text encoder int4" in capsys.readouterr().out
    assert precision_of(SanaTransformer.from_pretrained(tmp_path / "out")) == "w8a8"
    assert main([*command, "diffusers"]) != 0
    assert "layout=diffusers has no place for weights of fewer bits" in capsys.readouterr().err
    command[0] = "zoo://pipeline/transformer"
    assert main([*command, "sana"]) != 0
    assert "memory and precision apply to a pipeline's folder" in capsys.readouterr().err
