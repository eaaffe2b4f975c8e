"""Odd runs of the model: what could become a black picture, or another one than was asked for, is refused in words."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sana_model.files.models import load_autoencoder
from sana_model.nn.finite import NotFiniteError
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SIZE = {"num_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def good() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)


@pytest.fixture
def pipeline() -> Iterator[TextToImage]:
    yield TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)


def one_weight(module: nn.Module, value: float) -> None:
    """Put `value` into one place of the module's first matrix."""
    weight = next(weight for weight in module.parameters() if weight.ndim > 1)
    weight.data[(0,) * weight.ndim] = value


def enlarge(module: nn.Module, factor: float) -> None:
    for weight in module.parameters():
        weight.data.mul_(factor)


def text_encoder_overflows(pipeline: TextToImage) -> None:
    enlarge(pipeline.text_encoder.model.layers[0].mlp, 1000.0)
    pipeline.text_encoder.half()


def decoder_overflows(pipeline: TextToImage) -> None:
    pipeline.autoencoder.half()
    enlarge(pipeline.autoencoder.decoder.conv_in, 30_000.0)


def embeds_too_large(pipeline: TextToImage) -> None:
    pipeline.text_encoder.model.norm.weight.data.fill_(1e6)
    pipeline.transformer.half()


def encoder_overflows(pipeline: TextToImage) -> None:
    pipeline.autoencoder.half()
    enlarge(pipeline.autoencoder.encoder.conv_in, 30_000.0)


NOT_FINITE: dict[str, tuple[Callable[[TextToImage], object], dict[str, object], str]] = {
    "NaN weight of the transformer": (
        lambda p: one_weight(p.transformer, float("nan")),
        {},
        r"the transformer gives .* in float32, for 2 of 2 .*: its weights .*not finite either, damaged: take another copy",
    ),
    "infinite weight of the text encoder": (
        lambda p: one_weight(p.text_encoder.model.layers[0].mlp, float("inf")),
        {},
        r"the text encoder gives .* its weights model.layers.0.mlp.* another copy",
    ),
    "NaN weight of the decoder": (
        lambda p: one_weight(p.autoencoder.decoder, float("nan")),
        {},
        r"the decoder of the autoencoder gives .*damaged",
    ),
    "weights cast to float16": (
        lambda p: (one_weight(p.transformer, 1e6), p.transformer.half()),
        {},
        r"the transformer gives .* in float16.*too large for float16, or damaged: take bfloat16 or float32",
    ),
    "text encoder in float16": (text_encoder_overflows, {}, r"the text encoder .* in float16.*65504; take bfloat16 or float32"),
    "decoder in float16": (decoder_overflows, {}, r"the decoder of the autoencoder .* in float16.*65504"),
    "encoder of a picture to start from, in float16": (
        encoder_overflows,
        {"image": Image.new("RGB", (64, 64), "red")},
        r"the encoder of the autoencoder .* in float16.*65504",
    ),
    "embeddings for a float16 transformer": (embeds_too_large, {}, r"too large for the transformer in float16: take bfloat16"),
    "huge guidance": (lambda p: None, {"guidance_scale": 1e38}, r"transformer.*in float32.*lower guidance_scale=1e\+38"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_values_that_are_not_finite_make_no_picture(pipeline: TextToImage, name: str) -> None:
    spoil, options, message = NOT_FINITE[name]
    spoil(pipeline)
    with pytest.raises(NotFiniteError, match=message):
        pipeline(["a red circle", "a blue star"], **SIZE, **options)  # type: ignore[arg-type]


def test_float16_keeps_the_text_encoder_in_bfloat16() -> None:
    pipeline = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float16)
    assert pipeline.text_encoder.dtype is torch.bfloat16
    assert pipeline.transformer.head.weight.dtype is pipeline.autoencoder.decoder.conv_in.weight.dtype is torch.float16
    exact = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)
    pictures, wanted = (
        torch.frombuffer(bytearray(p(["a red circle"], **SIZE)[0].tobytes()), dtype=torch.uint8)  # type: ignore[arg-type]
        for p in (pipeline, exact)
    )
    assert (pictures.float() - wanted.float()).abs().mean() < 5


