"""Make tiny language models with random weights, and their tokenizers."""

import json
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_model.nn.config import COMPLEX_HUMAN_INSTRUCTION

TokenizerKind = Literal["bpe", "merging", "word"]

CORPUS = [
    COMPLEX_HUMAN_INSTRUCTION,
    "User Prompt: a red circle above a blue square on a white background",
    "User Prompt: two small dogs running through the snow at dusk, highly detailed, soft light",
    "a green triangle, a yellow star and three black dots in the lower left corner of the picture",
]


def tiny_tokenizer(kind: TokenizerKind = "bpe", *, bos: bool = True, vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """Train a fast tokenizer on `CORPUS`.

    "bpe": byte-level, a word holds its leading space (so the instruction's trailing space merges with the caption).
    "merging": besides, ": A" is one token, that reaches far into the instruction. "word": one token per word.
    """
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: trainers.Trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special_tokens)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "merging":
        tokenizer = _merge_first(tokenizer, [["Ġ", "A"], [":", "ĠA"]])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _merge_first(tokenizer: Tokenizer, merges: list[list[str]]) -> Tokenizer:
    """Return the same BPE with `merges` before all others."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    model["merges"] = merges + [merge for merge in model["merges"] if merge not in merges]
    for merge in merges:
        model["vocab"].setdefault("".join(merge), len(model["vocab"]))
    return Tokenizer.from_str(json.dumps(state))


def tiny_gemma(
    path: Path | None = None,
    *,
    hidden: int = 64,
    num_layers: int = 4,
    sliding_window: int = 4096,
    tokenizer: TokenizerKind = "bpe",
    bos: bool = True,
    seed: int = 0,
) -> tuple[Gemma2Model, PreTrainedTokenizerFast]:
    """Make a random fp32 Gemma-2 with sliding and full layers in turn, and its tokenizer; save them to `path` if given.

    Weights are large enough for attention to matter.
    """
    fast_tokenizer = tiny_tokenizer(tokenizer, bos=bos)
    config = Gemma2Config(
        vocab_size=len(fast_tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        query_pre_attn_scalar=hidden // 4,
        sliding_window=sliding_window,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma2Model(config).eval()
    if path is not None:
        model.save_pretrained(path)
        fast_tokenizer.save_pretrained(path)
    return model, fast_tokenizer
