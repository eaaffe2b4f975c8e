"""The velocity that a solver integrates: the transformer's, guided by captions, and steered by a ControlNet if there is one."""

import torch
from torch import Tensor

from sana_model.flow import sigma_to_timestep
from sana_model.nn.captions import CaptionState
from sana_model.nn.controlnet import Control, ControlState
from sana_model.nn.transformer import SanaTransformer
from sana_model.solver import PredictVelocity, classifier_free_guidance

Caption = tuple[Tensor, Tensor]
"""caption_embeds (B, L, D) and caption_mask (B, L), as the text encoder returns them."""


def guided_velocity(
    transformer: SanaTransformer,
    captions: Caption,
    null: Caption,
    *,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    control: Control | None = None,
) -> PredictVelocity:
    """Make the function that a solver integrates: guided velocity of latents (B, C, h, w) at a sigma.

    The captions' keys and values are computed here, once for all steps.

    Args:
        captions: B captions. null: one null (or negative) caption, or one for each caption (`TextEncoder.encode_null`).
        guidance_scale, guidance_interval: as in `TextToImage.forward`.
        control: what steers the B samples, with and without their captions.

    Raises ValueError if guidance_interval is not 0 <= lo < hi <= 1, or if the ControlNet does not fit the transformer.
    """
    dtype, count = transformer.head.weight.dtype, len(captions[0])
    doubled = _null_then_captions(captions, null, dtype)
    both, steered = transformer.encode_captions(*doubled), _prepare(control, transformer, doubled, repeats=2)
    conditional, steered_conditional = both.without_first(count), steered and steered.without_first(count)

    def predict_both(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        latents = torch.cat([latents, latents]).to(dtype)
        null_velocity, velocity = _predict(transformer, latents, sigma, both, steered).chunk(2)
        return null_velocity, velocity

    def predict_conditional(latents: Tensor, sigma: Tensor) -> Tensor:
        return _predict(transformer, latents.to(dtype), sigma, conditional, steered_conditional)

    return classifier_free_guidance(predict_both, predict_conditional, guidance_scale, guidance_interval)


def embedded_guidance_velocity(
    transformer: SanaTransformer, captions: Caption, guidance_scale: float, control: Control | None = None
) -> PredictVelocity:
    """The velocity of a model that takes the guidance scale as an input (Sana-Sprint): one forward a step, no null caption.

    `control` as in `guided_velocity`.
    """
    dtype = transformer.head.weight.dtype
    captions = captions[0].to(dtype), captions[1]
    state, steered = transformer.encode_captions(*captions), _prepare(control, transformer, captions, repeats=1)

    def predict_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        scale = torch.full((len(latents),), guidance_scale, device=latents.device)
        return _predict(transformer, latents.to(dtype), sigma, state, steered, scale)

    return predict_velocity


def _prepare(control: Control | None, transformer: SanaTransformer, captions: Caption, *, repeats: int) -> ControlState | None:
    if control is None:
        return None
    latents = control.latents.to(transformer.head.weight.dtype).repeat(repeats, 1, 1, 1)
    return control.controlnet.prepare(transformer, latents, *captions, scale=control.scale)


def _predict(
    transformer: SanaTransformer,
    latents: Tensor,
    sigma: Tensor,
    captions: CaptionState,
    steered: ControlState | None,
    guidance_scale: Tensor | None = None,
) -> Tensor:
    timestep = sigma_to_timestep(sigma).to(latents.device).expand(len(latents))
    after_block = None if steered is None else steered.controlnet.steer(latents, timestep, steered)
    return transformer(latents, timestep, captions, guidance_scale=guidance_scale, after_block=after_block)


def _null_then_captions(captions: Caption, null: Caption, dtype: torch.dtype) -> Caption:
    """Make a doubled batch: the null captions, one per caption, then the captions."""
    (embeds, mask), (null_embeds, null_mask) = captions, null
    count, length = len(embeds), max(mask.shape[1], null_mask.shape[1])
    caption_embeds = embeds.new_zeros(2 * count, length, embeds.shape[-1], dtype=dtype)
    caption_mask = mask.new_zeros(2 * count, length)
    caption_embeds[:count, : null_mask.shape[1]], caption_mask[:count, : null_mask.shape[1]] = null_embeds, null_mask
    caption_embeds[count:, : mask.shape[1]], caption_mask[count:, : mask.shape[1]] = embeds, mask
    return caption_embeds, caption_mask