ODD_ARGUMENTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "no negative prompt": ({"negative_prompt": None}, {"negative_prompt": ""}),
    "a size written as a float": ({"height": 64.0, "width": np.float32(64)}, {"height": 64, "width": 64}),
    "a seed of NumPy": ({"seed": np.int64(5)}, {"seed": 5}),
    "a seed of torch": ({"seed": torch.tensor(5)}, {"seed": 5}),
    "an array of seeds": ({"seed": np.array([5])}, {"seed": [5]}),
    "a tensor of seeds": ({"seed": torch.tensor([5])}, {"seed": [5]}),
    "a tuple of seeds": ({"seed": (5.0,)}, {"seed": [5]}),
    "numbers of NumPy": ({"num_steps": np.int32(2), "guidance_scale": np.float64(4.5)}, {}),
}


@pytest.mark.parametrize("name", ODD_ARGUMENTS)
def test_odd_arguments_mean_what_they_say(good: TextToImage, name: str) -> None:
    odd, plain = (good(["a red circle"], **{**SIZE, **arguments})[0] for arguments in ODD_ARGUMENTS[name])  # type: ignore[arg-type]
    assert odd.tobytes() == plain.tobytes()


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "guidance_scale NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan must be a finite number"),
    "half a seed": ({"seed": 1.5}, ValueError, "seed=1.5 must be a whole number"),
    "a seed in words": ({"seed": "5"}, ValueError, "seed='5' must be a whole number"),
    "a list of bad seeds": ({"seed": [None]}, ValueError, "seed=None must be a whole number"),
    "a truth as a seed": ({"seed": True}, ValueError, "seed=True must be a whole number"),
    "a huge seed": ({"seed": 2**64}, ValueError, "seed=18446744073709551616 must be from -9223372036854775808"),
    "half a pixel": ({"height": 64.5}, ValueError, "height=64.5 must be a whole number"),
    "a size in words": ({"width": "64px"}, ValueError, "width='64px' must be a whole number"),
    "a size that does not divide": ({"width": 65}, ValueError, "width=65 must be a positive multiple of 8; the nearest is 64"),
    "half a step": ({"num_steps": 2.5}, ValueError, "num_steps=2.5 must be a whole number"),
    "guidance in words": ({"guidance_scale": "4.5"}, ValueError, "guidance_scale='4.5' must be a finite number"),
    "no guidance": ({"guidance_scale": None}, ValueError, "guidance_scale=None must be a finite number"),
    "a list of negative prompts": ({"negative_prompt": ["blurred"]}, TypeError, r"negative_prompt=\['blurred'\] is a list"),
    "guidance_scale infinite": ({"guidance_scale": float("inf")}, ValueError, "guidance_scale=inf must be a finite number"),
}


