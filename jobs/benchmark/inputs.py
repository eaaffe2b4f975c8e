"""Inputs of the published shapes, with random values, and a text encoder of Gemma-2-2B's shape. Needs no diffusers."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_model.nn.config import PRESETS, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer

CAPTION_TOKENS, PADDED_TOKENS = 60, 300
INSTRUCTION_TOKENS = 242  # with them the published computation runs over 540 tokens
NUM_STEPS, GUIDANCE_SCALE, FLOW_SHIFT = 20, 4.5, 3.0
SPRINT_FIELDS: dict[str, Any] = {"qk_norm": True, "cross_qk_norm": True, "guidance_embeds": True, "time_input": "unit"}
"""What Sana-Sprint's transformer has besides the shape of Sana."""


def make_captions(
    batch_size: int, device: torch.device, dtype: torch.dtype, real: int = CAPTION_TOKENS
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, 300, 2304) and their mask (B, 300), of which `real` tokens are real."""
    embeds = torch.randn(batch_size, PADDED_TOKENS, PRESETS["sana-0.6b"].caption_dim, device=device, dtype=dtype)
    return embeds, (torch.arange(PADDED_TOKENS, device=device) < real).expand(batch_size, -1)


def make_transformer_inputs(ours: SanaTransformer, size: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents of pictures of `size` px, timesteps, and captions with their mask."""
    weight = ours.head.weight
    latents = torch.randn(batch_size, 32, size // 32, size // 32, device=weight.device, dtype=weight.dtype)
    timestep = torch.full((batch_size,), 500.0, device=weight.device)
    return latents, timestep, *make_captions(batch_size, weight.device, weight.dtype)


def make_text_encoder(
    device: torch.device, dtype: torch.dtype, depth: int, count: int, vocabulary_size: int | None = None
) -> tuple[TextEncoder, list[str]]:
    """A text encoder of Gemma-2-2B's width, and captions of which each fills 60 places behind the instruction.

    `vocabulary_size`: rows of its table of embeddings (published: 256,000); None: as many as the captions need.
    """
    words = [f"w{index}" for index in range(1000)]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *words])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    rows = vocabulary_size or len(vocabulary)
    config = Gemma2Config(vocab_size=rows, num_hidden_layers=depth, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with device:
        model: Any = Gemma2Model(config)  # hidden 2304, feed-forward 9216: gemma-2-2b
    instruction = " ".join(words[: INSTRUCTION_TOKENS - 1]) + " "
    # The instruction's last token and BOS are kept too, so a caption of 58 words fills 60 places.
    captions = [" ".join(words[(300 + index + place) % 1000] for place in range(CAPTION_TOKENS - 2)) for index in range(count)]
    return TextEncoder(model.to(device, dtype), tokenizer, TextEncoderConfig(instruction=instruction)), captions
