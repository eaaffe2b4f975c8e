"""Measures the shipped checkpoints on scenes that none of them was trained on, and says what they must reach."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, PreTrainedTokenizerFast

from pipelines.evaluate.shapes import ATTRIBUTES, AttributeJudge, attribute_accuracy
from pipelines.shapes.grammar import parse
from pipelines.shapes.scenes import KNOWN_COLORS, NEW_COLORS
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import image_grid
from pipelines.zoo.autoencoder import load_autoencoder, measure_autoencoder
from pipelines.zoo.captioners import caption_images, load_captioner
from pipelines.zoo.clip import measure_clip
from pipelines.zoo.transformer import GUIDANCE_SCALES, draw_and_judge
from pipelines.zoo.world import HELD_OUT, VALIDATION, World, load_world
from sana_model.pipeline import TextToImage

NUM_SCENES = 1000
NUM_PROMPTS = 200
NUM_THREADS = 2
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A figure of `measure_zoo` and the bounds, inclusive, that it must keep."""

    name: str
    lowest: float
    highest: float = 1.0

    def is_kept(self, figures: Figures) -> bool:
        """Whether the figure is within the bounds."""
        return self.lowest <= figures[self.name] <= self.highest


GATES = (
    Gate(name="autoencoder.worst_change", lowest=-0.03, highest=1.0),
    Gate(name="clip.hard_negatives", lowest=0.95),
    Gate(name="clip.shape", lowest=0.95),
    Gate(name="captioner-a.exact", lowest=0.80),
    Gate(name="captioner-b.exact", lowest=0.40, highest=0.70),
    Gate(name="captioners.selection_gain", lowest=0.10),
    Gate(name="pipeline.all", lowest=0.80),
)


def measure_zoo(zoo_dir: str | Path, *, grid: str | Path) -> Figures:
    """Measure every figure of the model card, by name, and print each part's when it is done.

    Args:
        zoo_dir: the folder of the checkpoints.
        grid: the file for a grid of pictures that the transformer drew.
    """
    torch.set_num_threads(NUM_THREADS)
    zoo = Path(zoo_dir)
    world = load_world(NUM_SCENES, first=HELD_OUT)
    clip = ClipModel(str(zoo / "clip"))
    judge = AttributeJudge(clip)
    parts: dict[str, Callable[[], Figures]] = {
        "clip": lambda: _measure_clip(zoo, world),
        "autoencoder": lambda: _measure_autoencoder(zoo, world, judge),
        "captioners": lambda: _measure_captioners(zoo, world, clip),
        "pipeline": lambda: _measure_pipeline(zoo, judge, grid),
    }
    figures: Figures = {}
    for name, measure in parts.items():
        found = {key if key.startswith("captioner") else f"{name}.{key}": value for key, value in measure().items()}
        print(json.dumps({key: round(value, 4) for key, value in found.items()}), flush=True)
        figures |= found
    return figures


def _measure_clip(zoo: Path, world: World) -> Figures:
    model = CLIPModel.from_pretrained(zoo / "clip", dtype=torch.float32, trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(zoo / "clip", trust_remote_code=False)
    return measure_clip(model, tokenizer, world)


def _measure_autoencoder(zoo: Path, world: World, judge: AttributeJudge) -> Figures:
    """The change in the share of attributes that the judge reads right, from before to after encoding and decoding."""
    singles = [row for row, scene in enumerate(world.scenes) if scene.relation is None]
    world = World(world.images[singles], [world.scenes[row] for row in singles])
    model = load_autoencoder(zoo / "pipeline" / "autoencoder")
    with torch.no_grad():
        decoded = model.decode(model.encode(world.images_as_tensor(slice(None)))).clamp(-1, 1)
    pixels = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    names = (*ATTRIBUTES, "fill", "size", "position")
    before, after = (
        attribute_accuracy(world.scenes, judge.read([Image.fromarray(image) for image in images]), names)
        for images in (world.images, pixels)
    )
    changes = {f"change_of_{name}": after[name] - before[name] for name in names}
    return {**changes, "worst_change": min(changes.values()), "psnr": measure_autoencoder(model, world)["psnr"]}


def _measure_captioners(zoo: Path, world: World, clip: ClipModel) -> Figures:
    """The shares of exact captions: by each captioner, by a random choice between them, and by the higher CLIP score."""
    images = [Image.fromarray(image) for image in world.images]
    image_embeds = clip.embed_images(images)
    exact, scores = [], []
    for name in ("captioner-a", "captioner-b"):
        captions = caption_images(*load_captioner(zoo / name), images)
        exact.append([parse(caption) == scene for caption, scene in zip(captions, world.scenes, strict=True)])
        scores.append((image_embeds * clip.embed_texts(captions)).sum(-1).numpy())
    right, chosen = np.array(exact), np.array(scores).argmax(0)
    selected = float(right[chosen, np.arange(len(images))].mean())
    return {
        "captioner-a.exact": float(right[0].mean()),
        "captioner-b.exact": float(right[1].mean()),
        "captioners.random_choice": float(right.mean()),
        "captioners.clip_selection": selected,
        "captioners.selection_gain": selected - float(right.mean()),
    }


def _measure_pipeline(zoo: Path, judge: AttributeJudge, grid: str | Path) -> Figures:
    """The attribute accuracy of pictures of one-object prompts, at the guidance scale that is best on other prompts."""
    pipeline = TextToImage.from_pretrained(zoo / "pipeline", dtype=torch.float32)

    def draw(first: int, count: int, scale: float, colors: tuple[str, ...]) -> tuple[list[Image.Image], Figures]:
        return draw_and_judge(pipeline, judge, first=first, count=count, guidance_scale=scale, colors=colors)

    tried = {scale: draw(VALIDATION, 64, scale, KNOWN_COLORS)[1]["all"] for scale in GUIDANCE_SCALES}
    scale = max(tried, key=tried.__getitem__)
    images, figures = draw(HELD_OUT, NUM_PROMPTS, scale, KNOWN_COLORS)
    image_grid(images[:64]).save(grid)
    unseen = draw(HELD_OUT, 64, scale, NEW_COLORS)[1]
    return {
        "guidance_scale": scale,
        **figures,
        "color_of_unseen_colors": unseen["color"],
        "all_of_unseen_colors": unseen["all"],
    }