FOLDERS: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "no text encoder": (
        "sana",
        lambda folder: shutil.rmtree(folder / "text_encoder"),
        FileNotFoundError,
        r"has no text_encoder/: the pipeline is incomplete",
    ),
    "no tokenizer, no autoencoder": (
        "diffusers",
        lambda folder: (shutil.rmtree(folder / "tokenizer"), shutil.rmtree(folder / "vae")),
        FileNotFoundError,
        r"has no vae/, tokenizer/: the pipeline is incomplete",
    ),
    "no transformer": (
        "sana",
        lambda folder: shutil.rmtree(folder / "transformer"),
        FileNotFoundError,
        r"has no transformer/: the pipeline is incomplete",
    ),
    "no tokenizer among the text encoder's files": (
        "sana",
        lambda folder: [path.unlink() for path in (folder / "text_encoder").glob("*token*")],
        FileNotFoundError,
        r"/text_encoder holds no tokenizer: no tokenizer.json, nor ",
    ),
    "an empty text encoder": (
        "sana",
        lambda folder: [path.unlink() for path in (folder / "text_encoder").iterdir()],
        FileNotFoundError,
        r"/text_encoder holds no .safetensors file",
    ),
    "a text encoder without its configuration": (
        "sana",
        lambda folder: (folder / "text_encoder" / "config.json").unlink(),
        ValueError,
        r"/text_encoder holds no language model that transformers can read: ",
    ),
    "a pointer in place of the transformer's weights": (
        "sana",
        lambda folder: (folder / "transformer" / "model.safetensors").write_text(POINTER),
        ValueError,
        r"/transformer/model.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "a pointer in place of the text encoder's weights": (
        "diffusers",
        lambda folder: (folder / "text_encoder" / "model.safetensors").write_text(POINTER),
        ValueError,
        r"/text_encoder/model.safetensors is a Git LFS pointer",
    ),
    "a pointer in place of the tokenizer": (
        "diffusers",
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text(POINTER),
        ValueError,
        r"/tokenizer/tokenizer.json is a Git LFS pointer",
    ),
    "a web page in place of the autoencoder's weights": (
        "sana",
        lambda folder: (folder / "autoencoder" / "model.safetensors").write_text("<!DOCTYPE html><html>Sign in"),
        ValueError,
        r"/autoencoder/model.safetensors is a web page",
    ),
    "an empty file of weights": (
        "sana",
        lambda folder: (folder / "transformer" / "model.safetensors").write_bytes(b""),
        ValueError,
        r"/transformer/model.safetensors is empty",
    ),
    "an index of a newer version": (
        "sana",
        lambda folder: (folder / "pipeline.json").write_text('{"prompts": {"tone": "kind"}, "flow_shift": 3.0}'),
        ValueError,
        r"/pipeline.json has other fields than ours .*tone",
    ),
    "an index without a shift": (
        "sana",
        lambda folder: (folder / "pipeline.json").write_text('{"prompts": {}}'),
        ValueError,
        r"/pipeline.json has other fields than ours .*flow_shift",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, good: TextToImage) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for layout in ("sana", "diffusers"):
        good.save_pretrained(folder / layout, layout=layout)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_lacks_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    layout, spoil, error, message = FOLDERS[name]
    shutil.copytree(saved / layout, tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(error, match=message) as raised:
        TextToImage.from_pretrained(tmp_path / "x")
    assert "huggingface" not in str(raised.value).lower()


Names = Callable[[str], str]
PREFIXES: dict[str, Names] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP around torch.compile": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: name.replace(".attn.", "._orig_mod.attn.").replace(".0.", ".0._orig_mod.", 1),
    "ComfyUI": lambda name: f"model.diffusion_model.{name}",
    "Lightning": lambda name: f"model.net.{name}",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_of_wrappers_are_no_part_of_a_name(good: TextToImage, tmp_path: Path, name: str) -> None:
    good.transformer.save_pretrained(tmp_path / "x.pth", layout="nvlabs")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    content["state_dict"] = {PREFIXES[name](key): tensor for key, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "x.pth")
    found = SanaTransformer.from_pretrained(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in good.transformer.state_dict().items())


def test_a_file_of_several_models_gives_each_its_own(good: TextToImage, tmp_path: Path) -> None:
    """One safetensors file with transformer, autoencoder and text encoder, as ComfyUI saves checkpoints."""
    content: dict[str, torch.Tensor] = {}
    for part, prefix in ((good.transformer, "model.diffusion_model."), (good.autoencoder, "first_stage_model.")):
        part.save_pretrained(tmp_path / f"{prefix}pth", layout="nvlabs")
        state = torch.load(tmp_path / f"{prefix}pth", weights_only=True)["state_dict"]
        content |= {f"{prefix}{key}": tensor for key, tensor in state.items()}
    content["text_encoders.gemma2_2b.logit_scale"] = torch.zeros(1)
    save_file(content, tmp_path / "all.safetensors")
    heads = good.transformer.config.num_cross_heads
    transformer = SanaTransformer.from_pretrained(tmp_path / "all.safetensors", num_cross_heads=heads)
    scale = good.autoencoder.config.scaling_factor
    autoencoder = load_autoencoder(tmp_path / "all.safetensors", scaling_factor=scale)
    for found, wanted in ((transformer, good.transformer), (autoencoder, good.autoencoder)):
        assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in wanted.state_dict().items())


