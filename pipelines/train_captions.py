"""Captions as the transformer takes them: encoded in the step, or read from what was embedded before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sana_model.generate import Caption
from sana_model.text_encoder import TextEncoder


def encode_captions(text_encoder: TextEncoder, captions: list[str | None], null: Caption) -> Caption:
    """caption_embeds (B, L, D) and caption_mask (B, L); None becomes `null`, which is text_encoder.null()."""
    null_embeds, null_mask = null
    embeds, mask = null_embeds[:0], null_mask[:0]
    told = [index for index, caption in enumerate(captions) if caption is not None]
    if told:
        embeds, mask = text_encoder.encode([caption for caption in captions if caption is not None])
    length, null_length = max(mask.shape[1], null_mask.shape[1]), null_mask.shape[1]
    caption_embeds = null_embeds.new_zeros(len(captions), length, null_embeds.shape[-1])
    caption_mask = null_mask.new_zeros(len(captions), length)
    caption_embeds[:, :null_length], caption_mask[:, :null_length] = null_embeds, null_mask
    if told:
        caption_embeds[told], caption_mask[told] = 0, False
        caption_embeds[told, : mask.shape[1]], caption_mask[told, : mask.shape[1]] = embeds, mask
    return caption_embeds, caption_mask


def pad_embeds(embeds: Sequence[Tensor | None], null: Caption) -> Caption:
    """The same of captions (num_tokens, D) that were embedded before, on the device and in the dtype of `null`."""
    null_embeds, null_mask = null
    told = [null_embeds[0, null_mask[0]] if one is None else one.to(null_embeds) for one in embeds]
    lengths = torch.tensor([len(one) for one in told], device=null_mask.device)
    caption_embeds = torch.nn.utils.rnn.pad_sequence(told, batch_first=True)
    return caption_embeds, torch.arange(caption_embeds.shape[1], device=null_mask.device) < lengths[:, None]


class HostTextEncoder(TextEncoder):
    """Computes in the CPU's memory, and hands what comes out to another device, which has no room for it."""

    def __init__(self, encoder: TextEncoder, target: torch.device):
        super().__init__(encoder.model, encoder.tokenizer, encoder.config)
        self.target = target

    def encode(self, captions: list[str], *, use_instruction: bool = True) -> tuple[Tensor, Tensor]:
        """As `TextEncoder.encode`, on `target`."""
        embeds, mask = super().encode(captions, use_instruction=use_instruction)
        return embeds.to(self.target), mask.to(self.target)
