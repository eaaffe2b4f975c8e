"""Odd runs of the model: what could become a black picture, or another one than was asked for, is refused in words."""

from collections.abc import Callable, Iterator

import pytest
import torch
from PIL import Image
from torch import nn

from sana_model.nn.finite import NotFiniteError
from sana_model.pipeline import TextToImage

SIZE = {"num_steps": 2, "seed": 0}


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


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "guidance_scale NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan must be a finite number"),
    "guidance_scale infinite": ({"guidance_scale": float("inf")}, ValueError, "guidance_scale=inf must be a finite number"),
}


@pytest.fixture(scope="module")
def good() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)


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
