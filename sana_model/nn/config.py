"""Configurations of the transformer, the autoencoder and the text encoder, the published ones by name. Imports no torch."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

NUM_TRAIN_TIMESTEPS = 1000
"""A timestep is the noise level sigma times this."""

TimeInput = Literal["continuous", "whole", "unit"]
"""How a noise level enters the time embedding of weights.

"continuous": as 1000 sigma, the default of trainings here. "whole": as 1000 sigma without its fraction, as NVlabs' code trains
and draws, and diffusers draws, with all published models but Sana-Sprint. "unit": as sigma itself, from 0 to 1 (Sana-Sprint and
its teachers).
"""

NullCaption = Literal["own_mask", "caption_mask"]
"""What weights see in place of a caption that is dropped in training, or that guidance leads away from.

"own_mask": the real tokens of the null caption, of which there is one; the default of trainings here, and how diffusers draws.
"caption_mask": the null caption padded to as many tokens as the caption has, as NVlabs' code trains and draws; padding counts
like any token then.
"""

LINEAR_HEAD_DIM = 32
"""Width of a head of the transformer's linear attention."""

ATTENTION_HEAD_DIM = 32
"""Width of a head of the autoencoder's linear attention."""


MOST_LAYERS = 1000
LARGEST_SIZE = 2**20


