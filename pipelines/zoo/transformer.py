"""A tiny linear DiT, pre-trained on scenes in the known colors. The demo trains it further, on colors that are new to it."""

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.evaluate.shapes import AttributeJudge, attribute_accuracy
from pipelines.shapes.grammar import phrasings, sample_caption, write_caption
from pipelines.shapes.scenes import KNOWN_COLORS, Scene, ShapesConfig, sample_scene
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import image_grid
from pipelines.zoo.autoencoder import load_autoencoder
from pipelines.zoo.config import TinyTransformerConfig
from pipelines.zoo.text_encoder import SHORT_SHARE, load_text_encoder
from pipelines.zoo.training import ComputeLoss, fit
from pipelines.zoo.world import VALIDATION, World, load_world
from sana_model.flow import flow_loss, sample_sigmas
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage

FLOW_SHIFT = 2.0
CAPTION_DROPOUT = 0.1
PAIRS_KEPT = 3  # one in this many scenes with two objects is kept: such a small model first has to learn to draw one
EMA_DECAY = 0.999
GUIDANCE_SCALES = (1.5, 2.5, 4.0)  # that are tried


def train_transformer(config: TinyTransformerConfig) -> dict[str, float]:
    """Train on the latents of drawn scenes and write the whole pipeline, with averaged weights.

    Returns the last figures of `fit`.
    """
    loop = config.loop
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    autoencoder, text_encoder = load_autoencoder(config.autoencoder_dir), load_text_encoder(config.text_encoder_dir)
    world = known_scenes(load_world(cache_dir=config.cache_dir))
    latents = encode_world(autoencoder, world)
    judge = AttributeJudge(ClipModel(config.clip_dir))
    model = SanaTransformer.from_preset("shapes")
    if config.init_dir is not None:
        model.load_state_dict(SanaTransformer.from_pretrained(Path(config.init_dir), dtype=torch.float32).state_dict())
    average = copy.deepcopy(model).requires_grad_(False)
    pipeline = TextToImage(average, autoencoder, text_encoder, flow_shift=FLOW_SHIFT)
    updates = itertools.count(1)

    def save() -> None:
        copy.deepcopy(pipeline).to(torch.bfloat16).save_pretrained(config.output_dir)

    return fit(
        model.parameters(),
        make_compute_loss(model, text_encoder, latents, world.scenes, seed=loop.seed),
        num_rows=len(world.scenes),
        config=loop,
        save=save,
        evaluate=lambda: measure_guidance(pipeline, judge, Path(config.output_dir)),
        after_step=lambda: update_average(average, model, next(updates)),
    )


def make_compute_loss(
    model: SanaTransformer, text_encoder: TextEncoder, latents: Tensor, scenes: list[Scene], *, seed: int
) -> ComputeLoss:
    """Make the function that computes the flow loss of a batch of rows, with random captions of which some are dropped."""
    null_embeds, _ = text_encoder.null()
    generator = torch.Generator().manual_seed(seed)

    def compute_loss(rows: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
        captions = [sample_caption(scenes[row], rng, short_share=SHORT_SHARE) for row in rows]
        embeds, mask = text_encoder.encode(captions)
        dropped = torch.from_numpy(rng.random(len(rows)) < CAPTION_DROPOUT)
        embeds[dropped, :1], mask[dropped, 1:] = null_embeds, False
        clean = latents[rows]
        sigma = sample_sigmas(len(rows), shift=FLOW_SHIFT, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        return flow_loss(model, clean, embeds, mask, sigma=sigma, noise=noise).mean()

    return compute_loss


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, num_updates: int) -> None:
    """Move the average of the weights towards those of `model`. The first updates (`num_updates` from 1) weigh more."""
    decay = min(EMA_DECAY, (1 + num_updates) / (10 + num_updates))
    for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def known_scenes(world: World) -> World:
    """The rows whose objects all have known colors, with one in PAIRS_KEPT of those with two objects."""
    known = [row for row, scene in enumerate(world.scenes) if all(thing.color in KNOWN_COLORS for thing in scene.things)]
    rows = [row for row in known if world.scenes[row].relation is None or row % PAIRS_KEPT == 0]
    return World(world.images[rows], [world.scenes[row] for row in rows])


@torch.inference_mode()
def encode_world(autoencoder: DCAutoencoder, world: World) -> Tensor:
    """Encode all images as scaled latents, (N, C, h, w) float32."""
    spans = (slice(start, start + 100) for start in range(0, len(world.scenes), 100))
    latents = torch.cat([autoencoder.encode(world.images_as_tensor(span)) for span in spans])
    return latents.clone()


def measure_guidance(pipeline: TextToImage, judge: AttributeJudge, output_dir: Path) -> dict[str, float]:
    """Draw one-object prompts of validation rows at each guidance scale, and write the pictures to `output_dir`.

    Returns `attribute_accuracy` at each scale, as `<attribute>@<scale>`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    for scale in GUIDANCE_SCALES:
        images, accuracy = draw_and_judge(pipeline, judge, first=VALIDATION, count=64, guidance_scale=scale)
        image_grid(images, columns=8).save(output_dir / f"grid-{scale:g}.png")
        figures |= {f"{name}@{scale:g}": value for name, value in accuracy.items()}
    return figures


def draw_and_judge(
    pipeline: TextToImage,
    judge: AttributeJudge,
    *,
    first: int,
    count: int,
    guidance_scale: float,
    colors: tuple[str, ...] = KNOWN_COLORS,
) -> tuple[list[Image.Image], dict[str, float]]:
    """Draw the one-object prompts of rows `first` to `first + count` in 20 steps, and return pictures and `attribute_accuracy`.

    The seed of a picture is its row.
    """
    config = ShapesConfig(colors=colors, pair_share=0.0)
    asked = [sample_scene(index, config) for index in range(first, first + count)]
    prompts = [write_caption(scene, phrasings(scene)[index % 2]) for index, scene in enumerate(asked)]
    images: list[Image.Image] = []
    for start in range(0, count, 32):
        span = range(start, min(start + 32, count))
        seeds = [first + index for index in span]
        images += pipeline([prompts[index] for index in span], num_steps=20, guidance_scale=guidance_scale, seed=seeds)
    return images, attribute_accuracy(asked, judge.read(images))
