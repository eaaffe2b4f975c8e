"""The block ablation on drawn scenes: how fast each design of the block learns to draw what is asked for."""

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from jobs.common.text_table import format_table
from jobs.learning import sample_asked
from jobs.paper.ablation import Figures, PictureJudge, print_curves, run_variants
from jobs.paper.blocks import DESIGNS, Design, print_costs
from jobs.paper.config import BlocksConfig
from pipelines.evaluate.distances import Moments
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import full_caption
from pipelines.shapes.scenes import Scene, ShapesConfig
from pipelines.workers.clip import ClipModel
from pipelines.zoo.config import LoopConfig
from pipelines.zoo.training import fit
from pipelines.zoo.transformer import encode_world, make_compute_loss, update_average
from pipelines.zoo.world import World
from sana_model.nn.config import PRESETS
from sana_model.pipeline import TextToImage

SHAPES = ShapesConfig(pair_share=0.0)
FIRST_SCENE = 90_000_000
FIRST_PROMPT = 100_000_000
BATCH = 64  # pictures that are drawn, or embedded, at once
PUBLISHED = [
    ["softmax attention, FFN", "F8C4P2, 256 px", "18.7", "24.9"],
    ["linear attention, FFN", "F8C4P2, 256 px", "21.5", "23.3"],
    ["linear attention, Mix-FFN", "F8C4P2, 256 px", "18.9", "24.8"],
    ["linear attention, Mix-FFN", "F32C32P1, 512 px", "6.4", "27.4"],
]
"""Table 12 of the paper, after 52,000 steps: FID and CLIP score."""


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes with their latents (N, 8, 8, 8), the models around the transformer, and what its pictures are asked for."""

    scenes: list[Scene]
    latents: Tensor
    pipeline: TextToImage
    asked: list[Scene]
    judge: PictureJudge

    @classmethod
    def load(cls, config: BlocksConfig) -> "Scenes":
        drawn = [draw_row(FIRST_SCENE + number, SHAPES) for number in range(config.num_images)]
        scenes, images = [scene for scene, _ in drawn], np.stack([pixels for _, pixels in drawn])
        pipeline = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)
        clip, moments = ClipModel("zoo://clip"), Moments()
        for start in tqdm(range(0, len(images), BATCH), desc="scenes", leave=False):
            moments.add(clip.embed_images([Image.fromarray(pixels) for pixels in images[start : start + BATCH]]).numpy())
        latents = encode_world(pipeline.autoencoder, World(images, scenes))
        asked = sample_asked(SHAPES, FIRST_PROMPT, config.num_prompts)
        return cls(scenes, latents, pipeline, asked, PictureJudge(clip, moments))


def train_design(design: Design, scenes: Scenes, config: BlocksConfig, seed: int) -> dict[int, Figures]:
    """Train a fresh transformer of this design; the figures of the pictures that its average weights draw, by step.

    Trainings of one seed see the same scenes, captions and noise in the same order.
    """
    torch.manual_seed(seed)
    model = design.make(PRESETS["shapes"])
    average = copy.deepcopy(model).requires_grad_(False)
    companions = scenes.pipeline
    pipeline = TextToImage(average, companions.autoencoder, companions.text_encoder, flow_shift=companions.flow_shift)
    updates = itertools.count(1)
    curve: dict[int, Figures] = {}

    def evaluate() -> Figures:
        step = min((len(curve) + 1) * config.every, config.num_steps)
        curve[step] = scenes.judge.judge(scenes.asked, draw(pipeline, scenes.asked, config, seed))
        return curve[step]

    fit(
        model.parameters(),
        make_compute_loss(model, companions.text_encoder, scenes.latents, scenes.scenes, seed=seed),
        num_rows=len(scenes.scenes),
        config=LoopConfig(
            num_steps=config.num_steps,
            micro_batch_size=config.micro_batch_size,
            lr=config.lr,
            weight_decay=0.0,
            minutes=float("inf"),
            eval_every=config.every,
            seed=seed,
            num_threads=config.num_threads,
            bf16=False,
        ),
        save=lambda: None,
        evaluate=evaluate,
        after_step=lambda: update_average(average, model, next(updates)),
    )
    return curve


def draw(pipeline: TextToImage, asked: list[Scene], config: BlocksConfig, seed: int) -> list[Image.Image]:
    """A picture of each scene, from noise of its own."""
    images: list[Image.Image] = []
    settings = {"num_steps": config.solver_steps, "guidance_scale": config.guidance_scale}
    for start in range(0, len(asked), BATCH):
        prompts = [full_caption(scene) for scene in asked[start : start + BATCH]]
        first = seed * len(asked) + start
        images += pipeline(prompts, seed=list(range(first, first + len(prompts))), **settings)
    return images


def compare_blocks(config: BlocksConfig) -> None:
    """Print the designs' costs; train each with each seed, and print what they have learned over the steps."""
    print_costs()
    if not config.num_steps:
        return
    scenes = Scenes.load(config)

    def train_one(name: str, seed: int) -> Mapping[int, Figures]:
        print(f"\n{name}, seed {seed}", flush=True)
        return train_design(DESIGNS[name], scenes, config, seed)

    curves = run_variants(DESIGNS, config.seeds, train_one)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(json.dumps(curves, indent=2) + "\n")
    print(f"\n{config.num_images} drawn scenes of one object, {config.num_prompts} prompts; ± is a 95 % interval over seeds")
    print_curves(curves)
    print("\npublished, after 52,000 steps")
    print(format_table(["block", "autoencoder, side", "FID", "CLIP score"], PUBLISHED))
    print(
        "Here all have the same autoencoder (f8, 64 px), depth, width and sine-cosine positions. The distance is Fréchet's\n"
        "between embeddings of the tiny CLIP. Not comparable: the published FID, of Inception's features on MJHQ-30K."
    )
    print(f"\nfigures of every seed: {config.output}", flush=True)
