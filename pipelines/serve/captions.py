"""Embeddings of prompts, kept: a prompt that comes again is not encoded again."""

from collections import OrderedDict

import torch
from torch import Tensor

from sana_model.nn.text_encoder import TextEncoder


class KeptCaptions:
    """Takes the place of a text encoder's `encode`, and keeps what that returns for the captions used last, on the CPU.

    Captions are encoded one by one, so that an embedding does not depend on its batch.

    Args:
        most: captions that are kept.
    """

    def __init__(self, text_encoder: TextEncoder, most: int):
        self._encode, self._most = text_encoder.encode, most
        self._device = text_encoder.device  # where `encode` put its last result
        self._kept: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()
        self.hits, self.misses = 0, 0
        text_encoder.encode = self  # type: ignore[method-assign]

    def __call__(self, captions: list[str], *, use_instruction: bool = True) -> tuple[Tensor, Tensor]:
        """As `TextEncoder.encode`: caption_embeds (B, L, D) and caption_mask (B, L)."""
        rows = [self._find(caption, use_instruction) for caption in captions]
        embeds = torch.nn.utils.rnn.pad_sequence([row.to(self._device) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        return embeds, torch.arange(embeds.shape[1], device=self._device) < lengths[:, None]

    def _find(self, caption: str, use_instruction: bool) -> Tensor:
        """The embedding of one caption, (L, D)."""
        key = (caption, use_instruction)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        embeds, _ = self._encode([caption], use_instruction=use_instruction)
        self._device = embeds.device
        self._kept[key] = embeds[0].cpu()
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return embeds[0]
