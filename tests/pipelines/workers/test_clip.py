"""SigLIP and SigLIP 2 as they were trained: padded to full length, on the right, no mask; cut as their tokenizer cuts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from pipelines.workers.clip import ClipModel, embedding_width

LENGTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a red circle", "a", "one two three four five six seven", "A RED CIRCLE"]


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, saved as published ones are."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = Siglip2Tokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    vision = {**TEXT, "patch_size": 8}
    text = {**TEXT, "vocab_size": len(names), "max_position_embeddings": LENGTH, "pad_token_id": 0, "eos_token_id": 1}
    if request.param == "siglip":
        image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        processor = SiglipProcessor(image_processor=image_processor, tokenizer=tokenizer)
        model = SiglipModel(SiglipConfig(vision_config={**vision, "image_size": 32}, text_config=text))
    else:
        patches = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        processor = Siglip2Processor(image_processor=patches, tokenizer=tokenizer)
        model = Siglip2Model(Siglip2Config(vision_config={**vision, "num_patches": 16}, text_config=text))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_cosines_are_those_behind_the_models_own_logits(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 40), (32, 64), (64, 24))]
    clip = ClipModel(str(folder))
    found = clip.embed_images(images) @ clip.embed_texts(TEXTS).T
    processor = AutoProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(
        TEXTS, padding="max_length", max_length=LENGTH, truncation=True, padding_side="right", return_tensors="pt"
    )
    pixels = processor.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(input_ids=tokens["input_ids"], **pixels).logits_per_image
    expected = (logits - clip.model.logit_bias) / clip.model.logit_scale.exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert tokens["input_ids"].shape == (4, LENGTH) and clip.max_tokens == LENGTH - len(clip.plain.start) - len(clip.plain.end)
    assert float((found[:, 0] - found[:, 1]).abs().min()) > 1e-4  # texts differ
    assert embedding_width(str(folder)) == clip.width == clip.embed_images(images).shape[1] == TEXT["hidden_size"]


def test_the_width_of_a_clip_is_that_of_its_projection() -> None:
    assert embedding_width("zoo://clip") == ClipModel("zoo://clip").embed_texts(["a"]).shape[1] == 128
