"""Captions as the blocks of a linear DiT use them: their real tokens, projected, and each block's keys and values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_model.nn.embeddings import CaptionProjection
from sana_model.nn.transformer_blocks import CaptionMemory, CaptionTokens, SanaBlock


@dataclass(frozen=True)
class CaptionState:
    """A batch of captions as the blocks use it, computed once by `encode_captions`."""

    batch_size: int
    num_single: int
    """Number of captions at the front of the batch that have one token, as the null caption does."""
    memories: list[CaptionMemory]
    """One per block."""
    attention_mask: Tensor | None
    """(B - num_single, 1, 1, L), False at padding; None where no caption is padded."""

    def without_first(self, count: int) -> "CaptionState":
        """The state of the captions after the first `count`."""
        dropped_single = min(count, self.num_single)
        dropped_others = count - dropped_single
        memories = [memory.drop(dropped_single, dropped_others) for memory in self.memories]
        mask = None if self.attention_mask is None else self.attention_mask[dropped_others:]
        return CaptionState(self.batch_size - count, self.num_single - dropped_single, memories, mask)


def check_captions(caption_embeds: Tensor, caption_mask: Tensor | None, caption_dim: int) -> Tensor:
    """Check shapes and return the mask as bool (B, L).

    Raises ValueError if caption_embeds are not (B, L, caption_dim), the mask is not (B, L), or it masks a caption altogether.
    """
    if caption_embeds.ndim != 3 or caption_embeds.shape[-1] != caption_dim:
        raise ValueError(f"caption_embeds have shape {tuple(caption_embeds.shape)}: this model takes (B, L, {caption_dim})")
    shape = caption_embeds.shape[:2]
    if caption_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=caption_embeds.device)
    if caption_mask.shape != shape:
        raise ValueError(f"caption_mask has shape {tuple(caption_mask.shape)}, caption_embeds {tuple(shape)}")
    real = caption_mask != 0
    if not real.any(dim=1).all():
        raise ValueError("caption_mask masks every token of a caption: the null caption too has one (the BOS token)")
    return real


def project_captions(caption_proj: CaptionProjection, caption_embeds: Tensor, real: Tensor) -> CaptionTokens:
    """Project captions (B, L, caption_dim) to the model's width, real tokens only; `real` is bool (B, L)."""
    last = int(real.any(dim=0).nonzero().max()) + 1  # a column that is padding in every caption is dropped
    real, caption_embeds = real[:, :last], caption_embeds[:, :last]
    positions = real.flatten().nonzero().squeeze(1)
    packed = caption_proj(caption_embeds.flatten(0, 1).index_select(0, positions))
    attention_mask = None if len(positions) == real.numel() else real[:, None, None]
    return CaptionTokens(packed, positions, attention_mask, len(real), last)


def encode_captions(
    caption_proj: CaptionProjection, blocks: Iterable[SanaBlock], caption_embeds: Tensor, caption_mask: Tensor | None = None
) -> CaptionState:
    """Compute what each of `blocks` needs of captions (B, L, caption_dim), once for all steps. Raises as `check_captions`."""
    real = check_captions(caption_embeds, caption_mask, caption_proj.linear_1.in_features)
    num_single = int((real.sum(dim=1) == 1).int().cumprod(dim=0).sum())
    single = project_captions(caption_proj, caption_embeds[:num_single], real[:num_single]) if num_single else None
    caption = project_captions(caption_proj, caption_embeds[num_single:], real[num_single:]) if num_single < len(real) else None
    memories = [block.cross_attention.remember(caption, single) for block in blocks]
    return CaptionState(len(real), num_single, memories, caption.attention_mask if caption else None)
