"""Adapters of diffusers, peft, LyCORIS, kohya and our own trainer act here as they do where they come from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.train.engine.config import LoraConfig
from pipelines.train.engine.lora import add_lora, merge_lora, save_lora
from sana_model.files.lora import read_lora
from sana_model.nn.lora import attach_changes, detach_changes, merge_changes
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_point"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_model() -> SanaTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SanaTransformer.from_preset("tiny").eval()


def draw(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, captions = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 5, 64, generator=generator)
    timestep = torch.tensor([100.0, 800.0])
    with torch.no_grad():
        if isinstance(model, SanaTransformer):
            return model(latents, timestep, captions)
        return model(latents, encoder_hidden_states=captions, timestep=timestep, return_dict=False)[0]


@contextmanager
def loaded(path: Path, scale: float = 1.0, unread: int = 0) -> Iterator[SanaTransformer]:
    model = make_model()
    adapter = read_lora(path, model)
    assert len(adapter.unread) == unread
    attach_changes(model, adapter.changes, scale)
    yield model
    detach_changes(model)
    assert torch.equal(draw(model), draw(make_model()))


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    make_model().save_pretrained(tmp_path / "base", layout="diffusers")
    return SanaTransformer2DModel.from_pretrained(tmp_path / "base").eval()


def randomise(model: nn.Module) -> None:
    """Give every adapter that begins as nothing values that count."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"use_rslora": True, "alpha_pattern": {"attn2.to_q": 3}}])
def test_of_diffusers_trainer(theirs: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **settings)
    theirs.add_adapter(config)
    randomise(theirs)
    layers = peft.get_peft_model_state_dict(theirs)
    told = _collate_lora_metadata({"transformer": theirs})
    SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **told)
    expected = draw(theirs)
    with loaded(tmp_path) as model:
        torch.testing.assert_close(draw(model), expected, **CLOSE)
    assert (expected - draw(make_model())).abs().max() > 0.05


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])
@pytest.mark.parametrize("form", ["peft", "lycoris"])
def test_loha_and_lokr(theirs: Any, tmp_path: Path, kind: Any, form: str) -> None:
    config = kind(r=2, alpha=6, target_modules=TARGETS[:-1])
    peft.inject_adapter_in_model(config, theirs)
    randomise(theirs)
    weights = peft.get_peft_model_state_dict(theirs)
    if form == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "alpha": 6}))
        weights = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    else:  # as SimpleTuner writes it
        modules = {name.rpartition(".")[0] for name in weights}
        weights |= {f"{name}.alpha": torch.tensor(6.0) for name in modules}
        weights = {f"lycoris_{flat(name)}": weight for name, weight in weights.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with loaded(tmp_path) as model:
        torch.testing.assert_close(draw(model), draw(theirs), **CLOSE)
    assert (draw(theirs) - draw(make_model())).abs().max() > 0.05


def flat(name: str) -> str:
    module, _, end = name.rpartition(".")
    return f"{module.replace('.', '_')}.{end}"


def save_ours(folder: Path) -> SanaTransformer:
    """Write an adapter of our trainer, and return the model that it makes."""
    config, model, merged = LoraConfig(rank=3, alpha=6), make_model(), make_model()
    add_lora(model, config, seed=0)
    randomise(model)
    save_lora(folder, model.state_dict(), config)
    merged.load_state_dict(merge_lora(model.state_dict(), config))
    return merged


def test_of_our_trainer_and_by_names_of_others(tmp_path: Path) -> None:
    expected = draw(save_ours(tmp_path / "ours"))
    with loaded(tmp_path / "ours") as model:
        torch.testing.assert_close(draw(model), expected, **CLOSE)
    one_trainer = {"text.lora_down.weight": torch.ones(1)}
    for key, weight in load_file(tmp_path / "ours/pytorch_lora_weights.safetensors").items():
        module, _, kind = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        name = f"lora_transformer_{module.replace('.', '_')}"
        one_trainer[f"{name}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[kind] }.weight"] = weight
        one_trainer[f"{name}.alpha"] = torch.tensor(1.5)  # a half of the rank
    save_file(one_trainer, tmp_path / "other.safetensors")
    with loaded(tmp_path / "other.safetensors", scale=2.0, unread=1) as model:
        torch.testing.assert_close(draw(model), expected, **CLOSE)


def test_several_add_up_and_merged_is_the_same(tmp_path: Path) -> None:
    save_ours(tmp_path)
    once, merged = make_model(), make_model()
    changes = read_lora(tmp_path, once).changes
    for scale in (0.75, -0.25):
        attach_changes(once, changes, scale)
        merge_changes(merged, changes, scale)
    torch.testing.assert_close(draw(once), draw(merged), **CLOSE)
    with loaded(tmp_path, scale=0.5) as model:
        torch.testing.assert_close(draw(merged), draw(model), **CLOSE)
    assert once.state_dict().keys() == merged.state_dict().keys()
    bf16 = once.bfloat16()
    assert bf16(torch.zeros(1, 8, 4, 4).bfloat16(), torch.ones(1), torch.zeros(1, 3, 64).bfloat16()).isfinite().all()


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)
    pair = {"lora_A": (2, 128), "lora_B": (128, 2)}
    files = {"wrong": {"lora_A": (2, 64), "lora_B": (64, 2)}, "dora": pair | {"dora_scale": (128,)}, "some": pair}
    for name, shapes in files.items():
        key = "transformer.transformer_blocks.0.attn1.to_q"
        tensors = {f"{key}.{kind}.weight": torch.ones(shape) for kind, shape in shapes.items()}
        save_file(tensors | {"te.lora_A.weight": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    save_file({"unet.conv.lora_A.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    for name, told in {
        "wrong": "changes a matrix of 64 x 64, and this transformer's is 128 x 128",
        "dora": "holds DoRA",
        "unet": "none of its 1 tensors fits: unet.conv.lora_A.weight",
    }.items():
        with pytest.raises(ValueError, match=told):
            model.load_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds 4 .* files, of which none is"):
        model.load_lora(tmp_path)
    with pytest.warns(UserWarning, match=r"1 tensors of the adapter fit no matrix .*: te"):
        model.load_lora(tmp_path / "some.safetensors", scale=0.1)
    with pytest.raises(ValueError, match="would not be saved"):
        model.save_pretrained(tmp_path / "saved")
    model.unload_lora()
    assert model.loras == []
