"""A tiny Gemma-2, trained as a language model on captions of the Shapes world; the DiT reads its hidden states."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from pipelines.shapes.grammar import sample_caption
from pipelines.shapes.scenes import sample_scene
from pipelines.zoo.config import TinyTextEncoderConfig
from pipelines.zoo.training import fit
from pipelines.zoo.world import HELD_OUT, word_tokenizer
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder

INSTRUCTION = (
    "Given a user prompt, write an enhanced prompt that says the shape, the color, the fill, the size and the place "
    "of all that the picture shows.\nUser Prompt: "
)
"""The tiny model's complex human instruction, written in words that it knows."""
PROMPTS = TextEncoderConfig(instruction=INSTRUCTION, max_tokens=64, lowercase=True)
MEMORY = 4
"""Each hidden state also learns to predict its own token and those before it, this many in all. A model this small would
otherwise keep only what helps to predict the next word, and forget colors: the same words follow after each of them."""
SHORT_SHARE = 0.3  # of the captions leave attributes out


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar and the instruction."""
    words = ["given", "user", "prompt", "write", "enhanced", "that", "says", "shape", "color", "fill", "size", "place", "all"]
    return word_tokenizer([*words, ":"], model_max_length=512)


def make_gemma(tokenizer: PreTrainedTokenizerFast) -> Gemma2ForCausalLM:
    """Make an untrained Gemma-2 of 2 layers, 64 wide."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=512,
        sliding_window=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Gemma2ForCausalLM(config)


def train_text_encoder(config: TinyTextEncoderConfig) -> dict[str, float]:
    """Train on captions, half of them after the instruction, and write decoder and tokenizer.

    Returns the last figures of `fit`.
    """
    loop = config.loop
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    tokenizer = text_tokenizer()
    model = make_gemma(tokenizer)
    memory = nn.ModuleList(nn.Linear(model.config.hidden_size, len(tokenizer)) for _ in range(MEMORY))

    def losses(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        captions = [sample_caption(sample_scene(int(row)), rng, short_share=SHORT_SHARE) for row in rows]
        texts = [INSTRUCTION * int(rng.integers(2)) + caption + tokenizer.eos_token for caption in captions]
        return caption_losses(model, memory, tokenizer(texts, padding=True, return_tensors="pt").input_ids)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        next_token, remembered = losses(np.arange(HELD_OUT, HELD_OUT + 256), np.random.default_rng(0))
        return {"held_out_loss": float(next_token), "held_out_memory_loss": float(remembered)}

    def save() -> None:
        model.model.to(torch.bfloat16).save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
        model.float()

    return fit(
        [*model.parameters(), *memory.parameters()],
        lambda rows, rng, progress: torch.stack(losses(rows, rng)).sum(),
        num_rows=HELD_OUT,
        config=loop,
        save=save,
        evaluate=evaluate,
    )


def caption_losses(model: Gemma2ForCausalLM, memory: nn.ModuleList, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, in nats, of the next token and of the tokens up to here. `ids` (B, L) are padded on the right."""
    hidden = model.model(input_ids=ids).last_hidden_state  # attention is causal: nothing sees the padding
    targets = ids.masked_fill(ids.eq(model.config.pad_token_id or 0), -100)

    def cross_entropy(head: nn.Module, offset: int) -> Tensor:
        """The cross-entropy of the token `offset` places after each hidden state."""
        states = hidden[:, max(-offset, 0) : hidden.shape[1] - max(offset, 0)]
        wanted = targets[:, max(offset, 0) : ids.shape[1] - max(-offset, 0)]
        here = targets[:, max(-offset, 0) : ids.shape[1] - max(offset, 0)]  # a state on padding has nothing to remember
        wanted = wanted.masked_fill(here == -100, -100)
        return F.cross_entropy(head(states).flatten(0, 1).float(), wanted.flatten(), ignore_index=-100)

    remembered = [cross_entropy(head, -back) for back, head in enumerate(memory)]
    return cross_entropy(model.lm_head, 1), torch.stack(remembered).mean()


def load_text_encoder(path: str) -> TextEncoder:
    """Load a text encoder with the tiny model's instruction, in float32."""
    return TextEncoder.from_pretrained(path, config=PROMPTS, dtype=torch.float32)
