"""Two tiny VLMs of different architectures, which transformers and vLLM both load; the second is clearly weaker.

`llava`: a CLIP tower (ours) over the image, and a Llama decoder. `llava-next`: a SigLIP tower over a small view of the whole
and over four tiles, and a Qwen2 decoder. (The processors of Qwen2-VL, Idefics3, SmolVLM and Mistral3 need torchvision.)
"""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
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

from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import Scene
from pipelines.zoo.config import CAPTIONER_LOOPS, Kind, TinyCaptionerConfig
from pipelines.zoo.training import fit
from pipelines.zoo.world import EOS, HELD_OUT, UNKNOWN, VALIDATION, World, load_world, word_tokenizer

PROMPTS = (
    "Describe the image.",
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "Write a caption for this image.",
    "What is in this picture?",
)
"""The first is the one to ask with; the others, and words replaced by <unk>, make a changed prompt work too."""
UNKNOWN_SHARE = 0.1
PHRASINGS: dict[Kind, tuple[int, int]] = {"llava": (0, 1), "llava-next": (2, 3)}
"""Which phrasings each one writes, so that captions of an image differ in more than their errors."""

IMAGE_SIZE = 64
IMAGE, USER, ASSISTANT = "<image>", "<|user|>", "<|assistant|>"
TILE_SIZE = 32
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
    words = re.findall(r"[a-z]+|[.?]", " ".join(PROMPTS).lower())
    return word_tokenizer(words, special_tokens=[IMAGE, USER, ASSISTANT], bos=False, padding_side="left")