def check_sizes(*, least: int = 1, most: int, **sizes: int) -> None:
    """Raise ValueError for a size that no model has: building one would take hours, or more memory than there is."""
    for name, size in sizes.items():
        if type(size) is not int or not least <= size <= most:
            raise ValueError(f"{name}={size!r} must be a whole number from {least} to {most}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError for what is no finite number above 0."""
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    """Shape of a linear DiT. The defaults are those of Sana-0.6B.

    dim: width of a token. ffn_dim: width of the Mix-FFN, 2.5 dim in all published models. in_channels: of the latents.
    patch_size: side of the square of latents that makes one token. caption_dim: width of the text encoder.
    qk_norm, cross_qk_norm: RMSNorm on queries and keys of self- and cross-attention (Sana 1.5, Sana-Sprint).
    caption_norm: RMSNorm on the projected caption, which all published models have.
    guidance_embeds: the guidance scale is an input too (Sana-Sprint).

    Raises ValueError if dim does not divide into the heads, or, with a positional embedding, by 4; or for an unknown input.
    """

    dim: int = 1152
    depth: int = 28
    num_cross_heads: int = 16
    ffn_dim: int = 2880
    in_channels: int = 32
    patch_size: int = 1
    caption_dim: int = 2304
    qk_norm: bool = False
    cross_qk_norm: bool = False
    caption_norm: bool = True
    guidance_embeds: bool = False
    position_scale: float | None = None
    """Interpolation scale of the sine-cosine positional embedding. None: no positional embedding, as at 512 and 1024 px."""
    base_size: int = 32
    """Side, in tokens, of the square image that the model was made for. Sets the positional embedding and the default size."""
    time_input: TimeInput = "continuous"
    """How the weights were trained to see the noise level."""
    null_caption: NullCaption = "own_mask"
    """What the weights were trained to see for a dropped caption."""

    def __post_init__(self) -> None:
        check_sizes(depth=self.depth, most=MOST_LAYERS)
        names = ("dim", "num_cross_heads", "ffn_dim", "in_channels", "patch_size", "caption_dim", "base_size")
        check_sizes(**{name: getattr(self, name) for name in names}, most=LARGEST_SIZE)
        for name, choices in (("time_input", get_args(TimeInput)), ("null_caption", get_args(NullCaption))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        if self.dim % LINEAR_HEAD_DIM or self.dim % self.num_cross_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of the linear head size {LINEAR_HEAD_DIM} "
                f"and of num_cross_heads={self.num_cross_heads}"
            )
        if self.position_scale is not None:
            check_positive("position_scale", self.position_scale)
        if self.position_scale is not None and self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 for a positional embedding")

    @property
    def num_heads(self) -> int:
        """Heads of the linear attention."""
        return self.dim // LINEAR_HEAD_DIM


_SANA_1_6B = SanaConfig(dim=2240, depth=20, num_cross_heads=20, ffn_dim=5600)
PRESETS: dict[str, SanaConfig] = {
    "sana-0.6b": SanaConfig(),
    "sana-1.6b": _SANA_1_6B,
    "sana-1.6b-2k": replace(_SANA_1_6B, position_scale=1.0, base_size=64),
    "sana-1.6b-4k": replace(_SANA_1_6B, position_scale=2.0, base_size=128),
    "sana-4.8b": replace(_SANA_1_6B, depth=60, qk_norm=True, cross_qk_norm=True),
    "shapes": SanaConfig(
        dim=128, depth=6, num_cross_heads=4, ffn_dim=320, in_channels=8, caption_dim=64, position_scale=1.0, base_size=8
    ),
    "tiny": SanaConfig(dim=64, depth=2, num_cross_heads=4, ffn_dim=160, in_channels=8, caption_dim=64, base_size=8),
}
"""Transformers by name. "shapes" is the one in `zoo/pipeline`, "tiny" is for tests."""


ControlForm = Literal["nvlabs", "diffusers"]
"""Which of two functions a ControlNet computes, see `nn.controlnet`: each is to be used with weights trained with it."""


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(SanaConfig):
    """Shape of a ControlNet: that of the transformer whose first `depth` blocks it has copies of.

    Raises ValueError as `SanaConfig`, and for an unknown form.
    """

    depth: int = 7
    form: ControlForm

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(ControlForm):
            raise ValueError(f"form={self.form!r} must be one of {', '.join(get_args(ControlForm))}")


Variant = Literal["in", "sana"]
"""The two published families of DC-AE.

"in" (f32c32-in, f64c128, f128c512, and their mix versions) resamples by moving pixels to channels and back. "sana" resamples by
strided convolution and interpolation, and has multi-scale attention with a 5x5 kernel.
"""

DecoderVariant = Literal["in", "sana", "lite"]
"""The published families of DC-AE's decoders: those of the autoencoders, and "lite".

"lite" (DC-AE-Lite) has residual blocks in all stages and moves channels to pixels. It decodes what encoders of "sana" encode.
"""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of a DC-AE (arXiv 2410.10733). `widths` and depths have one entry per resolution, the finest first.

    Each stage after the first halves the resolution. Where the first stage has depth 0, the first convolution halves the
    resolution at once. scaling_factor: scaled latents are the encoder's output times this.

    Raises ValueError if the lists differ in length, or a width does not fit the one before it or the attention heads.
    """

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    variant: Variant
    scaling_factor: float
    decoder_variant: DecoderVariant | None = None
    """None: that of `variant`."""
    residual: bool = True
    """Whether there are the shortcuts from space to channels and back, which all published models have. For comparisons."""

    def __post_init__(self) -> None:
        check_positive("scaling_factor", self.scaling_factor)
        for index, (width, *depths) in enumerate(zip(self.widths, self.encoder_depths, self.decoder_depths, strict=False)):
            check_sizes(**{f"widths[{index}]": width}, latent_channels=self.latent_channels, most=LARGEST_SIZE)
            named = zip(("encoder", "decoder"), depths, strict=True)
            check_sizes(**{f"{name}_depths[{index}]": depth for name, depth in named}, least=0, most=MOST_LAYERS)
        if not len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths) > 1:
            raise ValueError(
                f"widths {self.widths}, encoder_depths {self.encoder_depths} and decoder_depths {self.decoder_depths} "
                "must have the same length, 2 or more: one entry for each resolution"
            )
        for width, following in zip(self.widths, self.widths[1:], strict=False):
            if following not in (width, 2 * width, 4 * width):
                raise ValueError(f"widths {self.widths}: each must be 1, 2 or 4 times the one before it")
        for width in self.widths[3:]:
            if width % ATTENTION_HEAD_DIM:
                raise ValueError(f"widths {self.widths}: from the fourth on they must divide by {ATTENTION_HEAD_DIM}")

    @property
    def decoder(self) -> DecoderVariant:
        """The family of the decoder."""
        return self.decoder_variant or self.variant

    @property
    def compression(self) -> int:
        """Pixels along one side of a latent: 32 for f32."""
        return 2 ** (len(self.widths) - 1)


_IN_F32 = AutoencoderConfig(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(0, 4, 8, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2),
    variant="in",
    scaling_factor=0.3189,
)
_IN_F64 = replace(
    _IN_F32,
    latent_channels=128,
    widths=(*_IN_F32.widths, 2048),
    encoder_depths=(*_IN_F32.encoder_depths, 2),
    decoder_depths=(*_IN_F32.decoder_depths, 2),
    scaling_factor=0.2889,
)
_IN_F128 = replace(
    _IN_F64,
    latent_channels=512,
    widths=(*_IN_F64.widths, 2048),
    encoder_depths=(*_IN_F64.encoder_depths, 2),
    decoder_depths=(*_IN_F64.decoder_depths, 2),
    scaling_factor=0.4883,
)
_SANA = AutoencoderConfig(
    latent_channels=32,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    variant="sana",
    scaling_factor=0.41407,
)
AUTOENCODER_PRESETS: dict[str, AutoencoderConfig] = {
    "dc-ae-f32c32-in-1.0": _IN_F32,
    "dc-ae-f32c32-mix-1.0": replace(_IN_F32, scaling_factor=0.4552),
    "dc-ae-f32c32-sana-1.0": _SANA,
    "dc-ae-f32c32-sana-1.1": _SANA,
    "dc-ae-lite-f32c32-sana-1.1": replace(_SANA, decoder_depths=(0, 3, 5, 4, 4, 4), decoder_variant="lite"),
    "dc-ae-f64c128-in-1.0": _IN_F64,
    "dc-ae-f64c128-mix-1.0": replace(_IN_F64, scaling_factor=0.4538),
    "dc-ae-f128c512-in-1.0": _IN_F128,
    "dc-ae-f128c512-mix-1.0": replace(_IN_F128, scaling_factor=0.3620),
    "tiny": AutoencoderConfig(
        latent_channels=8,
        widths=(16, 32, 32, 64),
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1),
        variant="sana",
        scaling_factor=1.0,
    ),
}
"""Autoencoders by their published names; "tiny" is for tests."""

DEFAULT_AUTOENCODER = "hf://mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
"""The published autoencoder of Sana, for weights that name none."""


DEFAULT_TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"
"""The published text encoder of Sana, for weights that name none."""

# Sana section 2.3; the text is `chi_prompt` in NVlabs, configs/sana_config/512ms/Sana_600M_img512.yaml.
COMPLEX_HUMAN_INSTRUCTION = (
    'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for '
    "image generation. Evaluate the level of detail in the user prompt:\n"
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.\n"
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.\n"
    "Here are examples of how to transform or refine prompts:\n"
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.\n"
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing "
    "street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering "
    "glass skyscrapers.\n"
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:\n"
    "User Prompt: "
)
DIFFUSERS_HUMAN_INSTRUCTION = COMPLEX_HUMAN_INSTRUCTION.replace('"Enhanced prompt"', "'Enhanced prompt'")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """How a caption becomes tokens. The defaults are those of NVlabs' code.

    Raises ValueError if max_tokens is less than 1.
    """

    instruction: str = COMPLEX_HUMAN_INSTRUCTION
    """Text put before every caption; "" for none."""
    max_tokens: int = 300
    """Tokens kept of a caption, the first token of the text included."""
    lowercase: bool = False
    """Lower-case captions, as diffusers does and NVlabs does not. White space around a caption is always removed."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1 (published: 300)")


NVLABS_PROMPTS = TextEncoderConfig()
"""NVlabs' code prepares captions so, in training and in sampling."""

DIFFUSERS_PROMPTS = TextEncoderConfig(instruction=DIFFUSERS_HUMAN_INSTRUCTION, lowercase=True)
"""diffusers' `SanaPipeline` prepares prompts so."""
