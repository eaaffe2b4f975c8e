"""Sana-Sprint against diffusers' pipelines, both directions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline, SanaSprintPipeline, SCMScheduler
from PIL import Image

from sana_model.pipeline import TextToImage
from tests.support.peers import FAMILIES, TINY, diffusers_autoencoder, diffusers_transformer
from tests.support.tiny_gemma import tiny_gemma

CONFIG = replace(TINY, qk_norm=True, cross_qk_norm=True, guidance_embeds=True)
PROMPTS = ["a small red circle", "two blue squares left of a large green ring"]
SIZE = {"height": 128, "width": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprint")
    model, tokenizer = tiny_gemma(hidden=TINY.caption_dim)
    SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=model,
        vae=diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]),
        transformer=diffusers_transformer(CONFIG),
        scheduler=SCMScheduler(),
    ).save_pretrained(folder)
    return folder


def theirs(kind: type, folder: Path, num_steps: int, **options: object) -> list[Image.Image]:
    pipeline = kind.from_pretrained(folder)  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": num_steps, "intermediate_timesteps": 1.3 if num_steps == 2 else None}
    generator = torch.Generator().manual_seed(7)
    return pipeline(prompt=PROMPTS, generator=generator, use_resolution_binning=False, **steps, **SIZE, **options).images


def difference(left: list[Image.Image], right: list[Image.Image]) -> int:
    pairs = zip(left, right, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)


def ours(model: TextToImage, num_steps: int | None, **options: object) -> list[Image.Image]:
    return model(PROMPTS, **SIZE, num_steps=num_steps, generator=torch.Generator().manual_seed(7), **options)  # type: ignore[arg-type]


def test_pictures_equal_diffusers_both_ways(folder: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(folder)
    assert model.transformer.config.time_input == "unit"
    model.save_pretrained(tmp_path, layout="diffusers")
    for num_steps in (1, 2, 4):
        wanted = theirs(SanaSprintPipeline, folder, num_steps)
        assert all(np.asarray(image).std() > 10 for image in wanted)
        assert difference(ours(model, num_steps), wanted) <= 2
    assert difference(ours(model, None), theirs(SanaSprintPipeline, tmp_path, 2)) <= 2, "two steps are the default"


def test_pictures_from_pictures_equal_diffusers(folder: Path) -> None:
    model = TextToImage.from_pretrained(folder)
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8))
    for num_steps, strength in ((2, 0.5), (4, 0.75)):
        wanted = theirs(SanaSprintImg2ImgPipeline, folder, num_steps, image=start, strength=strength)
        assert difference(ours(model, num_steps, image=start, strength=strength), wanted) <= 2


def test_a_seed_means_the_same_picture_in_any_batch_and_guidance_counts(folder: Path) -> None:
    model = TextToImage.from_pretrained(folder)
    together = model(PROMPTS, **SIZE, seed=3)
    assert difference(together[1:], model(PROMPTS[1:], **SIZE, seed=3)) <= 1
    assert difference(together, model(PROMPTS, **SIZE, seed=3, guidance_scale=9.0)) > 2
    with pytest.raises(ValueError, match="unknown solver 'flow_euler' for this model: its own is scm"):
        model(PROMPTS, **SIZE, solver="flow_euler")
    with pytest.raises(ValueError, match="neither a negative_prompt"):
        model(PROMPTS, **SIZE, negative_prompt="dark")