def make_captioner(kind: Kind, clip: CLIPModel | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model and its processor. `clip` is the vision tower that "llava" begins with; everything else is untrained."""
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
    # All of CLIP's tower but its last layer, as in the published Llava: nothing there trained what the patches carry.
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


def train_captioner(config: TinyCaptionerConfig) -> dict[str, float]:
    """Train on the Shapes world and write model and processor. Returns the figures of the saved weights on held-out rows.

    Stops early when the share of exact captions, measured every `eval_every` steps on validation rows, reaches `stop_at`.
    """
    loop, kind, cache_dir = config.loop or CAPTIONER_LOOPS[config.kind], config.kind, config.cache_dir
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    clip = None if config.clip_dir is None else CLIPModel.from_pretrained(config.clip_dir, dtype=torch.float32)
    model, processor = make_captioner(kind, clip)
    model.train()
    model.set_attn_implementation("eager")  # on a CPU the backward of fused attention takes longer than all the rest
    world = load_world(config.num_rows, cache_dir=cache_dir)
    validation = load_world(config.num_measured, first=VALIDATION, cache_dir=cache_dir)
    make_batch = batch_maker(kind, processor)

    def compute_loss(rows: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
        batch = make_batch([world.scenes[row] for row in rows], world.images_as_tensor(rows), rng)
        return model(**batch, use_cache=False).loss

    def save() -> None:
        save_captioner(model, processor, config.output_dir)

    def evaluate() -> dict[str, float]:
        figures = measure_captioner(model, processor, validation)
        if config.stop_at is not None and figures["exact"] >= config.stop_at:
            raise TargetReached(figures)
        return figures

    try:
        fit(model.parameters(), compute_loss, num_rows=len(world.scenes), config=loop, save=save, evaluate=evaluate)
    except TargetReached as reached:
        tqdm.write(f"stop_at={config.stop_at} reached: {reached.figures}")
        save()
    model, processor = load_captioner(config.output_dir)
    return measure_captioner(model, processor, load_world(config.num_measured, first=HELD_OUT, cache_dir=cache_dir))


class TargetReached(Exception):
    """Ends a training that is good enough."""

    def __init__(self, figures: dict[str, float]) -> None:
        super().__init__(figures)
        self.figures = figures


MakeBatch = Callable[[Sequence[Scene], Tensor, np.random.Generator], dict[str, Tensor]]
"""(scenes, images (B, 3, 64, 64) in [-1, 1], generator) -> what the model takes, with `labels`."""


def batch_maker(kind: Kind, processor: ProcessorMixin) -> MakeBatch:
    """Batches as the processor would make them, without its cost, each row with a random prompt and phrasing.

    They have no attention mask: rows are padded on the right, where causal attention sees nothing of it.
    """
    tokenizer = processor.tokenizer
    prompts = [encode_prompt(processor, prompt) for prompt in PROMPTS]
    first_word = max(tokenizer.convert_tokens_to_ids([EOS, IMAGE, USER, ASSISTANT])) + 1
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)

    def make_row(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        prompt = prompts[rng.integers(len(prompts))]
        prompt = np.where((prompt >= first_word) & (rng.random(len(prompt)) < UNKNOWN_SHARE), unknown, prompt)
        phrasing = phrasings(scene)[PHRASINGS[kind][rng.integers(2)]]
        caption = tokenizer(write_caption(scene, phrasing) + EOS).input_ids
        return np.concatenate([prompt, caption]), np.concatenate([np.full(len(prompt), -100), caption])

    def make_batch(scenes: Sequence[Scene], images: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = [make_row(scene, rng) for scene in scenes]
        length = max(len(ids) for ids, _ in rows)
        ids = np.stack([np.pad(ids, (0, length - len(ids)), constant_values=tokenizer.pad_token_id) for ids, _ in rows])
        labels = np.stack([np.pad(labels, (0, length - len(labels)), constant_values=-100) for _, labels in rows])
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), **to_pixels(kind, images)}

    return make_batch


def encode_prompt(processor: ProcessorMixin, prompt: str) -> np.ndarray:
    """Token ids up to where the caption begins, the places of an image of 64 px among them."""
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    return np.array(processor(text=[chat(processor, prompt)], images=[blank])["input_ids"][0])


def to_pixels(kind: Kind, images: Tensor) -> dict[str, Tensor]:
    """What the processor gives for images (B, 3, 64, 64) in [-1, 1]."""
    if kind == "llava":
        return {"pixel_values": images}
    whole = F.interpolate(images, (TILE_SIZE, TILE_SIZE), mode="bilinear", antialias=True)
    tiles = images.unflatten(2, (-1, TILE_SIZE)).unflatten(4, (-1, TILE_SIZE))  # (B, 3, row, 32, column, 32)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    sizes = torch.full((len(images), 2), IMAGE_SIZE)
    return {"pixel_values": torch.cat([whole[:, None], tiles], dim=1), "image_sizes": sizes}  # (B, 5, 3, 32, 32), (B, 2)


def chat(processor: ProcessorMixin, prompt: str) -> str:
    """The text of a question about one image."""
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
    """One caption an image, through processor and greedy `generate`."""
    text, captions = chat(processor, prompt), []
    for start in range(0, len(images), batch_size):
        chunk = list(images[start : start + batch_size])
        inputs = processor(text=[text] * len(chunk), images=chunk, padding=True, return_tensors="pt").to(
            model.device, model.dtype
        )
        output = model.generate(**inputs)
        captions += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


def measure_captioner(
    model: PreTrainedModel, processor: ProcessorMixin, world: World, prompt: str = PROMPTS[0]
) -> dict[str, float]:
    """Share of captions that say exactly what the image shows: of all, of one object, of pairs."""
    training = model.training
    model.eval()
    captions = caption_images(model, processor, [Image.fromarray(image) for image in world.images], prompt)
    model.train(training)
    exact = np.array([parse(caption) == scene for caption, scene in zip(captions, world.scenes, strict=True)])
    pairs = np.array([len(scene.things) == 2 for scene in world.scenes])
    return {"exact": float(exact.mean()), "exact_single": float(exact[~pairs].mean()), "exact_pair": float(exact[pairs].mean())}


def save_captioner(model: Any, processor: ProcessorMixin, output_dir: str | Path) -> None:
    """In bfloat16, with the names of the published checkpoints, which vLLM wants."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    path = Path(output_dir) / "model.safetensors"
    published = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): value
        for name, value in load_file(path).items()
    }
    save_file(published, path, metadata={"format": "pt"})


def load_captioner(path: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """In float32, for measuring."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)
