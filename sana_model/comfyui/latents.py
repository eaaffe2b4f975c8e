"""Nodes between pictures and latents: empty latents, encode, decode. Latents leave them as the autoencoder gives them."""

from typing import Any

import torch
from torch import Tensor

from sana_model.arguments import nearest_multiple
from sana_model.comfyui.host import bring_part
from sana_model.comfyui.loaders import CATEGORY
from sana_model.comfyui.model import MODEL, Model
from sana_model.comfyui.tensors import from_pictures, to_masks, to_pictures
from sana_model.pictures import StartPictures, decode_values, encode_pictures

MAX_SIDE = 16384


class SanaEmptyLatent:
    """Where a drawing from noise alone begins: a size and a number of pictures."""

    DESCRIPTION = "The size and number of the pictures to draw."
    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 0, "min": 0, "max": MAX_SIDE, "step": 8, "tooltip": "In pixels; 0: what the model was made for."}
        return {
            "required": {
                "model": (MODEL,),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def generate(self, model: Model, width: int, height: int, batch_size: int) -> tuple[dict[str, Tensor]]:
        pipeline = model.loaded.pipeline
        sides = (side // pipeline.autoencoder.compression for side in pipeline.image_size(height or None, width or None))
        return ({"samples": torch.zeros(batch_size, pipeline.transformer.config.in_channels, *sides)},)


class SanaEncode:
    """A picture as latents to start from, with a mask if only a part is to be drawn anew."""

    DESCRIPTION = (
        "Encodes pictures to start from. With a mask only what is white is drawn anew. Sides are cut to what the model takes: "
        "pixels and mask are given on as cut, to put back what stays with ImageCompositeMasked."
    )
    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "IMAGE", "MASK"), ("latent", "pixels", "mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pixels": ("IMAGE",), "model": (MODEL,)},
            "optional": {"mask": ("MASK", {"tooltip": "White is drawn anew, black stays; gray blends."})},
        }

    def encode(self, pixels: Tensor, model: Model, mask: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        pipeline = model.loaded.pipeline
        images = to_pictures(pixels)
        masks = None if mask is None else to_masks(mask, images[0].size, len(images))
        start = StartPictures.check(images, masks, None, len(images))
        assert start is not None
        unit = pipeline.autoencoder.compression * pipeline.transformer.config.patch_size
        start = start.resized(*(nearest_multiple(side, unit) for side in start.size))
        bring_part(model.loaded.autoencoder)
        latents = encode_pictures(pipeline.autoencoder, start.images).float() / model.loaded.latent_scale
        latent = {"samples": latents.cpu()}
        fitted = from_pictures(start.images)
        if start.masks is None:
            return latent, fitted, torch.ones(fitted.shape[:3])
        fitted_mask = from_pictures(start.masks)
        return {**latent, "noise_mask": fitted_mask[:, None]}, fitted, fitted_mask


class SanaDecode:
    """Latents as pictures."""

    DESCRIPTION = "Decodes latents. Large pictures are decoded in tiles, whose edges are blended."
    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tiles = "In pixels, a multiple of 32; smaller tiles take less memory. 0: tiles only above 2048 x 2048 pixels."
        return {
            "required": {
                "samples": ("LATENT",),
                "model": (MODEL,),
                "tile_size": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 32, "tooltip": tiles}),
                "overlap": (
                    "INT",
                    {"default": 0, "min": 0, "max": 4096, "step": 32, "tooltip": "In pixels; 0: an eighth of a tile."},
                ),
            }
        }

    def decode(self, samples: dict[str, Any], model: Model, tile_size: int, overlap: int) -> tuple[Tensor]:
        bring_part(model.loaded.autoencoder)
        latents = samples["samples"] * model.loaded.latent_scale
        decoded = decode_values(
            model.loaded.pipeline.autoencoder, latents, tile_size=tile_size or None, tile_overlap=overlap or None
        )
        return (torch.cat([values.permute(0, 2, 3, 1).cpu() for values in decoded]),)
