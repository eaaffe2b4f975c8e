"""Nodes between the words and the latents: the prompt, what steers it, and the sampler."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.arguments import MAX_SEED
from sana_model.comfyui.host import StepProgress, bring_part, load
from sana_model.comfyui.loaders import CATEGORY
from sana_model.comfyui.model import CONDITIONING, CONTROLNET, MODEL, Conditioning, ControlPictures, LoadedControlNet, Model
from sana_model.comfyui.tensors import to_pictures
from sana_model.drawing import choose_solver, draw_latents
from sana_model.flow import noise_source
from sana_model.guidance import Caption
from sana_model.nn.controlnet import Control
from sana_model.pictures import GuidePictures, StartLatents
from sana_model.solver import SCM, SOLVERS, steps_taken

AUTO = "auto"
"""Name of the sampler that is the model's own."""


class SanaTextEncode:
    """A prompt, and what the picture shall not show, as the text encoder sees them."""

    DESCRIPTION = "Encodes a prompt and a negative prompt with the model's text encoder."
    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = (CONDITIONING,), ("conditioning",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "negative": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "tooltip": "What the picture shall not show; usually empty. Sana-Sprint takes none.",
                    },
                ),
                "complex_human_instruction": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Put the model's instruction text (CHI) before the prompt, as it was trained. The negative "
                        "prompt never has one.",
                    },
                ),
            }
        }

    def encode(self, model: Model, text: str, negative: str, complex_human_instruction: bool) -> tuple[Conditioning]:
        pipeline = model.loaded.pipeline
        bring_part(model.loaded.text_encoder)
        captions = pipeline.encode_prompts([text], use_instruction=complex_human_instruction)
        if (cut := pipeline.describe_cut([text])) is not None:
            warnings.warn(cut, stacklevel=1)
        return (Conditioning(captions, pipeline.encode_null(captions, negative), negative),)


class SanaControlNetApply:
    """A control picture (edges, depth, ...) that says where things are."""

    DESCRIPTION = "Lets a picture of edges, outlines or depth say where things are. Without control_net: the checkpoint's own."
    CATEGORY, FUNCTION = CATEGORY, "apply_controlnet"
    RETURN_TYPES, RETURN_NAMES = (CONDITIONING,), ("conditioning",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": (CONDITIONING,),
                "image": ("IMAGE", {"tooltip": "Ready to be used, as the ControlNet was trained to see it."}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
            },
            "optional": {"control_net": (CONTROLNET,)},
        }

    def apply_controlnet(
        self, conditioning: Conditioning, image: Tensor, strength: float, control_net: LoadedControlNet | None = None
    ) -> tuple[Conditioning]:
        return (replace(conditioning, control=ControlPictures(control_net, to_pictures(image), strength)),)


