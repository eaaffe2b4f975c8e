"""Checks of prompts and pictures, and a pipeline whose parts take turns."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from pipelines.serve.checks import PictureCheck, PromptCheck
from pipelines.serve.config import PictureCheckConfig, PromptCheckConfig, ServeConfig
from pipelines.serve.orders import Accepted, Finished, Order, Refused, Settings
from pipelines.serve.painter import SanaPainter
from sana_model.pipeline import TextToImage
from tests.support.tiny_gemma import tiny_tokenizer

CIRCLE = "a large red circle on a white background"
SETTINGS = Settings(height=64, width=64, num_steps=2, guidance_scale=4.5, negative_prompt="")


def save_text_model(kind: Any, folder: Path, **settings: Any) -> str:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, **settings,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_prompt_is_refused_from_the_threshold_on(tmp_path: Path) -> None:
    labels = {"id2label": {0: "fine", 1: "bad"}, "label2id": {"fine": 0, "bad": 1}}
    classifier = save_text_model(Gemma2ForSequenceClassification, tmp_path / "classifier", **labels)
    guard = save_text_model(Gemma2ForCausalLM, tmp_path / "guard")
    for config in (PromptCheckConfig(model=classifier, label="bad"), PromptCheckConfig(model=guard)):
        check = PromptCheck(replace(config, dtype="float32"), "cpu")
        score = check.score(CIRCLE)
        assert 0 < score < 1 and score != check.score("a dog")
        for threshold, refused in ((score - 1e-3, True), (score + 1e-3, False)):
            check.config = replace(config, threshold=threshold)
            assert check.refuses(CIRCLE) is refused
    with pytest.raises(ValueError, match=r"prompt_check.label=worse: .* has the labels fine, bad"):
        PromptCheck(PromptCheckConfig(model=classifier, label="worse"), "cpu")


def test_a_server_with_checks_refuses_by_openai_s_code(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    checks = {wanted: PictureCheckConfig(model=str(tmp_path), label="nsfw", threshold=wanted) for wanted in (0.0, 1.0)}
    white = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(white, "PNG")
    assert not PictureCheck(checks[1.0], "cpu").refuses(white.getvalue())
    painter = SanaPainter(ServeConfig(picture_check=checks[0.0]))
    refused = asyncio.run(painter.draw(Order(prompt=CIRCLE, seeds=[0], settings=SETTINGS)))
    assert isinstance(refused, Refused) and (refused.status, refused.code) == (400, "content_policy_violation")


def test_parts_that_take_turns_draw_without_previews() -> None:
    painter = SanaPainter(ServeConfig(memory="small"))
    model = TextToImage.from_pretrained("zoo://pipeline", memory="small")

    async def draw() -> list[Any]:
        order = Order(prompt=CIRCLE, seeds=[3], settings=SETTINGS, num_previews=2)
        return [event async for event in painter.stream(order)]

    events = asyncio.run(draw())
    assert [type(event) for event in events] == [Accepted, Finished]
    drawn = np.asarray(Image.open(io.BytesIO(events[-1].content))).astype(int)
    assert np.abs(drawn - np.asarray(model([CIRCLE], 64, 64, num_steps=2, seed=3)[0])).max() <= 1
