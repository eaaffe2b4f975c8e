"""Configuration of the extract and embed_captions stages."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from PIL import Image

from pipelines.extract.buckets import BucketTable
from pipelines.score.config import check_captioners
from pipelines.stages.contract import Resources
from pipelines.tables.schema import check_folder_name, latents_path
from sana_model.nn.config import NVLABS_PROMPTS, TextEncoderConfig

Dtype = Literal["float16", "bfloat16"]
Interpolation = Literal["bicubic", "lanczos"]
PUBLISHED_INTERPOLATION: dict[int, Interpolation] = {2048: "lanczos"}
"""NVlabs' multi-scale data set takes Lanczos for its table of 2048 px, and bicubic for every other."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """An autoencoder and a resolution.

    Args:
        name: of the autoencoder in the table's path, latents/<name>-<resolution>.
        autoencoder: a local folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' or efficientvit's.
        resolution: pixels; an image goes to the bucket of about resolution^2 pixels whose shape is nearest.
        buckets: whose table of bucket sizes. diffusers: 33 sizes at 512 and 1024 px. nvlabs: the 40 that Sana was trained on,
            which cut away less of an image.
        dtype: of the stored latents.
        compute_dtype: of the autoencoder's weights and activations.
        interpolation: of the resize before the middle is cropped out; None: as published (bicubic; Lanczos at 2048 px).
        max_upscale: images that would have to be enlarged more than so many times are refused; None: all are taken.
        max_latent: images with a value beyond it are refused; the latents' standard deviation is about 1.
        tile_size: pixels; encode in tiles, so that memory does not grow with the image. None: in one piece.
        check_rows: images of every shard that are decoded again, to know the PSNR.
        batch_size: images in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    NO_VALUE: ClassVar = (
        *("name", "check_rows", "batch_size", "prepare_threads", "device", "resources", "max_reject_share"),
        "autoencoder",  # the hash of its encoder stands for it
    )
    SINCE: ClassVar = ("buckets",)

    name: str
    autoencoder: str
    resolution: int
    buckets: BucketTable = "diffusers"
    dtype: Dtype = "float16"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    interpolation: Interpolation | None = None
    max_upscale: float | None = None
    max_latent: float = 100.0
    tile_size: int | None = None
    check_rows: int = 4
    batch_size: int = 16
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        if self.batch_size < 1 or self.check_rows < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1, and check_rows={self.check_rows} at least 0")
        if self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be positive, a multiple of what the autoencoder shrinks by")
        for name in ("max_latent", "max_upscale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")

    @property
    def path(self) -> str:
        return latents_path(self.name, self.resolution)

    @property
    def resample(self) -> Image.Resampling:
        """The interpolation, as Pillow names it."""
        return Image.Resampling[self.resolved_interpolation.upper()]

    @property
    def resolved_interpolation(self) -> Interpolation:
        return self.interpolation or PUBLISHED_INTERPOLATION.get(self.resolution, "bicubic")

    def at(self, resolution: int) -> "ExtractConfig":
        """The same configuration for another resolution, with batches of about as many pixels."""
        batch_size = max(1, round(self.batch_size * (self.resolution / resolution) ** 2))
        return replace(self, resolution=resolution, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """A text encoder, how it is prompted, and whose captions it reads.

    Args:
        name: of the folder under caption_embeds/.
        text_encoder: any decoder-only transformers model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        captioners: whose captions are embedded, each into a table of its own, caption_embeds/<name>/<captioner>: names of
            tables under captions/; "original" are the captions that came with the images.
        prompts: the instruction before every caption, the tokens at which captions are cut, and whether they are lower-cased.
        attn_implementation: "sdpa", which training uses too, ignores Gemma-2's soft-capping; "eager" applies it.
        compute_dtype: of the text encoder.
        dtype: of the stored embeddings.
        batch_size: captions in one call; changes no value, and is halved where memory is not enough.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the captions is refused.
    """

    NO_VALUE: ClassVar = ("name", "captioners", "batch_size", "device", "resources", "max_reject_share")

    name: str
    text_encoder: str
    captioners: tuple[str, ...]
    prompts: TextEncoderConfig = NVLABS_PROMPTS
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    batch_size: int = 128
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.01

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        check_captioners(self.captioners)
