"""Draws scenes, and writes folders of drawn images as a source for ingest."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from pipelines.shapes.grammar import full_caption, parse, sample_caption
from pipelines.shapes.scenes import (
    BACKGROUNDS,
    BASE_SIZE,
    COLORS,
    POSITIONS,
    Scene,
    ShapesConfig,
    Thing,
    row_generator,
    sample_scene_from,
)

# Lengths are in pixels of an image of BASE_SIZE.
RADIUS = {"small": 12.0, "large": 19.0}
OFFSET = {"small": 17.0, "large": 11.0}  # from the middle, for a position other than the center
PAIR_OFFSET = 15.0  # of either object of a pair from the middle
STRIPE_PERIOD, STRIPE_WIDTH = 7.5, 4.5
HOLE = 0.55  # inner radius of an outlined shape, as a share of the outer radius
SUPERSAMPLING = 4


def draw_row(index: int, config: ShapesConfig = ShapesConfig()) -> tuple[Scene, np.ndarray]:
    """The scene of row `index` and its image, (H, W, 3) uint8."""
    rng = row_generator(index, config)
    scene = sample_scene_from(rng, config)
    return scene, draw_scene(scene, rng, config.image_size)


def write_folder(
    folder: str | Path, first: int, count: int, config: ShapesConfig = ShapesConfig(), *, captioned: bool = False
) -> None:
    """Write the images of rows `first` to `first + count` as PNG files, each with a .json file beside it.

    The .json holds `truth`, a caption that names every attribute. If `captioned`, it also holds `caption`, in a random
    phrasing; ingest takes that as the image's original caption. Files that exist are not written again.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(first, first + count), desc="drawing scenes", disable=count < 2000):
        path = Path(folder, f"{index:09d}.png")
        if path.exists():
            continue
        scene, pixels = draw_row(index, config)
        facts = {"truth": full_caption(scene)}
        if captioned:
            facts["caption"] = sample_caption(scene, np.random.default_rng(index))
        path.with_suffix(".json").write_text(json.dumps(facts))
        Image.fromarray(pixels).save(path)


def read_truth(metadata: str | None) -> Scene | None:
    """The scene of an image of `write_folder`, from its column `metadata` in the images table; None for any other image."""
    truth = json.loads(metadata).get("truth") if metadata else None
    return parse(truth) if isinstance(truth, str) else None


def draw_scene(scene: Scene, rng: np.random.Generator, image_size: int = BASE_SIZE) -> np.ndarray:
    """Draw a scene that leaves no attribute out, with small random shifts of place, size and color: (H, W, 3) uint8."""
    scale = image_size * SUPERSAMPLING / BASE_SIZE
    side = image_size * SUPERSAMPLING
    assert scene.background is not None
    canvas = Image.new("RGB", (side, side), _shade(BACKGROUNDS[scene.background], rng))
    for thing, (x, y), radius in zip(scene.things, _centers(scene), _radii(scene), strict=True):
        dx, dy = rng.uniform(-1.5, 1.5, 2)
        radius *= rng.uniform(0.94, 1.04)
        mask = _mask(thing, (x + dx) * scale, (y + dy) * scale, radius * scale, side, scale)
        canvas.paste(_shade(COLORS[thing.color], rng), mask=mask)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def _centers(scene: Scene) -> list[tuple[float, float]]:
    """The center (x, y) of each object."""
    middle = BASE_SIZE / 2
    if scene.relation is None:
        assert scene.size is not None and scene.position is not None
        (dx, dy), offset = POSITIONS[scene.position], OFFSET[scene.size]
        return [(middle + dx * offset, middle + dy * offset)]
    x, y = (PAIR_OFFSET, 0.0) if scene.relation == "left of" else (0.0, PAIR_OFFSET)
    return [(middle - x, middle - y), (middle + x, middle + y)]


def _radii(scene: Scene) -> list[float]:
    return [RADIUS[scene.size or "small"]] * len(scene.things)


def _shade(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """The color, shifted at random by up to 9 of 255 in each channel."""
    r, g, b = (int(np.clip(channel + shift, 0, 255)) for channel, shift in zip(color, rng.integers(-9, 10, 3), strict=True))
    return r, g, b


def _mask(thing: Thing, x: float, y: float, radius: float, side: int, scale: float) -> Image.Image:
    """The pixels that an object covers, as 255 in a grayscale image of `side` pixels. `scale` is in pixels per base pixel."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    _draw_outline(pen, thing.shape, x, y, radius, 255)
    if thing.fill == "outlined":
        _draw_outline(pen, thing.shape, x, y, radius * HOLE, 0)
    elif thing.fill == "striped":
        top = y - radius
        for row in np.arange(top + STRIPE_WIDTH * scale, y + radius, STRIPE_PERIOD * scale):
            pen.rectangle((0, row, side, row + (STRIPE_PERIOD - STRIPE_WIDTH) * scale), fill=0)
    return mask


def _draw_outline(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: int) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.87
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        points = 3 if shape == "triangle" else 5
        reach = [radius * 1.15] if shape == "triangle" else [radius * 1.15, radius * 0.5]
        corners = []
        for index in range(points * len(reach)):
            angle = math.pi * (2 * index / (points * len(reach)) - 0.5)
            length = reach[index % len(reach)]
            corners.append((x + length * math.cos(angle), y + length * math.sin(angle) + 0.1 * radius))
        pen.polygon(corners, fill=fill)
