"""A logits processor for vLLM that ends the engine's process at one certain prompt."""

import os

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

MAX_TOKENS = 150  # of the prompts of others


class Deadly(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        """Take what vLLM passes, and use none of it."""

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if prompt and len(prompt) > MAX_TOKENS:
                os._exit(1)