class SanaSampler:
    """Draws latents, from noise or from others."""

    DESCRIPTION = "Draws. Picture k of a batch has the seed + k. With noise_mask in the latents only what is masked is drawn."
    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "conditioning": (CONDITIONING,),
                "latent_image": ("LATENT",),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
                "steps": ("INT", {"default": 20, "min": 0, "max": 1000, "tooltip": "0: the model's own, 2 for Sana-Sprint."}),
                "cfg": ("FLOAT", {"default": 4.5, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
                "sampler_name": (
                    [AUTO, *SOLVERS, SCM],
                    {
                        "tooltip": "auto: the model's own. flow_dpm_solver takes 14 to 20 steps, flow_euler 28 to 50; "
                        "scm is Sana-Sprint's, 1 to 4."
                    },
                ),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "How much of latent_image is drawn anew; 1: as if it were not there.",
                    },
                ),
            }
        }

    def sample(
        self,
        model: Model,
        conditioning: Conditioning,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        denoise: float,
    ) -> tuple[dict[str, Any]]:
        if denoise == 0:
            return (latent_image,)
        loaded, pipeline = model.loaded, model.loaded.pipeline
        check_latents(latent_image, model)
        known = latent_image["samples"] * loaded.latent_scale
        solver, num_steps = choose_solver(
            None if sampler_name == AUTO else sampler_name,
            steps or None,
            conditioning.negative,
            (0.0, 1.0),
            sprints=pipeline.transformer.config.guidance_embeds,
        )
        control = prepare_control(conditioning.control, model, known.shape)
        (bring_part if control is None else load)(loaded.transformer)  # with a ControlNet room was made before it came
        numbers = latent_image.get("batch_index", range(len(known)))
        with model.adapted():
            drawn = draw_latents(
                pipeline.transformer,
                repeated(conditioning.captions, len(known), pipeline.device),
                conditioning.null and repeated(conditioning.null, len(known), pipeline.device),
                noise_source(known.shape, [(seed + number) % (MAX_SEED + 1) for number in numbers], None, pipeline.device),
                solver=solver,
                num_steps=num_steps,
                flow_shift=pipeline.flow_shift,
                guidance_scale=cfg,
                control=control,
                start=start_latents(known, latent_image.get("noise_mask"), denoise),
                on_estimate=StepProgress(steps_taken(num_steps, denoise), pipeline.device, loaded.colors),
            )
        return ({**latent_image, "samples": (drawn / loaded.latent_scale).cpu()},)


def repeated(caption: Caption, count: int, device: torch.device) -> Caption:
    """One caption for `count` pictures."""
    embeds, mask = (one.to(device).repeat_interleave(count, 0) for one in caption)
    return embeds, mask


def check_latents(latent_image: dict[str, Any], model: Model) -> None:
    """Raise ValueError for latents of another model, such as those of ComfyUI's "Empty Latent Image"."""
    shape, config = tuple(latent_image["samples"].shape), model.loaded.pipeline.transformer.config
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise ValueError(
            f"latent_image has the shape {shape}, and this model draws (batch, {config.in_channels}, height, width): make it "
            "with the nodes Sana Empty Latent or Sana Encode"
        )
    if any(side % config.patch_size for side in shape[2:]):
        raise ValueError(f"latent_image has the shape {shape}: its sides must be multiples of {config.patch_size}")


def start_latents(known: Tensor, noise_mask: Tensor | None, denoise: float) -> StartLatents | None:
    """What the drawing starts from; None: from noise alone.

    Args:
        known: (B, C, h, w), scaled.
        noise_mask: of any size, 0 where `known` stays; a latent is drawn anew if any of its pixels is.
    """
    if noise_mask is None:
        return StartLatents(known, None, denoise) if denoise < 1 else None
    mask = noise_mask.reshape(-1, 1, *noise_mask.shape[-2:]).float()
    if len(mask) not in (1, len(known)):
        raise ValueError(f"{len(mask)} noise masks came with {len(known)} latents: give one for all, or one to each")
    return StartLatents(known, F.adaptive_max_pool2d(mask, known.shape[2:]) > 0, denoise)


def prepare_control(pictures: ControlPictures | None, model: Model, shape: Sequence[int]) -> Control | None:
    """The ControlNet, on the device, with the latents of its pictures, for latents of a shape (B, C, h, w)."""
    if pictures is None:
        return None
    pipeline = model.loaded.pipeline
    controlnet = pipeline.controlnet if pictures.controlnet is None else pictures.controlnet.controlnet
    guide = GuidePictures.check(pictures.images, shape[0], pipeline.autoencoder, controlnet)
    assert guide is not None and controlnet is not None
    bring_part(model.loaded.autoencoder)
    factor = pipeline.autoencoder.compression
    latents = guide.encode(shape[2] * factor, shape[3] * factor)
    if pictures.controlnet is not None:
        load(pictures.controlnet.movable, model.loaded.transformer)
    return Control(controlnet, latents.repeat_interleave(shape[0] // len(latents), 0), pictures.scale)
