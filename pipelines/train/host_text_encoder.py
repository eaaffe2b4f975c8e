"""The text encoder of a training whose captions are embedded already: it computes what is left, on the CPU."""

import torch
from torch import Tensor

from sana_model.nn.text_encoder import TextEncoder


class HostTextEncoder(TextEncoder):
    """A text encoder that computes on the CPU and moves its result to `target`, a device that has no room for its weights."""

    def __init__(self, encoder: TextEncoder, target: torch.device):
        super().__init__(encoder.model, encoder.tokenizer, encoder.config)
        self.target = target

    def encode(self, captions: list[str], *, use_instruction: bool = True) -> tuple[Tensor, Tensor]:
        """Return what `TextEncoder.encode` returns, on `target`."""
        embeds, mask = super().encode(captions, use_instruction=use_instruction)
        return embeds.to(self.target), mask.to(self.target)

    def encode_padded(self, caption: str, num_tokens: int) -> Tensor:
        """Return what `TextEncoder.encode_padded` returns, on `target`."""
        return super().encode_padded(caption, num_tokens).to(self.target)
