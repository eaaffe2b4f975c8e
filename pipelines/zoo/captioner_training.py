"""Trains the tiny captioners on the Shapes world."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, ProcessorMixin

from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import Scene
from pipelines.zoo.captioners import (
    ASSISTANT,
    IMAGE,
    IMAGE_SIZE,
    PROMPTS,
    TILE_SIZE,
    USER,
    chat,
    load_captioner,
    make_captioner,
    measure_captioner,
    save_captioner,
)
from pipelines.zoo.config import CAPTIONER_LOOPS, Kind, TinyCaptionerConfig
from pipelines.zoo.training import fit
from pipelines.zoo.world import EOS, HELD_OUT, UNKNOWN, VALIDATION, load_world

UNKNOWN_SHARE = 0.1  # of a prompt's words are replaced by <unk>
PHRASINGS: dict[Kind, tuple[int, int]] = {"llava": (0, 1), "llava-next": (2, 3)}
"""The phrasings that each captioner writes, so that their captions of an image differ in more than their errors."""


def train_captioner(config: TinyCaptionerConfig) -> dict[str, float]:
    """Train a captioner on the Shapes world and write model and processor.

    Returns `measure_captioner` of the saved weights on held-out rows.
    """
    loop, kind, cache_dir = config.loop or CAPTIONER_LOOPS[config.kind], config.kind, config.cache_dir
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    clip = None
    if config.clip_dir is not None:
        clip = CLIPModel.from_pretrained(config.clip_dir, dtype=torch.float32, trust_remote_code=False)
    model, processor = make_captioner(kind, clip)
    model.train()
    model.set_attn_implementation("eager")  # on a CPU the backward of fused attention takes longer than all the rest
    world = load_world(config.num_rows, cache_dir=cache_dir)
    validation = load_world(config.num_measured, first=VALIDATION, cache_dir=cache_dir)
    make_batch = batch_maker(kind, processor)

    def compute_loss(rows: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
        batch = make_batch([world.scenes[row] for row in rows], world.images_as_tensor(rows), rng)
        return model(**batch, use_cache=False).loss

    fit(
        model.parameters(),
        compute_loss,
        num_rows=len(world.scenes),
        config=loop,
        save=lambda: save_captioner(model, processor, config.output_dir),
        evaluate=lambda: measure_captioner(model, processor, validation),
        is_good_enough=lambda figures: config.stop_at is not None and figures["exact"] >= config.stop_at,
    )
    held_out = load_world(config.num_measured, first=HELD_OUT, cache_dir=cache_dir)
    return measure_captioner(*load_captioner(config.output_dir), held_out)


MakeBatch = Callable[[Sequence[Scene], Tensor, np.random.Generator], dict[str, Tensor]]
"""(scenes, images (B, 3, 64, 64) in [-1, 1], generator) -> inputs of the model, with `labels`."""


def batch_maker(kind: Kind, processor: ProcessorMixin) -> MakeBatch:
    """Make the function that makes training batches: the same values as the processor gives, at less cost.

    Each row gets a random prompt and phrasing. There is no attention mask: rows are padded on the right, and with causal
    attention no token sees what follows it.
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
    """The token ids before the caption, including the placeholders of a 64-px image."""
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    return np.array(processor(text=[chat(processor, prompt)], images=[blank])["input_ids"][0])


def to_pixels(kind: Kind, images: Tensor) -> dict[str, Tensor]:
    """The inputs that the processor makes of images (B, 3, 64, 64) in [-1, 1]."""
    if kind == "llava":
        return {"pixel_values": images}
    whole = F.interpolate(images, (TILE_SIZE, TILE_SIZE), mode="bilinear", antialias=True)
    tiles = images.unflatten(2, (-1, TILE_SIZE)).unflatten(4, (-1, TILE_SIZE))  # (B, 3, row, 32, column, 32)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    sizes = torch.full((len(images), 2), IMAGE_SIZE)
    return {"pixel_values": torch.cat([whole[:, None], tiles], dim=1), "image_sizes": sizes}  # (B, 5, 3, 32, 32), (B, 2)
