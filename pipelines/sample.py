"""The sample stage: prompts to pictures, by actors that each hold the whole pipeline."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
from PIL import Image

from pipelines.models import model_version, pick_device
from pipelines.schema import SAMPLES, samples_path
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, run_shards
from pipelines.tables import Identity, Table
from sana_model.generate import TextToImage


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn.

    Args:
        height, width: pixels; the size that the model was made for unless given.
        num_steps: of the solver.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        solver: "flow_dpm_solver" (14 to 20 steps) or "flow_euler" (28 to 50).
        seed: picture i is drawn from seed + i, whatever its batch.
        batch_size: pictures in one call of the model; changes no value but rounding.
        rows_per_shard: pictures that are lost, at most, when an actor dies.
        dtype: of the weights; None: the checkpoint's.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
    """

    height: int | None = None
    width: int | None = None
    num_steps: int = 20
    guidance_scale: float = 4.5
    solver: Literal["flow_dpm_solver", "flow_euler"] = "flow_dpm_solver"
    seed: int = 0
    batch_size: int = 16
    rows_per_shard: int = 1000
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts, and what draws their pictures.

    Args:
        name: of the table under samples/.
        pipeline: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' SanaPipeline, or an NVlabs .pth.
        prompts: the prompts, or a text file with one on each line.
        draw: how the pipeline draws.
    """

    name: str
    pipeline: str
    prompts: list[str] | str
    draw: DrawConfig = field(default_factory=DrawConfig)


def read_prompts(prompts: list[str] | str) -> list[str]:
    """The prompts themselves, or those of a text file, one on each line; blank ones are left out.

    Raises FileNotFoundError, or ValueError if there is none.
    """
    lines = prompts if isinstance(prompts, list) else Path(prompts).read_text().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"prompts={prompts!r} holds no prompt")
    return found


def sample_identity(config: SampleConfig, prompts: Sequence[str]) -> Identity:
    """What the pictures depend on."""
    names = ("height", "width", "num_steps", "guidance_scale", "solver", "seed", "rows_per_shard", "dtype")
    settings = {"pipeline": config.pipeline} | {name: getattr(config.draw, name) for name in names}
    settings["prompts"] = f"{len(prompts)}, sha256 {hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]}"
    return Identity("sample", settings, {"pipeline": model_version(config.pipeline)}, {})


def run_sample(dataset_uri: str, config: SampleConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Draw a picture for each prompt into `samples/<name>`. Raises as `run_shards` and `read_prompts`."""
    prompts = read_prompts(config.prompts)
    size = config.draw.rows_per_shard
    return run_shards(
        Table(dataset_uri, samples_path(config.name), SAMPLES),
        sample_identity(config, prompts),
        [f"{number:05d}" for number in range(-(-len(prompts) // size))],
        read_shard=partial(_read_prompts_shard, prompts, config.draw.seed, size),
        make_worker=partial(Sampler, config),
        resources=config.draw.resources,
        max_reject_share=0.0,
        on_progress=on_progress,
    )


def _read_prompts_shard(prompts: list[str], seed: int, size: int, shard: str) -> pa.Table:
    rows = range(int(shard) * size, min((int(shard) + 1) * size, len(prompts)))
    columns = {"id": [f"{row:06d}" for row in rows], "prompt": [prompts[row] for row in rows]}
    return pa.table(columns | {"seed": [seed + row for row in rows]})


class Sampler:
    """Ray Data actor: prompts -> pictures."""

    def __init__(self, config: SampleConfig):
        self.config = config.draw
        device = pick_device(self.config.device)
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        self.pipeline = TextToImage.from_pretrained(config.pipeline, dtype=dtype).to(device)

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of samples for each prompt; no rejects."""
        rows: list[Row] = []
        source = table.to_pylist()
        for start in range(0, len(source), self.config.batch_size):
            batch = source[start : start + self.config.batch_size]
            images = self.draw([row["prompt"] for row in batch], [row["seed"] for row in batch])
            rows += [{**row, "image_bytes": to_png(image)} for row, image in zip(batch, images, strict=True)]
        return ShardOutput(rows, [])

    def draw(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        config = self.config
        return self.pipeline(
            prompts,
            config.height,
            config.width,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            solver=config.solver,
            seed=seeds,
        )


def to_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_pictures(table: Table, limit: int = 64) -> tuple[list[str], list[Image.Image]]:
    """Prompts and pictures of the first rows of a samples table."""
    rows: list[Row] = []
    for shard in table.list_shards():
        rows += table.read_shard(shard, ["prompt", "image_bytes"]).slice(0, limit - len(rows)).to_pylist()
        if len(rows) == limit:
            break
    return [row["prompt"] for row in rows], [Image.open(BytesIO(row["image_bytes"])) for row in rows]


def image_grid(images: Sequence[Image.Image], columns: int = 8, *, gap: int = 2) -> Image.Image:
    """Images of one size in rows, on white. Raises ValueError if there is none."""
    if not images:
        raise ValueError("images=[] is empty: a grid needs one picture at least")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def cut_grid(grid: Image.Image, count: int, *, size: int, columns: int = 8, gap: int = 2) -> list[Image.Image]:
    """The first `count` pictures that `image_grid` put together, each of `size` x `size` px."""
    columns = min(columns, count)
    corners = [(index % columns * (size + gap), index // columns * (size + gap)) for index in range(count)]
    return [grid.crop((x, y, x + size, y + size)) for x, y in corners]
