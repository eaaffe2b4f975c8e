"""Drawn scenes in memory, and word-level tokenizers for their captions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import vocabulary
from pipelines.shapes.scenes import Scene, ShapesConfig, sample_scene
from pipelines.zoo.config import NUM_ROWS

HELD_OUT = 10_000_000
"""First row of those that are never trained on; gates are measured on them."""
VALIDATION = 20_000_000
"""First row of those that choose settings, such as the guidance scale."""
CONFIG = ShapesConfig()

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class World:
    """Rows of the Shapes world: images (N, H, W, 3) uint8 and the scenes that they show."""

    images: np.ndarray
    scenes: list[Scene]

    def images_as_tensor(self, indices: np.ndarray | slice) -> Tensor:
        """The images with these indices, (B, 3, H, W) float32 in [-1, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[indices]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_world(num_rows: int = NUM_ROWS, *, first: int = 0, cache_dir: str | Path | None = None) -> World:
    """Load rows `first` to `first + num_rows`, which takes about 1 ms a row to draw.

    Args:
        cache_dir: keeps the images (12 KiB a row), so that they are drawn only once.
    """
    scenes = [sample_scene(index, CONFIG) for index in range(first, first + num_rows)]
    shape = (num_rows, CONFIG.image_size, CONFIG.image_size, 3)
    name = re.sub(r"\W+", "_", f"shapes {CONFIG} {first} {num_rows}") + ".npy"
    path = None if cache_dir is None else Path(cache_dir) / name
    if path is not None and path.exists():
        return World(np.load(path, mmap_mode="r"), scenes)
    if path is None:
        images = np.empty(shape, np.uint8)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        images = open_memmap(part, "w+", np.uint8, shape)
    for row in tqdm(range(num_rows), desc="drawing scenes", disable=num_rows < 2000):
        images[row] = draw_row(first + row, CONFIG)[1]
    if path is not None:
        part.rename(path)
    return World(images, scenes)


def word_tokenizer(
    extra_words: Sequence[str] = (),
    *,
    special_tokens: Sequence[str] = (),
    bos: bool = True,
    eos: bool = False,
    **options: object,
) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer that lower-cases and knows the grammar's words, `extra_words` and `special_tokens`.

    Ids: <pad> 0, <unk> 1, <s> 2, </s> 3, then the special tokens, then the words.

    Args:
        bos, eos: put <s> before, or </s> after, every text.
        options: of PreTrainedTokenizerFast.
    """
    specials = [PAD, UNKNOWN, BOS, EOS, *special_tokens]
    words = [*specials, *sorted({*vocabulary(), *extra_words})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,:;!?\"'()-]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no space before a comma or a full stop
    template = f"{BOS} $A" if bos else "$A"
    template += f" {EOS}" if eos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(BOS, words.index(BOS)), (EOS, words.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS, **options
    )
