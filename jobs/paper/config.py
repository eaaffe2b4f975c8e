"""Configuration of the paper's tables."""

from dataclasses import dataclass, field
from typing import Literal

from jobs.demo.config import WorldConfig
from jobs.pipeline import TrainingStagesJob
from pipelines.storage.files import is_local

PUBLISHED_MODELS = ("sana-0.6b", "sana-1.6b", "sana-4.8b")


@dataclass(frozen=True, kw_only=True)
class ParametersConfig:
    """Configuration of the table of parameters.

    Args:
        models: transformers by their names in `PRESETS`.
        autoencoders: by their names in `AUTOENCODER_PRESETS`.
    """

    models: list[str] = field(default_factory=lambda: list(PUBLISHED_MODELS))
    autoencoders: list[str] = field(
        default_factory=lambda: [
            *("dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-f64c128-in-1.0", "dc-ae-f128c512-in-1.0"),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class MacsConfig:
    """Configuration of the table of multiply-accumulates.

    Args:
        models: transformers by their names in `PRESETS`.
        sizes: image sides in pixels.
        caption_tokens: tokens of the caption; the published code computes with 300.
    """

    models: list[str] = field(default_factory=lambda: list(PUBLISHED_MODELS))
    sizes: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    caption_tokens: int = 300

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        if self.caption_tokens < 1:
            raise ValueError(f"caption_tokens={self.caption_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Configuration of the cost of attention by resolution.

    Args:
        model: the transformer whose width and heads are taken, by its name in `PRESETS`.
        sizes: image sides in pixels; on a CPU softmax attention at 4096 px takes minutes.
        device: "cpu" or "cuda".
        dtype: of queries, keys and values.
        repeats: timings of each; the median counts.
    """

    model: str = "sana-0.6b"
    sizes: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    repeats: int = 3

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SolverCurveConfig:
    """Configuration of the curve of the solvers on a model that draws scenes of the Shapes world.

    Args:
        pipeline: the model: a folder, hub id or URI.
        clip: reads the scenes off the pictures.
        steps: numbers of steps.
        pictures: how many are drawn at each number of steps, each of a prompt of its own.
        reference_steps: of the flow-Euler run that errors are measured from.
        guidance_scale: of both solvers.
        seed: of the noise; both solvers begin with the same.
        device: "cpu" or "cuda".
    """

    pipeline: str = "zoo://pipeline"
    clip: str = "zoo://clip"
    steps: list[int] = field(default_factory=lambda: [4, 8, 14, 20, 28, 50])
    pictures: int = 48
    reference_steps: int = 500
    guidance_scale: float = 4.5
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or self.pictures < 1 or self.reference_steps < 1:
            raise ValueError(
                f"steps={self.steps}, pictures={self.pictures} and reference_steps={self.reference_steps} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Configuration of the reconstruction of pictures by an autoencoder.

    Args:
        pictures: a folder of pictures, any fsspec URI.
        autoencoder: a folder, hub id or URI.
        size: pixels: the shorter side is scaled to it, and the middle cut out.
        batch_size: pictures in one call.
        dtype: of the weights.
        device: "cpu" or "cuda".
        limit: so many pictures, the first by name; None: all.
    """

    pictures: str
    autoencoder: str = "hf://mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    size: int = 1024
    batch_size: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value in {"size": self.size, "batch_size": self.batch_size, "limit": self.limit}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CaptionsJob(TrainingStagesJob):
    """Configuration of the caption-selection ablation on drawn scenes of one object.

    Args:
        world: the drawn scenes, which are written to `ingest.source`, and the number of prompts of each grid.
        seeds: each selection is trained once with each.
    """

    world: WorldConfig = field(default_factory=WorldConfig)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds)
        if not (is_local(self.dataset_uri) and is_local(self.ingest.source)):
            raise ValueError(f"dataset_uri={self.dataset_uri}, ingest.source={self.ingest.source}: give local folders")
        if self.world.shapes.pair_share:
            raise ValueError(f"world.shapes.pair_share={self.world.shapes.pair_share} must be 0: prompts are about one object")
        if self.train.data.clip != self.scorer.name:
            raise ValueError(f"train.data.clip={self.train.data.clip} must be scorer.name={self.scorer.name}")


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Configuration of the comparison of designs of the block, on drawn scenes of one object.

    Args:
        num_steps: of each training; 0: only the costs are printed.
        seeds: each design is trained once with each.
        every: steps between two drawings of the prompts.
        num_images: drawn scenes to train on.
        num_prompts: about other scenes, whose pictures are judged.
        micro_batch_size: scenes in a step.
        lr: learning rate of AdamW after 50 steps of warm-up; it falls along a cosine.
        solver_steps: of each picture.
        guidance_scale: of each picture.
        num_threads: of torch.
        output: where the figures of every seed are written, as JSON.
    """

    num_steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    every: int = 200
    num_images: int = 6000
    num_prompts: int = 128
    micro_batch_size: int = 32
    lr: float = 1e-3
    solver_steps: int = 8
    guidance_scale: float = 4.0
    num_threads: int = 1
    output: str = "outputs/paper_blocks.json"

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        for name in ("every", "num_images", "num_prompts", "micro_batch_size", "solver_steps", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_steps < 0:
            raise ValueError(f"num_steps={self.num_steps} must be 0 or more")


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raise ValueError unless there are seeds, all of them different."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} must be one or more, each of them once")


def check_sizes(sizes: list[int]) -> None:
    """Raise ValueError unless there are image sides, all of them multiples of 32 pixels."""
    if not sizes or any(size < 32 or size % 32 for size in sizes):
        raise ValueError(f"sizes={sizes} must be image sides in pixels, multiples of 32")
