"""Configuration of the benchmarks."""

from dataclasses import dataclass, field
from typing import Literal

from jobs.serve import ServeJob
from pipelines.evaluate.config import ClipScoreConfig, MetricsConfig
from pipelines.evaluate.feature_config import CmmdConfig

PARTS = ("forward", "training", "sampling", "sprint", "controlnet", "autoencoder", "text")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of the comparison with diffusers.

    Args:
        device: "cpu" or "cuda".
        depth: transformer blocks (published: 28).
        text_depth: layers of Gemma-2-2B's width (published: 26).
        sizes: image sides in pixels, for the transformer.
        dtypes: float32, bfloat16 or float16.
        batch_size: images at once.
        parts: which of forward, training, sampling, sprint (2 steps), controlnet (20 guided steps), autoencoder, text.
        autoencoder_size: image side in pixels for encode and decode.
        captions: encoded at once by the text encoder.
        repeats: timings of each; sampling, controlnet, autoencoder and text take half as many.
    """

    device: str = "cpu"
    depth: int = 4
    text_depth: int = 2
    sizes: list[int] = field(default_factory=lambda: [512, 1024])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    batch_size: int = 1
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    autoencoder_size: int = 512
    captions: int = 16
    repeats: int = 6

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise ValueError(f"unknown parts {unknown}: choose from {list(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """Configuration of the comparison of a training step with the published recipe.

    Args:
        device: "cpu" or "cuda".
        depth: transformer blocks (published: 28).
        text_depth: layers of Gemma-2-2B's width (published: 26).
        sizes: image sides in pixels.
        dtype: float32 or bfloat16.
        batch_size: images of a step.
        repeats: timings of each part.
    """

    device: str = "cpu"
    depth: int = 2
    text_depth: int = 2
    sizes: list[int] = field(default_factory=lambda: [512, 1024])
    dtype: str = "bfloat16"
    batch_size: int = 2
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class AutoencoderStepConfig:
    """Configuration of the comparison of DC-AE's training step with that of diffusers' modules.

    Args:
        device: "cpu" or "cuda".
        sizes: image sides in pixels.
        dtype: float32 or bfloat16.
        batch_sizes: images of a step, for each size.
        repeats: timings of each size.
    """

    device: str = "cpu"
    sizes: list[int] = field(default_factory=lambda: [128, 256])
    dtype: str = "float32"
    batch_sizes: list[int] = field(default_factory=lambda: [4, 1])
    repeats: int = 5

    def __post_init__(self) -> None:
        if len(self.batch_sizes) != len(self.sizes) or not self.sizes or min(*self.batch_sizes, *self.sizes, self.repeats) < 1:
            raise ValueError(
                f"sizes={self.sizes}, batch_sizes={self.batch_sizes}, repeats={self.repeats}: give each size a batch size, all "
                "of them at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Configuration of the comparison of solvers.

    Args:
        seed: of the mixture's means and of the 512 starting points.
        shift: flow shift of the sampling grid.
        std: of each Gaussian; the means are standard normal.
    """

    seed: int = 0
    shift: float = 3.0
    std: float = 0.3


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """Configuration of the measurement of DC-AE's memory.

    Args:
        sizes: image sides in pixels.
        tile: side of a tile in pixels.
        preset: of `DCAutoencoder`.
        dtype: float32 or bfloat16.
        whole: measure the run in one piece too (2048 px takes some 10 GiB).
    """

    sizes: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    tile: int = 512
    preset: str = "dc-ae-f32c32-sana-1.1"
    dtype: str = "bfloat16"
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class FittingConfig:
    """Configuration of the measurement of quantized weights and of parts that take turns, on the CPU.

    Args:
        parts: which of layers (SQNR), pictures, time, memory.
        preset: of `SanaTransformer`.
        depth: transformer blocks, for layers and time.
        memory_depth: transformer blocks, for memory (published: 28).
        text_layers: layers of the text encoder, of Gemma-2-2B's width, for memory (published: 26).
        size: side of the picture in pixels, for time and memory.
        steps: of the picture, for memory.
        pictures: that the zoo's pipeline draws in each precision.
        repeats: of each forward that is timed.
        folder: for the weights of the part memory, several GiB; None: the folder for temporary files.
    """

    parts: list[str] = field(default_factory=lambda: ["layers", "pictures", "time", "memory"])
    preset: str = "sana-0.6b"
    depth: int = 4
    memory_depth: int = 28
    text_layers: int = 26
    size: int = 1024
    steps: int = 2
    pictures: int = 48
    repeats: int = 5
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Configuration of the measurement of a stage's overhead.

    Args:
        rows: that the stage and the loop process; 0 leaves this out.
        ms_per_row: that the model takes.
        rows_per_shard: of both.
        memory_rows: how many rows to measure memory with, one after the other.
        num_cpus: logical CPUs of the local Ray.
    """

    rows: int = 20_000
    ms_per_row: float = 5.0
    rows_per_shard: int = 1000
    memory_rows: list[int] = field(default_factory=lambda: [10_000, 100_000, 1_000_000])
    num_cpus: int = 4


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Configuration of the measurement of the search for near duplicates by embeddings.

    Args:
        rows: how many embeddings to search, one number after the other; empty leaves this out.
        width: of the embeddings.
        clip: that embeds changed pictures: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        pictures: a folder of pictures; None: 300 drawn ones of 256 px.
        num_cpus: logical CPUs of the local Ray.
    """

    rows: list[int] = field(default_factory=lambda: [25_000, 50_000, 100_000])
    width: int = 512
    clip: str = "zoo://clip"
    pictures: str | None = None
    num_cpus: int = 2


