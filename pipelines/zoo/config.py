"""Configuration of the trainings that make the tiny checkpoints. Their defaults suit one free CPU core."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["llava", "llava-next"]
NUM_ROWS = 60_000  # of the Shapes world, to train on
CACHE_DIR = "outputs/zoo/cache"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """A training on a CPU, which ends after `num_steps` or `minutes`, whichever comes first.

    Args:
        num_steps: optimizer steps, at most.
        micro_batch_size: rows in a step.
        lr: learning rate of AdamW after the warm-up; it then falls to 2 % along a cosine.
        weight_decay: of AdamW.
        warmup_steps: steps over which the learning rate rises linearly.
        clip: largest norm of the gradients.
        minutes: wall-clock limit; the learning rate follows the clock where that is ahead of the steps.
        eval_every: steps from one evaluation and save to the next.
        seed: of weights, rows and captions.
        num_threads: of torch.
        bf16: compute matrix products in bfloat16 (autocast); weights and optimizer stay in float32.
    """

    num_steps: int
    micro_batch_size: int
    lr: float
    weight_decay: float = 0.01
    warmup_steps: int = 50
    clip: float = 1.0
    minutes: float = 60.0
    eval_every: int = 500
    seed: int = 0
    num_threads: int = 1
    bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class TinyClipConfig:
    """Training of the tiny CLIP.

    Args:
        output_dir: the folder to write.
        init_dir: a CLIP to train further; it learns captions from the start.
        cache_dir: keeps the drawn scenes.
        loop: the training.
    """

    output_dir: str
    init_dir: str | None = None
    cache_dir: str = CACHE_DIR
    loop: LoopConfig = LoopConfig(num_steps=6000, micro_batch_size=64, lr=1e-3, minutes=40)


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Drawn scenes as files, which `jobs.ingest` reads: the tiny DC-AE is trained on them by `jobs.train_autoencoder`.

    Args:
        output_dir: the folder to write.
        first: the first row of the world that is drawn; those from 10,000,000 on are kept for measuring.
        num_rows: how many are drawn.
    """

    output_dir: str
    first: int = 0
    num_rows: int = 30_000


@dataclass(frozen=True, kw_only=True)
class TinyTextEncoderConfig:
    """Training of the tiny Gemma-2.

    Args:
        output_dir: the folder to write.
        loop: the training.
    """

    output_dir: str
    loop: LoopConfig = LoopConfig(num_steps=1500, micro_batch_size=64, lr=2e-3, minutes=8)


CAPTIONER_LOOPS: Mapping[Kind, LoopConfig] = {
    "llava": LoopConfig(num_steps=5000, micro_batch_size=64, lr=1e-3, minutes=35),
    "llava-next": LoopConfig(num_steps=8000, micro_batch_size=64, lr=1e-3, minutes=35, eval_every=100, seed=1),
}


@dataclass(frozen=True, kw_only=True)
class TinyCaptionerConfig:
    """Training of a tiny VLM.

    Args:
        output_dir: the folder to write.
        kind: the architecture.
        clip_dir: the folder of the CLIP whose vision tower "llava" begins with; only for "llava".
        cache_dir: keeps the drawn scenes.
        loop: the training; null: the one of `CAPTIONER_LOOPS`.
        stop_at: stop when this share of the captions of validation scenes is exact.
        num_rows: scenes to train on.
        num_measured: scenes to validate on, and to measure the saved weights on.
    """

    output_dir: str
    kind: Kind
    clip_dir: str | None = None
    cache_dir: str = CACHE_DIR
    loop: LoopConfig | None = None
    stop_at: float | None = None
    num_rows: int = NUM_ROWS
    num_measured: int = 300

    def __post_init__(self) -> None:
        if (self.kind == "llava") != (self.clip_dir is not None):
            raise ValueError(
                f"clip_dir={self.clip_dir!r}, kind={self.kind!r}: give the folder of a CLIP for llava, none for llava-next"
            )


@dataclass(frozen=True, kw_only=True)
class TinyTransformerConfig:
    """Training of the tiny linear DiT.

    Args:
        output_dir: the folder to write the whole pipeline to.
        autoencoder_dir: the tiny DC-AE.
        text_encoder_dir: the tiny Gemma-2.
        clip_dir: the tiny CLIP, which judges the pictures.
        init_dir: a pipeline whose transformer is trained further.
        cache_dir: keeps the drawn scenes.
        loop: the training.
    """

    output_dir: str
    autoencoder_dir: str
    text_encoder_dir: str
    clip_dir: str
    init_dir: str | None = None
    cache_dir: str = CACHE_DIR
    loop: LoopConfig = LoopConfig(num_steps=20_000, micro_batch_size=48, lr=1e-3, weight_decay=0.0, minutes=60, bf16=False)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measurement of every gate on held-out scenes.

    Args:
        zoo_dir: the folder of the checkpoints; null: the shipped ones.
        output: where to write the figures, as JSON.
        grid: where to write the pictures that the transformer drew.
    """

    zoo_dir: str | None = None
    output: str = "outputs/zoo/figures.json"
    grid: str = "outputs/zoo/grid.png"