def test_a_folder_with_a_pth_in_checkpoints_is_found(good: TextToImage, tmp_path: Path) -> None:
    """As NVlabs' repositories on the hub are: a model card, and checkpoints/<name>.pth."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "README.md").touch()
    good.transformer.save_pretrained(tmp_path / "checkpoints" / "Sana.pth", layout="nvlabs")
    zoo = "zoo://pipeline/"
    pipeline = TextToImage.from_pretrained(tmp_path, autoencoder=f"{zoo}autoencoder", text_encoder=f"{zoo}text_encoder")
    assert torch.equal(pipeline.transformer.head.weight, good.transformer.head.weight)


def test_of_variants_side_by_side_the_asked_one_is_taken(saved: Path, tmp_path: Path) -> None:
    """bf16 and fp16 in every folder, told apart by a weight; no plain one but the autoencoder's."""
    shutil.copytree(saved / "sana", tmp_path / "x")
    marks = {"bf16": 0.25, "fp16": 0.5}
    for folder, mark in (("transformer", "head.bias"), ("text_encoder", "norm.weight")):
        plain = tmp_path / "x" / folder / "model.safetensors"
        state = load_file(plain)
        for variant, value in marks.items():
            marked = {**state, mark: torch.full_like(state[mark], value)}
            save_file(marked, plain.with_name(f"model.{variant}.safetensors"), {"format": "pt"})
        plain.unlink()

    def found(**options: Any) -> tuple[float, float]:
        pipeline = TextToImage.from_pretrained(tmp_path / "x", **options)
        return float(pipeline.transformer.head.bias[0]), float(pipeline.text_encoder.model.norm.weight[0])

    assert found(variant="fp16") == (0.5, 0.5) and found(variant="bf16") == (0.25, 0.25)
    assert found(dtype=torch.bfloat16) == (0.25, 0.25)
    assert found(dtype=torch.float16) == (0.5, 0.25)  # whose text encoder computes in bfloat16
    assert found(dtype=torch.float16, variant="fp16") == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"transformer holds the variants bf16, fp16 and no plain file: .* variant= or dtype="):
        found()
    with pytest.raises(ValueError, match=r"transformer holds no variant 'int8'; it holds the variants bf16, fp16"):
        found(variant="int8")


def test_a_text_encoder_that_is_nowhere_is_no_model_id() -> None:
    for path in ("/nowhere/text_encoder", "./nowhere", "far/away/text_encoder"):
        with pytest.raises(FileNotFoundError, match=r"no folder '.*' for a language model"):
            TextEncoder.from_pretrained(path)


def test_a_hub_that_does_not_answer_is_no_missing_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="hub cannot be reached, and the cache does not hold hf://acme/sana"):
        TextToImage.from_pretrained("hf://acme/sana")


def test_a_prompt_that_is_cut_is_told(good: TextToImage) -> None:
    limit = good.text_encoder.config.max_tokens
    long = " ".join(["a red circle"] * limit)
    with pytest.warns(UserWarning, match=rf"1 of 2 prompts are cut .*max_tokens={limit}; the first, number 2, has \d+ tokens"):
        good(["a red circle", long], **SIZE)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert good.describe_cut(["a red circle"]) is None


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_odd_arguments_are_refused_in_words(good: TextToImage, name: str) -> None:
    arguments, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        good(["a red circle"], **{**SIZE, **arguments})  # type: ignore[arg-type]


def test_a_shift_that_is_not_finite_is_refused(good: TextToImage) -> None:
    for shift in (float("nan"), float("inf")):
        pipeline = TextToImage(good.transformer, good.autoencoder, good.text_encoder, flow_shift=shift)
        with pytest.raises(ValueError, match=f"shift={shift} must be positive and finite"):
            pipeline(["a red circle"], **SIZE)  # type: ignore[arg-type]