@dataclass(frozen=True, kw_only=True)
class JudgingConfig(MetricsConfig):
    """Configuration of the measurement of how fast metrics judge; each has a section of its name, as in `jobs.evaluate`.

    Args:
        num_pictures: drawn ones.
        side: of a picture in pixels.
        num_threads: of torch; a metric's `prepare_threads` come besides.
        repeats: timings of each way, in turns; the median counts.
    """

    metrics: tuple[str, ...] = ("clip_score", "cmmd", "shapes")
    clip_score: ClipScoreConfig = field(default_factory=lambda: ClipScoreConfig(model="zoo://clip"))
    cmmd: CmmdConfig = field(default_factory=lambda: CmmdConfig(model="zoo://clip"))
    num_pictures: int = 512
    side: int = 256
    num_threads: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_pictures", "side", "num_threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ServeBenchmarkConfig(ServeJob):
    """Configuration of the measurement of serving; its other settings are those of `jobs.serve`.

    Args:
        clients: that ask at the same time, each for one picture after another.
        num_batches: of a turn.
        steps: of a picture.
        size: of a picture, as in a request; None: the model's own.
        repeats: turns of each way; the median of their ratios counts.
    """

    port: int = 8765
    clients: int = 16
    num_batches: int = 8
    steps: int = 20
    size: str | None = None
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class StartupConfig:
    """Configuration of the measurement of how fast commands start.

    Args:
        commands: names, as `python -m jobs` lists them; empty: all.
        repeats: runs of each, in turns; the median counts.
    """

    commands: list[str] = field(default_factory=list)
    repeats: int = 3


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Configuration of the short run that tells all about a GPU.

    Args:
        device: "cuda", or "cpu" for the same lines with shapes that this machine can bear.
        minutes: for all lines; each has a share, and ends when that is over.
        output_dir: folder for gpu.md and gpu.json, which are whole after every line.
        sections: only those whose heading begins so, such as correctness or "transformer, forward: sana-0.6b"; empty: all.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    minutes: float = 10.0
    output_dir: str = "outputs/gpu"
    sections: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"minutes={self.minutes} must be above 0, and a day at most")
