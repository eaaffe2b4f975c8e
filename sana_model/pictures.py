"""Pictures that a drawing starts from (img2img, inpainting): brought to a size, as tensors, and kept where a mask says so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sana_model.arguments import real_number
from sana_model.flow import add_noise
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.finite import check_finite
from sana_model.offload import bring, tile_of
from sana_model.pixels import to_8_bits
from sana_model.solver import PredictVelocity, cut_sigmas, keep_known

MAX_DECODE_PIXELS = 2048**2
"""Most pixels decoded or encoded at once. More pictures than fit are taken in turn, one that does not fit in tiles."""

DECODE_TILE = 1024
"""Side of a tile, in pixels."""

Pictures = Image.Image | Sequence[Image.Image]
"""One picture for all prompts, or one for each."""

ControlPictures = Pictures | Tensor
"""Control pictures, or their latents (1 or B, C, h, w) as the autoencoder encodes them."""

DEFAULT_STRENGTH = 0.6
"""Share of the way that is drawn anew if a picture comes with neither a strength nor a mask."""


def default_strength(*, with_mask: bool) -> float:
    """The strength of a picture that comes without one: what a mask leaves free is drawn anew altogether."""
    return 1.0 if with_mask else DEFAULT_STRENGTH


@dataclass(frozen=True)
class StartPictures:
    """The pictures that a drawing starts from: one for all prompts, or one for each. Upright, RGB."""

    images: list[Image.Image]
    masks: list[Image.Image] | None
    """Gray, of the sizes of `images`: black where the picture stays as it is. None: it is drawn anew everywhere."""
    strength: float

    @classmethod
    def check(
        cls, image: Pictures | None, mask: Pictures | None, strength: float | None, num_prompts: int
    ) -> "StartPictures | None":
        """Check the arguments of `TextToImage`; None if there is no picture.

        Raises ValueError for a mask or a strength without a picture, a strength out of 0 to 1, another number of pictures than
        of prompts, a mask of another size than its picture, and values of 16 bits or floats out of their range. Raises
        TypeError for what is no PIL image.
        """
        if image is None:
            if mask is not None or strength is not None:
                name = "a mask" if mask is not None else f"strength={strength}"
                raise ValueError(f"{name} came without a picture: give image= too")
            return None
        images = [_upright(one).convert("RGB") for one in _listed("pictures", image, num_prompts)]
        masks = None if mask is None else [_upright(one).convert("L") for one in _listed("masks", mask, num_prompts)]
        if masks is not None:
            masks, images = _pair(masks, images)
        if strength is None:
            strength = default_strength(with_mask=mask is not None)
        strength = real_number("strength", strength)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} must be from 0 (the picture stays) to 1 (all is drawn anew)")
        return cls(images, masks, strength)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures, in pixels. Raises ValueError if they differ."""
        return _common_size(self.images)

    def resized(self, height: int, width: int) -> "StartPictures":
        """Scale every picture to cover the size, and cut out its middle; its mask likewise."""
        images = [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in self.images]
        masks = self.masks and [ImageOps.fit(mask, (width, height), Image.Resampling.BILINEAR) for mask in self.masks]
        return StartPictures(images, masks, self.strength)

    def latent_mask(self, factor: int) -> Tensor | None:
        """The masks as bool (B, 1, H/f, W/f): True where any of a latent's f x f pixels is not black."""
        if self.masks is None:
            return None
        values = torch.from_numpy(np.stack([np.asarray(mask) for mask in self.masks]))[:, None]
        return F.max_pool2d(values.float(), factor) > 0

    def copies(self, count: int) -> list[Image.Image]:
        """The pictures themselves, each for all drawings of its prompt, `count` in all."""
        return [image.copy() for image in self.images for _ in range(count // len(self.images))]

    def encode(self, autoencoder: DCAutoencoder, count: int) -> "StartLatents | None":
        """Encode the pictures, which have the right size, for `count` drawings, a multiple of their number; None if they make
        no difference to what is drawn."""
        if self.strength == 1 and self.masks is None:
            return None
        each = count // len(self.images)
        mask = self.latent_mask(autoencoder.compression)
        known = encode_pictures(autoencoder, self.images).repeat_interleave(each, 0)
        return StartLatents(known, None if mask is None else mask.repeat_interleave(each, 0), self.strength)

    def keep(self, drawn: list[Image.Image]) -> list[Image.Image]:
        """Put back, pixel for pixel, what is black in the masks; gray blends. Picture i of `drawn` belongs to prompt
        i // (number of drawn pictures for a prompt)."""
        if self.masks is None:
            return drawn
        each = len(drawn) // len(self.images)
        pairs = [(image, mask) for image, mask in zip(self.images, self.masks, strict=True) for _ in range(each)]
        return [Image.composite(new, image, mask) for new, (image, mask) in zip(drawn, pairs, strict=True)]


@dataclass(frozen=True)
class StartLatents:
    """What a drawing starts from, as scaled latents `known` (B, C, h, w).

    mask: bool (B, 1, h, w), True where it is drawn anew; None: everywhere. strength: above 0, at most 1; at 1 the drawing
    starts from noise alone.
    """

    known: Tensor
    mask: Tensor | None
    strength: float

    def begin(self, predict_velocity: PredictVelocity, noise: Tensor, sigmas: Tensor) -> tuple[PredictVelocity, Tensor, Tensor]:
        """What a solver takes in place of the arguments, which are those of a drawing from `noise` (B, C, h, w) alone."""
        known = self.known.to(noise)
        if self.mask is not None:
            predict_velocity = keep_known(predict_velocity, known, self.mask.to(noise.device))
        if self.strength == 1:
            return predict_velocity, noise, sigmas
        sigmas = cut_sigmas(sigmas, self.strength)
        return predict_velocity, add_noise(known, noise, sigmas[:1].to(noise.device).expand(len(noise))), sigmas


@dataclass(frozen=True)
class GuidePictures:
    """Control pictures, one for all prompts or one for each: upright RGB images, or their latents."""

    pictures: list[Image.Image] | Tensor
    autoencoder: DCAutoencoder

    @classmethod
    def check(
        cls, given: ControlPictures | None, num_prompts: int, autoencoder: DCAutoencoder, controlnet: SanaControlNet | None
    ) -> "GuidePictures | None":
        """Check the argument of `TextToImage`; None if there is no control picture.

        Raises ValueError without a ControlNet, for another number of pictures than of prompts, and for values of 16 bits or
        floats out of their range, or latents that are not finite. Raises TypeError for what is no PIL image.
        """
        if given is None:
            return None
        if controlnet is None:
            raise ValueError("a control picture came, and the pipeline has no ControlNet: load it with controlnet=")
        if not isinstance(given, Tensor):
            images = [_upright(one).convert("RGB") for one in _listed("control pictures", given, num_prompts)]
            return cls(images, autoencoder)
        channels = autoencoder.config.latent_channels
        if given.ndim != 4 or len(given) not in (1, num_prompts) or given.shape[1] != channels:
            raise ValueError(f"control latents have shape {tuple(given.shape)}: give (1 or {num_prompts}, {channels}, h, w)")
        if not bool(torch.isfinite(given).all()):
            raise ValueError("control latents hold values that are not finite: encode the control picture anew")
        return cls(given, autoencoder)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels. Raises ValueError if pictures have several sizes."""
        if isinstance(self.pictures, Tensor):
            factor = self.autoencoder.compression
            return self.pictures.shape[2] * factor, self.pictures.shape[3] * factor
        return _common_size(self.pictures)

    def encode(self, height: int, width: int) -> Tensor:
        """Latents (1 or B, C, h, w), on the autoencoder's device. Pictures are scaled to cover the size, and cut to it.

        Raises ValueError if latents were given, of another size.
        """
        if not isinstance(self.pictures, Tensor):
            fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in self.pictures]
            return encode_pictures(self.autoencoder, fitted)
        if self.size != (height, width):
            given = f"{self.size[0]}x{self.size[1]}"
            raise ValueError(f"control latents are of pictures of {given} px, and {height}x{width} is to be drawn")
        return self.pictures.to(self.autoencoder.decoder.conv_in.weight.device)


def encode_pictures(autoencoder: DCAutoencoder, images: Sequence[Image.Image]) -> Tensor:
    """Encode B RGB pictures of one size to scaled latents (B, C, h, w), in the autoencoder's dtype. Raises NotFiniteError."""
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    bring(autoencoder)
    weight = autoencoder.decoder.conv_in.weight
    tile_size, at_once = _split(values.shape[-2] * values.shape[-1], tile_of(autoencoder))
    chunks = (values.float() / 127.5 - 1).to(weight.device, weight.dtype).split(at_once)
    latents = torch.cat([autoencoder.encode(chunk, tile_size=tile_size) for chunk in chunks])
    check_finite(latents, autoencoder.encoder, "encoder of the autoencoder")
    return latents


def decode_pictures(autoencoder: DCAutoencoder, latents: Tensor) -> list[Image.Image]:
    """Decode scaled latents (B, C, h, w) to B RGB pictures. Raises NotFiniteError."""
    images: list[Image.Image] = []
    for values in decode_values(autoencoder, latents):
        images += [Image.fromarray(value) for value in (values * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
    return images


def decode_values(
    autoencoder: DCAutoencoder, latents: Tensor, *, tile_size: int | None = None, tile_overlap: int | None = None
) -> Iterator[Tensor]:
    """Decode scaled latents (B, C, h, w), as many at once as memory bounds: values (b, 3, H, W) in [0, 1], float32.

    The latents may be on any device; the values are on the autoencoder's.

    `tile_size` and `tile_overlap`: as in `DCAutoencoder.decode`; None: tiles only where a picture is large.

    Raises NotFiniteError, and ValueError for tiles of another size than `DCAutoencoder.decode` takes.
    """
    bring(autoencoder)
    weight = autoencoder.decoder.conv_in.weight
    own_size, at_once = _split(latents.shape[-2] * latents.shape[-1] * autoencoder.compression**2, tile_of(autoencoder))
    for chunk in latents.to(weight.device, weight.dtype).split(at_once):
        decoded = autoencoder.decode(chunk, tile_size=tile_size or own_size, tile_overlap=tile_overlap).float()
        check_finite(decoded, autoencoder.decoder, "decoder of the autoencoder")
        yield (decoded / 2 + 0.5).clamp(0, 1)


def _split(pixels: int, tile: int | None) -> tuple[int | None, int]:
    """For a picture of so many pixels: the side of its tiles (None: in one piece), and how many are taken at once.

    `tile`: the most pixels at once are those of such a tile; None: MAX_DECODE_PIXELS.
    """
    most = tile**2 if tile else MAX_DECODE_PIXELS
    return ((tile or DECODE_TILE) if pixels > most else None), max(most // pixels, 1)


def _listed(name: str, pictures: Pictures, num_prompts: int) -> list[Image.Image]:
    listed: list[Any] = [pictures]
    if isinstance(pictures, Sequence) and not isinstance(pictures, str):
        listed = list(pictures)
    for one in listed:
        if not isinstance(one, Image.Image):
            raise TypeError(
                f"{name} must be PIL images, and a {type(one).__name__} came: PIL.Image.open makes one of a file, "
                "PIL.Image.fromarray of an array"
            )
    if len(listed) not in (1, num_prompts) or not listed:
        raise ValueError(f"{len(listed)} {name} came with {num_prompts} prompts: give one for all, or one to each")
    return listed


def _common_size(images: list[Image.Image]) -> tuple[int, int]:
    sizes = {image.size: None for image in images}
    if len(sizes) > 1:
        several = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise ValueError(f"the pictures have several sizes ({several}): give height and width")
    return images[0].height, images[0].width


def _pair(masks: list[Image.Image], images: list[Image.Image]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Masks and pictures in equal number: one of either goes with all of the other."""
    count = max(len(masks), len(images))
    masks, images = (pictures * (count // len(pictures)) for pictures in (masks, images))
    for mask, image in zip(masks, images, strict=True):
        if mask.size != image.size:
            raise ValueError(
                f"a mask of {mask.width}x{mask.height} came with a picture of {image.width}x{image.height}: "
                "they must have the same size"
            )
    return masks, images


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, as cameras write it, scale 16 bits and floats to 8 bits, and put transparency on white."""
    image = to_8_bits(ImageOps.exif_transpose(image))
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas
