"""Shapes of the models, and how captions become tokens: the published configurations, without torch."""

from dataclasses import dataclass, replace
from typing import Literal

LINEAR_HEAD_DIM = 32  # of the transformer
ATTENTION_HEAD_DIM = 32  # of the autoencoder


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    """Shape of a linear DiT; the presets are the published ones (FFN 2.5x, linear heads of 32)."""

    dim: int = 1152
    depth: int = 28
    num_cross_heads: int = 16
    ffn_dim: int = 2880
    in_channels: int = 32
    patch_size: int = 1
    caption_dim: int = 2304
    qk_norm: bool = False
    cross_qk_norm: bool = False
    position_scale: float | None = None
    """Interpolation scale of the sincos positional embedding; None: no positional embedding (512 and 1024 px)."""
    base_size: int = 32
    """Side, in tokens, of the square grid that the model was made for; only the positional embedding reads it."""

    def __post_init__(self) -> None:
        if self.dim % LINEAR_HEAD_DIM or self.dim % self.num_cross_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of the linear head size {LINEAR_HEAD_DIM} "
                f"and of num_cross_heads={self.num_cross_heads}"
            )
        if self.position_scale is not None and self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 for a positional embedding")

    @property
    def num_heads(self) -> int:
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


Variant = Literal["in", "sana"]
"""The two published families: "in" (f32c32-in, f64c128, f128c512; also called mix) moves pixels to channels to resample,
"sana" strides and interpolates, and adds 5x5 multi-scale attention."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of a DC-AE. A stage halves the resolution; a first stage of depth 0 is folded into the first convolution."""

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    variant: Variant
    scaling_factor: float

    def __post_init__(self) -> None:
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
    def compression(self) -> int:
        """Pixels along one side of a latent."""
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


DEFAULT_TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"
# Complex human instruction: NVlabs, configs/sana_config/512ms/Sana_600M_img512.yaml, `chi_prompt`.
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
    """How a caption becomes tokens. An empty `instruction` means none."""

    instruction: str = COMPLEX_HUMAN_INSTRUCTION
    max_tokens: int = 300
    lowercase: bool = False  # diffusers lower-cases and strips prompts; NVlabs only strips

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1 (published: 300)")


NVLABS_PROMPTS = TextEncoderConfig()
DIFFUSERS_PROMPTS = TextEncoderConfig(instruction=DIFFUSERS_HUMAN_INSTRUCTION, lowercase=True)
