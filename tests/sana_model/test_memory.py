"""A pipeline that fits a small machine: precision of its weights, and parts that take turns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sana_model import pictures
from sana_model.files.tensors import write_safetensors
from sana_model.memory import MemoryPlan, count_moments, plan_memory
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DIFFUSERS_PROMPTS
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.quantized import precision_of, quantized_layers, stored_bytes
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.offload import Offload, bring
from sana_model.pictures import decode_pictures, decode_values
from sana_model.pipeline import TextToImage
from tests.support.peers import FAMILIES, TINY, scramble
from tests.support.tiny_gemma import tiny_gemma

PROMPTS = ["a red circle", "two blue squares on a table"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = scramble(SanaTransformer(TINY))
    pipeline = TextToImage(
        transformer,
        scramble(DCAutoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"])),
        TextEncoder(*tiny_gemma(hidden=TINY.caption_dim), DIFFUSERS_PROMPTS),
        controlnet=scramble(SanaControlNet.from_transformer(transformer, depth=1)),
    )
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


def draw(pipeline: TextToImage) -> np.ndarray:
    control = torch.ones(1, TINY.in_channels, 2, 2)
    images = pipeline(PROMPTS, 64, 64, num_steps=2, seed=0, control_image=control)
    return np.stack([np.asarray(image) for image in images])


def test_parts_that_take_turns_draw_the_same_picture(folder):
    together = TextToImage.from_pretrained(folder)
    in_turn = TextToImage.from_pretrained(folder, memory="small", precision="full")
    first, again = draw(in_turn), draw(in_turn)  # what was away comes back
    assert np.array_equal(first, again) and same_picture(first, draw(together))
    with pytest.raises(ValueError, match="come to cpu when they work"):
        in_turn.to(torch.bfloat16)


def test_a_callback_that_decodes_does_not_leave_the_transformer_away(folder):
    pipeline = TextToImage.from_pretrained(folder, memory="small", precision="full")
    there = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: there.append(pipeline.transformer in pipeline.offload._present))
    pipeline(PROMPTS, 64, 64, num_steps=3, seed=0, on_estimate=lambda _, x0: decode_pictures(pipeline.autoencoder, x0))
    assert there == [True, True, True]


def test_latents_follow_the_autoencoder_to_its_device(folder, monkeypatch):
    autoencoder = DCAutoencoder.from_pretrained(folder)
    Offload(plan_memory("small", None, "cuda"), torch.device("meta")).take(autoencoder)  # in place of a GPU
    monkeypatch.setattr(pictures, "check_finite", lambda *_: None)  # there are no values on it
    (values,) = decode_values(autoencoder, torch.zeros(1, TINY.in_channels, 2, 2))
    assert values.device.type == "meta"


class TwoHalves(nn.Module):
    """A part of which each half fits onto a device or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.room = ["cpu", "cpu"], 1

    def to(self, device: Any) -> "TwoHalves":  # type: ignore[override]
        for half in range(2):
            if torch.device(device).type != "cpu" and half >= self.room:
                raise torch.OutOfMemoryError
            self.places[half] = torch.device(device).type
        return self


def test_a_part_that_does_not_fit_goes_away_whole_and_may_come_again():
    offload, part = Offload(plan_memory("small", None, "cuda"), torch.device("cuda")), TwoHalves()
    offload.take(part)
    with pytest.raises(torch.OutOfMemoryError):
        bring(part)
    assert part.places == ["cpu", "cpu"]
    part.room = 2
    bring(part)
    assert part.places == ["cuda", "cuda"]


def test_a_controlnet_that_two_pipelines_get_stays_as_it_is(folder):
    controlnet = SanaControlNet.from_pretrained(folder)
    first = TextToImage.from_pretrained(folder, controlnet=controlnet, memory="small")
    second = TextToImage.from_pretrained(folder, controlnet=first.controlnet, memory="small")
    assert [precision_of(one) for one in (controlnet, first.controlnet, second.controlnet)] == ["full", "w8a8", "w8a8"]
    assert first.controlnet.offload is first.offload and second.controlnet.offload is second.offload
    assert same_picture(draw(first), draw(second))
    assert TextToImage.from_pretrained(folder, controlnet=controlnet).controlnet is controlnet


