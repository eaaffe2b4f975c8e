"""Configuration of the training of a DC-AE. The three published phases are in `jobs/configs/dc-ae/`."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pipelines.score.config import ImageFilter
from pipelines.tables.schema import check_folder_name
from pipelines.train.engine.config import OptimConfig
from pipelines.train.loop.config import LoopConfig
from sana_model.nn.config import AUTOENCODER_PRESETS, AutoencoderConfig, DecoderVariant, Variant

Part = Literal["all", "encoder", "decoder", "encoder.project_out", "decoder.project_in", "decoder.project_out"]
"""Weights that can be trained apart, by efficientvit's names: "encoder.project_out" is the encoder's last convolution,
"decoder.project_in" the decoder's first one, "decoder.project_out" the decoder's head, its last norm and convolution."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """Fields of an autoencoder's shape that replace those of the preset, see `AutoencoderConfig`. None: unchanged."""

    latent_channels: int | None = None
    widths: tuple[int, ...] | None = None
    encoder_depths: tuple[int, ...] | None = None
    decoder_depths: tuple[int, ...] | None = None
    variant: Variant | None = None
    decoder_variant: DecoderVariant | None = None
    residual: bool | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The images table of one dataset.

    Args:
        dataset_uri: the dataset; None: the training's own.
        times: how often each image is drawn in an epoch, each time with another crop.
    """

    dataset_uri: str | None = None
    times: int = 1

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times={self.times} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Which crops of which images are drawn.

    Args:
        sources: the images tables; empty: that of the training's own dataset.
        sizes: sides of the square crops in pixels; each step has one of them, drawn by chance.
        scale: the least and the largest side of a crop before it is resized, as a share of the image's shorter side.
        flip: mirror every other crop.
        max_upscale: a crop is enlarged by this factor at most; images that are too small for it are passed over.
        image_filters: limits on the scores of images, by the name of a table under image_scores/: {aesthetic: {min: 5.0}}.
        held_out_share: share of images, chosen by their ids, that are kept for `validation` and never trained on.
        shuffle_shards: number of shards that are held in memory together and shuffled row by row.
        decode_processes: processes of each worker that decode ahead of the device; 0: its reading thread decodes.
        prefetch: number of micro-batches prepared ahead; changes no value.
    """

    NO_VALUE: ClassVar = ("decode_processes", "prefetch")

    sources: tuple[ImageSource, ...] = ()
    sizes: tuple[int, ...] = (256,)
    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    max_upscale: float = 1.0
    image_filters: dict[str, ImageFilter] = field(default_factory=dict)
    held_out_share: float = 0.0
    shuffle_shards: int = 2
    decode_processes: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
        for name in self.image_filters:
            check_folder_name("image_filters", name)
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be one or more sides of crops in pixels")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale} must be two shares above 0 and up to 1, the lesser first")
        if self.max_upscale < 1:
            raise ValueError(f"max_upscale={self.max_upscale} must be at least 1 (crops are never enlarged)")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share} must be at least 0 and below 1")
        for name, least in (("shuffle_shards", 1), ("prefetch", 1), ("decode_processes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def all_sources(self) -> tuple[ImageSource, ...]:
        """The images tables, at least one."""
        return self.sources or (ImageSource(),)


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """A loss on features of a frozen network in place of pixels.

    Args:
        model: a vision model of transformers: a folder, a hub id, or a zoo://, hf:// or fsspec URI; of a model of pictures and
            texts its vision tower. Or, with kind "lpips", torchvision's weights of VGG-16 (vgg16-397923af.pth).
        kind: "features": the mean square difference of the unit features of the chosen layers. "lpips": LPIPS (arXiv
            1801.03924), by the package `lpips` (`pip install "sana-on-ray[lpips]"`).
        revision: of a hub id.
        layers: of "features": the hidden states that count, such as [2, 4, 8]; empty: all.
        weight: factor of the loss.
    """

    model: str
    kind: Literal["features", "lpips"] = "features"
    revision: str | None = None
    layers: tuple[int, ...] = ()
    weight: float = 0.25

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; without this loss leave it out altogether")
        if self.kind == "lpips" and self.layers:
            raise ValueError(f"layers={self.layers}: LPIPS has its own layers")


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A PatchGAN (arXiv 1611.07004) with the hinge loss, which learns to tell decoded crops from real ones.

    Args:
        weight: factor of the autoencoder's adversarial loss.
        adaptive: multiply it, for each micro-batch, with the ratio of the norms that the gradients of the other losses and of
            this one have in the decoder's last convolution (VQGAN, arXiv 2012.09841).
        start_step: the step from which on the autoencoder gets the loss.
        warm_start_steps: the discriminator alone learns for so many steps before `start_step`.
        layers: strided convolutions of the discriminator; 3 see patches of 70 pixels.
        width: channels of the first one.
        optim: the discriminator's optimizer.
    """

    weight: float = 0.5
    adaptive: bool = False
    start_step: int = 0
    warm_start_steps: int = 0
    layers: int = 3
    width: int = 64
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5.4e-5, betas=(0.5, 0.9)))

    def __post_init__(self) -> None:
        self.optim.check_sharding(0)
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; without this loss leave it out altogether")
        for name, least in (("start_step", 0), ("warm_start_steps", 0), ("layers", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.warm_start_steps > self.start_step:
            raise ValueError(
                f"warm_start_steps={self.warm_start_steps} must be at most start_step={self.start_step}: they are the steps "
                "before it in which the discriminator alone learns; raise start_step"
            )

    @property
    def smallest_crop(self) -> int:
        """The least side in pixels of a crop of which the discriminator judges at least one patch."""
        side = 1
        for stride in (1, 1, *[2] * self.layers):  # from the last convolution of 4x4 back to the first, each padded by 1
            side = (side - 1) * stride + 2
        return side


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss is the sum of these parts, each times its factor.

    Args:
        l1: factor of the mean absolute error.
        l2: factor of the mean square error, whose gradients grow with the error: small objects in strong colors are learned
            long before the mean absolute error alone makes the decoder draw them.
        edges: factor of the mean absolute error of the differences of neighboring pixels.
        perceptual: a loss on features; null: none.
        adversarial: the loss of a discriminator; null: none.
        latent_noise: deviation of noise that is added to the unscaled latents, so that the decoder bears inexact ones.
        latent_penalty: factor of a penalty on a mean square of the unscaled latents above 1, without which their scale grows
            until the noise has no effect.
    """

    l1: float = 1.0
    l2: float = 0.0
    edges: float = 0.0
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    latent_noise: float = 0.0
    latent_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "edges", "latent_noise", "latent_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.l1 + self.l2 + self.edges <= 0 and self.perceptual is None:
            raise ValueError("l1, l2, edges and perceptual are all left out: nothing asks the decoder for the picture")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Fixed pictures: the center squares of the first images that are held out, on which the average weights are measured.

    Args:
        dataset_uri: take them from this dataset's images table; None: those of the training's tables that
            `data.held_out_share` holds out. If that is 0 nothing is measured, and the pictures are ones that are trained on.
        every: steps between two measurements; the last step has one too.
        num_images: how many pictures there are. The scale of the latents is measured on them too.
        size: side of the pictures in pixels; None: the largest of `data.sizes`.
        grid: how many of them are shown with their reconstructions, on a grid with each measurement; 0: none.
    """

    dataset_uri: str | None = None
    every: int = 1000
    num_images: int = 64
    size: int | None = None
    grid: int = 8

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("num_images", 1), ("grid", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def check_side(shape: AutoencoderConfig, name: str, *sides: int) -> None:
    """Raise ValueError if pictures with one of these sides, in pixels, have no whole latents. `name`: the setting's."""
    factor = shape.compression
    if bad := [side for side in sides if side < 1 or side % factor]:
        raise ValueError(
            f"{name}: {bad[0]} pixels do not divide by {factor}, the autoencoder's factor: take a multiple, such as "
            f"{max(round(bad[0] / factor), 1) * factor}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig(LoopConfig):
    """A training of a DC-AE on images tables.

    Args:
        init: the autoencoder to start from: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' or efficientvit's
            weights. `python -m jobs.zoo published` lists the published ones. None: a new one of `preset`.
        preset: without `init`, the shape of a new autoencoder, such as dc-ae-f32c32-sana-1.1.
        shape: fields that replace those of the preset; with `init`, what its shape must be.
        parts: the weights that are trained.
        data: the crops.
        losses: the loss.
        latent_channels: each step keeps only the first channels of the latents, as many as one of these numbers, drawn by
            chance, so that the first ones hold the most (DC-AE 1.5, arXiv 2508.00413). Empty: all channels in all steps.
        scaling_factor: of the latents; None: measured at the end if the encoder is trained, otherwise as it was.
        validation: fixed pictures.
        seed: seed of the order of images, of crops, noise and channels, and of new weights.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (*LoopConfig.NO_VALUE, "validation")

    init: str | None = None
    preset: str | None = None
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    parts: tuple[Part, ...] = ("all",)
    data: CropConfig = field(default_factory=CropConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    latent_channels: tuple[int, ...] = ()
    scaling_factor: float | None = None
    validation: PictureConfig = field(default_factory=PictureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init is None) == (self.preset is None):
            raise ValueError(
                f"init={self.init}, preset={self.preset}: give one: an autoencoder to go on from, or a shape to begin with"
            )
        if not self.parts:
            raise ValueError("parts=[] is empty: there is nothing to train")
        if self.preset is not None and self.preset not in AUTOENCODER_PRESETS:
            raise ValueError(f"preset={self.preset} is none of {', '.join(AUTOENCODER_PRESETS)}")
        if self.preset is not None and not (self.trains("encoder") and self.trains("decoder")):
            raise ValueError(
                f"parts={self.parts} with preset={self.preset}: a new autoencoder is trained as a whole; give init"
            )
        if self.preset is not None:
            self.check_shape(self.new_shape())
        if self.engine.zero_stage == 3:
            raise ValueError("engine.zero_stage=3: an autoencoder's weights are few; take 0, 1 or 2")
        if self.keep_best == "validation_loss" and not self.holds_out:
            raise ValueError("keep_best=validation_loss needs validation.dataset_uri or data.held_out_share")
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor={self.scaling_factor} must be positive")
        if (adversarial := self.losses.adversarial) is not None:
            self._check_adversarial(adversarial)

    def _check_adversarial(self, adversarial: AdversarialConfig) -> None:
        if min(self.data.sizes) < adversarial.smallest_crop:
            raise ValueError(
                f"data.sizes={self.data.sizes}: a discriminator of layers={adversarial.layers} needs crops of "
                f"{adversarial.smallest_crop} pixels at least; take larger crops, or fewer losses.adversarial.layers"
            )
        if adversarial.adaptive and not self.trains("decoder.project_out"):
            raise ValueError(
                f"losses.adversarial.adaptive with parts={self.parts}: it looks at gradients of the decoder's last "
                "convolution, which is not trained; set adaptive=false, or train decoder.project_out"
            )

    def trains(self, part: Part) -> bool:
        """Whether a part's weights are trained, by its own name or within another part."""
        return any(name in ("all", part, part.partition(".")[0]) for name in self.parts)

    @property
    def trains_encoder(self) -> bool:
        """Whether the training changes latents."""
        return any(name == "all" or name.startswith("encoder") for name in self.parts)

    @property
    def holds_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return self.validation.dataset_uri is not None or self.data.held_out_share > 0

    @property
    def picture_size(self) -> int:
        """Side of the fixed pictures in pixels."""
        return self.validation.size or max(self.data.sizes)

    def new_shape(self) -> AutoencoderConfig:
        """The shape of a new autoencoder of `preset`. Raises ValueError if it does not fit together."""
        assert self.preset is not None
        return replace(AUTOENCODER_PRESETS[self.preset], **self.shape.overrides)

    def check_shape(self, found: AutoencoderConfig) -> None:
        """Raise ValueError if the autoencoder has another shape than `shape` says, or does not fit sizes and channels."""
        for name, wanted in self.shape.overrides.items():
            if (there := getattr(found, name)) != wanted:
                raise ValueError(
                    f"shape.{name}={wanted}, and init={self.init} has {there}: leave shape.{name} out to go on from it, or "
                    "begin anew with a preset"
                )
        check_side(found, "data.sizes", *self.data.sizes)
        check_side(found, "validation.size", self.picture_size)
        if bad := [count for count in self.latent_channels if not 0 < count <= found.latent_channels]:
            raise ValueError(f"latent_channels={bad[0]} must be from 1 to {found.latent_channels}, which the autoencoder has")
