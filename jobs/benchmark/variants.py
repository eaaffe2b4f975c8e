"""Sana-Sprint and ControlNet against diffusers' pipelines, from caption embeddings to latents."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch import Tensor

from sana_model.guidance import Caption, embedded_guidance_velocity, guided_velocity
from sana_model.nn.controlnet import Control, SanaControlNet
from sana_model.nn.transformer import SanaTransformer
from sana_model.solver import flow_dpm_solver, sampling_sigmas, scm, scm_sigmas

Pair = tuple[Callable[[], Any], Callable[[], Any]]
SPRINT_STEPS = 2


def sprint_sampling(
    ours: SanaTransformer, peer: SanaTransformer2DModel, latents: Tensor, captions: Caption, guidance_scale: float
) -> Pair:
    """Two steps of SCM with the guidance scale embedded: one forward a step, no null caption.

    Args:
        ours, peer: transformers with `SPRINT_FIELDS`.
        latents: noise (B, C, h, w). captions: B of them.
    """
    pipeline = SanaSprintPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=peer, scheduler=SCMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def run_ours() -> Tensor:
        with torch.inference_mode():
            velocity = embedded_guidance_velocity(ours, captions, guidance_scale)
            noise = lambda: torch.randn_like(latents, dtype=torch.float32)  # noqa: E731
            return scm(velocity, latents, scm_sigmas(SPRINT_STEPS), draw_noise=noise)

    def run_peer() -> Tensor:
        return pipeline(
            prompt_embeds=captions[0],
            prompt_attention_mask=captions[1].long(),
            num_inference_steps=SPRINT_STEPS,
            guidance_scale=guidance_scale,
            height=latents.shape[2] * 32,
            width=latents.shape[3] * 32,
            latents=latents.float(),
            use_resolution_binning=False,
            output_type="latent",
        ).images

    return run_ours, run_peer


def make_controlnets(ours: SanaTransformer, peer: SanaTransformer2DModel) -> tuple[SanaControlNet, SanaControlNetModel]:
    """A ControlNet of a quarter of the transformer's blocks, as published (7 of 28), in the form that diffusers computes."""
    depth = max(ours.config.depth // 4, 1)
    settings = peer.config
    shared = ("num_attention_heads", "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim")
    theirs = SanaControlNetModel(**{name: settings[name] for name in shared}, num_layers=depth)
    return SanaControlNet.from_transformer(ours, depth=depth, form="diffusers"), theirs.to(peer.device, peer.dtype)


class KnownLatents:
    """Stands where `SanaControlNetPipeline` has the autoencoder, and encodes every control picture to given latents."""

    def __init__(self, latents: Tensor):
        self.latents, self.dtype = latents, latents.dtype
        self.config = SimpleNamespace(encoder_block_out_channels=range(6), scaling_factor=1.0)

    def encode(self, image: Tensor) -> SimpleNamespace:
        """`image`: (B, 3, H, W), of which only B counts."""
        return SimpleNamespace(latent=self.latents.repeat(len(image) // len(self.latents), 1, 1, 1))


def controlnet_sampling(
    models: tuple[SanaTransformer, SanaTransformer2DModel],
    controlnets: tuple[SanaControlNet, SanaControlNetModel],
    latents: Tensor,
    captions: Caption,
    null: Caption,
    *,
    num_steps: int,
    guidance_scale: float,
    flow_shift: float,
) -> Pair:
    """Flow-DPM-Solver with guidance, steered by the latents of control pictures, which both ways get as they are.

    Args:
        models, controlnets: ours and diffusers'.
        latents: noise (B, C, h, w). captions, null: B of each.
    """
    (ours, peer), (controlnet, peer_controlnet) = models, controlnets
    control = torch.randn_like(latents)
    pipeline = _controlnet_pipeline(peer, peer_controlnet, control, flow_shift)
    picture = torch.zeros(len(latents), 3, latents.shape[2] * 32, latents.shape[3] * 32, device=latents.device)

    def run_ours() -> Tensor:
        with torch.inference_mode():
            one_null, steering = (null[0][:1], null[1][:1]), Control(controlnet, control)
            velocity = guided_velocity(ours, captions, one_null, guidance_scale=guidance_scale, control=steering)
            return flow_dpm_solver(velocity, latents, sampling_sigmas(num_steps, flow_shift))

    def run_peer() -> Tensor:
        return pipeline(
            negative_prompt=None,
            control_image=picture,
            prompt_embeds=captions[0],
            prompt_attention_mask=captions[1].long(),
            negative_prompt_embeds=null[0],
            negative_prompt_attention_mask=null[1].long(),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            height=picture.shape[2],
            width=picture.shape[3],
            latents=latents.float(),
            use_resolution_binning=False,
            output_type="latent",
        ).images

    return run_ours, run_peer


def _controlnet_pipeline(
    peer: SanaTransformer2DModel, controlnet: SanaControlNetModel, control: Tensor, flow_shift: float
) -> SanaControlNetPipeline:
    """diffusers' pipeline without text encoder and autoencoder, which encodes any picture to the latents `control`."""
    pipeline = SanaControlNetPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=KnownLatents(control),
        transformer=peer,
        controlnet=controlnet,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=flow_shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