def same_picture(ours: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are the same up to rounding, which depends on where in memory the weights begin."""
    return int(np.abs(ours.astype(int) - other).max()) <= 2


@pytest.mark.parametrize("memory,precision", [("balanced", None), ("small", "int8"), ("fast", "int4")])
def test_what_is_saved_quantized_draws_the_same_and_is_smaller(folder, tmp_path, memory, precision):
    quantized = TextToImage.from_pretrained(folder, memory=memory, precision=precision)
    quantized.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    parts = ("transformer", "controlnet", "text_encoder")
    found = [precision_of(getattr(again, part)) for part in parts]
    assert found == [precision_of(getattr(quantized, part)) for part in parts] and "full" not in found
    assert np.array_equal(draw(again), draw(quantized))
    asked = TextToImage.from_pretrained(tmp_path, precision=found[0])  # of the transformer: the text encoder keeps its own
    assert precision_of(asked.text_encoder) == found[2]
    assert stored_bytes(again.transformer) < 0.6 * stored_bytes(SanaTransformer.from_pretrained(folder))


def test_captions_keys_and_values_and_all_outside_the_blocks_stay_in_full_precision(folder):
    model = TextToImage.from_pretrained(folder, precision="w8a8").transformer
    layers = {name.split(".", 2)[2] for name, _ in quantized_layers(model)}
    projections = {"attention.qkv", "attention.proj", "cross_attention.query", "cross_attention.proj"}
    assert layers == projections | {"ffn.expand", "ffn.project"}


def test_another_precision_than_the_files_is_refused_and_so_are_layouts_of_others(folder, tmp_path):
    pipeline = TextToImage.from_pretrained(folder, precision="w8a8")
    with pytest.raises(ValueError, match="a ControlNet is made of a transformer in full precision"):
        SanaControlNet.from_transformer(pipeline.transformer, depth=1)
    pipeline.transformer.save_pretrained(tmp_path / "own")
    for layout in ("diffusers", "nvlabs"):
        with pytest.raises(ValueError, match=f"layout={layout} has no place for w8a8 weights"):
            pipeline.save_pretrained(tmp_path / "other", layout=layout)
    controlnet = SanaControlNet.from_pretrained(folder)
    with pytest.raises(ValueError, match="layout=nvlabs has no place for w8a8 weights"):
        controlnet.save_pretrained(tmp_path / "both.pth", layout="nvlabs", transformer=pipeline.transformer)
    with pytest.raises(ValueError, match="precision=full: the TextEncoder was saved as int8"):
        Offload(plan_memory("fast", "full", "cpu"), torch.device("cpu")).take(pipeline.text_encoder)
    pipeline.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="precision=int4: the SanaTransformer was saved as w8a8"):
        TextToImage.from_pretrained(tmp_path / "whole", precision="int4")
    config = tmp_path / "own" / "config.json"
    config.write_text(config.read_text().replace('"w8a8"', '"full"'))
    with pytest.raises(ValueError, match=r"no floating-point numbers in .*qkv.weight: torch.int8"):
        SanaTransformer.from_pretrained(tmp_path / "own")
    config.write_text(config.read_text().replace('"full"', '"int2"'))
    with pytest.raises(ValueError, match="its weights are 'int2', which is no precision known here"):
        SanaTransformer.from_pretrained(tmp_path / "own")


def test_an_adapter_acts_beside_quantized_weights_and_is_not_merged_into_them(folder, tmp_path):
    torch.manual_seed(0)
    name, dim = "transformer.transformer_blocks.0.attn1.to_out.0", TINY.dim
    adapter = {f"{name}.lora_A.weight": torch.randn(2, dim), f"{name}.lora_B.weight": torch.randn(dim, 2)}
    write_safetensors(tmp_path / "lora.safetensors", adapter)
    pipeline = TextToImage.from_pretrained(folder, memory="small")
    layer = pipeline.transformer.get_submodule("blocks.0.attention.proj")
    x = torch.randn(1, 4, dim)
    before = layer(x)
    pipeline.load_lora(tmp_path / "lora.safetensors", scale=0.5)
    change = 0.5 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
    torch.testing.assert_close(layer(x) - before, x @ change.t(), rtol=1e-3, atol=1e-3)
    pipeline.unload_lora()
    assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match="cannot be merged into weights that are w8a8"):
        pipeline.load_lora(tmp_path / "lora.safetensors", merge=True)


def test_a_merged_adapter_stays_when_parts_take_turns(folder, tmp_path):
    name = "transformer.transformer_blocks.0.attn1.to_out.0"
    adapter = {f"{name}.lora_A.weight": torch.ones(1, TINY.dim), f"{name}.lora_B.weight": torch.ones(TINY.dim, 1)}
    write_safetensors(tmp_path / "lora.safetensors", adapter)
    together = TextToImage.from_pretrained(folder)
    in_turn = TextToImage.from_pretrained(folder, memory="small", precision="full")
    for pipeline in (together, in_turn):
        pipeline.load_lora(tmp_path / "lora.safetensors", merge=True)
        draw(pipeline)
    assert same_picture(draw(in_turn), draw(together))


def test_8_bit_floats_are_refused_where_no_device_multiplies_them(folder):
    with pytest.raises(ValueError, match="precision=fp8 needs an NVIDIA GPU of Hopper"):
        TextToImage.from_pretrained(folder, precision="fp8")


def test_a_plan_is_that_of_the_mode_and_the_device():
    assert plan_memory("fast", None, "cuda") == MemoryPlan()
    assert plan_memory("small", "int4", "cpu").text_encoder == "int4" == plan_memory("fast", "int4", "cpu").text_encoder
    assert plan_memory("small", "full", "cuda").kept == "one part at a time"
    with pytest.raises(ValueError, match="memory='tiny' is no mode: choose one of fast, balanced, small"):
        plan_memory("tiny", None, "cpu")  # type: ignore[arg-type]


def test_moments_count_what_lies_on_the_device_then():
    weights, work = (
        {"text encoder": 100, "transformer": 10, "autoencoder": 1},
        dict.fromkeys(("text encoder", "transformer", "autoencoder"), 1000),
    )
    counted = [list(count_moments(plan_memory(memory, None, "cuda"), weights, work).values()) for memory in
               ("fast", "balanced", "small")]  # fmt: skip
    assert counted == [[1111, 1111, 1111], [1111, 1011, 1011], [1100, 1010, 1001]]
