"""Two tiny VLMs of different architectures, which transformers and vLLM both load; the second is clearly weaker.

`llava`: our CLIP's vision tower over the image, and a Llama decoder. `llava-next`: a SigLIP tower over a small view of the
whole image and over four tiles of it, and a Qwen2 decoder. (Qwen2-VL, Idefics3, SmolVLM and Mistral3 are not used: their
processors need torchvision.) captioner_training.py trains them.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from pipelines.shapes.grammar import parse
from pipelines.zoo.config import Kind
from pipelines.zoo.world import World, word_tokenizer

PROMPTS = (
    "Describe the image.",
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "Write a caption for this image.",
    "What is in this picture?",
)
"""Ask with the first. Training also uses the others, and replaces words by <unk>, so that a changed prompt works too."""

IMAGE_SIZE = 64  # pixels a side
IMAGE, USER, ASSISTANT = "<image>", "<|user|>", "<|assistant|>"
TILE_SIZE = 32  # pixels a side, of the tiles of "llava-next"
DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
}
MAX_NEW_TOKENS = 48
CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- '</s>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def captioner_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar, the prompts and the chat's marks; pads on the left."""
    words = re.findall(r"[a-z]+|[.?]", " ".join(PROMPTS).lower())
    return word_tokenizer(words, special_tokens=[IMAGE, USER, ASSISTANT], bos=False, padding_side="left")


def make_captioner(kind: Kind, clip: CLIPModel | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a model and its processor. "llava" takes the vision tower of `clip`; everything else is untrained."""
    tokenizer = captioner_tokenizer()
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    decoder = {**DECODER, **ids, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    if kind == "llava":
        assert clip is not None
        model, processor = make_llava(tokenizer, decoder, clip)
    else:
        model, processor = make_llava_next(tokenizer, decoder)
    model.generation_config = GenerationConfig(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return model, processor


def make_llava(
    tokenizer: PreTrainedTokenizerFast, decoder: dict[str, Any], clip: CLIPModel
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make "llava" with the vision tower of `clip`. `decoder` holds the settings of the language model."""
    # CLIP's tower without its last layer, as in the published Llava: CLIP does not train that layer's patch outputs.
    tower: Any = clip.config.vision_config
    vision_config: Any = CLIPVisionConfig(**{**tower.to_dict(), "num_hidden_layers": tower.num_hidden_layers - 1})
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config,
            text_config=LlamaConfig(**decoder, num_hidden_layers=3),
            image_token_index=image_token,
            image_seq_length=(IMAGE_SIZE // vision_config.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",  # without the class token
            tie_word_embeddings=True,
        )
    )
    missing, _ = model.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=False)
    assert not missing, missing
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def make_llava_next(tokenizer: PreTrainedTokenizerFast, decoder: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make "llava-next", untrained. `decoder` holds the settings of the language model."""
    vision_config = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE_SIZE,
        patch_size=8,
        vision_use_head=False,  # type: ignore[call-arg]  # a field that the class takes among others
    )
    pinpoints = [[IMAGE_SIZE, IMAGE_SIZE]]
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision_config,
            text_config=Qwen2Config(**decoder, num_key_value_heads=2, num_hidden_layers=2),
            image_token_index=image_token,
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",  # SigLIP has no class token
            tie_word_embeddings=True,
        )
    )
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size=size,
            crop_size=size,
            do_center_crop=False,
            image_grid_pinpoints=pinpoints,
            resample=Image.Resampling.BILINEAR,  # torch has the same
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def chat(processor: ProcessorMixin, prompt: str) -> str:
    """The prompt about one image, as the chat template writes it."""
    messages: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def caption_images(
    model: Any,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompt: str = PROMPTS[0],
    *,
    batch_size: int = 100,
) -> list[str]:
    """Caption each image by greedy `generate`, `batch_size` images at a time."""
    text, captions = chat(processor, prompt), []
    for start in range(0, len(images), batch_size):
        chunk = list(images[start : start + batch_size])
        inputs = processor(text=[text] * len(chunk), images=chunk, padding=True, return_tensors="pt").to(
            model.device, model.dtype
        )
        output = model.generate(**inputs)
        captions += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


def measure_captioner(model: PreTrainedModel, processor: ProcessorMixin, world: World) -> dict[str, float]:
    """The share of captions that say exactly what the image shows: of all images (`exact`), of those with one object
    (`exact_single`) and of those with two (`exact_pair`)."""
    training = model.training
    model.eval()
    captions = caption_images(model, processor, [Image.fromarray(image) for image in world.images])
    model.train(training)
    exact = np.array([parse(caption) == scene for caption, scene in zip(captions, world.scenes, strict=True)])
    pairs = np.array([len(scene.things) == 2 for scene in world.scenes])
    return {"exact": float(exact.mean()), "exact_single": float(exact[~pairs].mean()), "exact_pair": float(exact[pairs].mean())}


def save_captioner(model: Any, processor: ProcessorMixin, output_dir: str | Path) -> None:
    """Write model and processor, in bfloat16 and under the weight names of the published checkpoints, which vLLM needs."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    path = Path(output_dir) / "model.safetensors"
    published = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): value
        for name, value in load_file(path).items()
    }
    save_file(published, path, metadata={"format": "pt"})


def load_captioner(path: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load model and processor for measuring, in float32."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=False)
