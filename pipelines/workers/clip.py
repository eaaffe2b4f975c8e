"""CLIP and SigLIP of transformers: images and texts to unit vectors whose cosine says how well they fit."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from pipelines.tables.rejects import RowRefused
from pipelines.workers.models import pick_device, pretrained
from sana_model.nn.finite import name_dtype
from sana_model.nn.plain_text import PlainText

MAX_TEXTS = 512
"""Texts per call of the model."""

LongCaptions = Literal["cut", "chunks"]
"""How a text over the model's limit is scored: by its beginning alone, or by the mean over as few equal parts as fit."""

PreparedImage = Mapping[str, Tensor]
"""The output of the model's image processor for one image, by argument of the model."""


def embedding_width(model: str, revision: str | None = None) -> int:
    """The width D of a CLIP's or SigLIP's embeddings, from its configuration alone."""
    path, options = pretrained(model, revision)
    return _width(AutoConfig.from_pretrained(path, trust_remote_code=False, **options))


def _width(config: Any) -> int:
    """SigLIP has no projection: its embeddings are as wide as its image tower."""
    return int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size)


class ClipModel:
    """Any transformers CLIP or SigLIP: images and texts to unit vectors, on the CPU in float32.

    A text over the model's limit (77 tokens for CLIP, 64 for SigLIP, the special ones included) is cut there, as the
    published code does; `tokenize` and `embed_tokens` leave it to the caller.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        processor: tuple[str, str | None] | None = None,
    ):
        """Load the model; `processor`: another model, and its revision, whose image processor and tokenizer are used."""
        path, options = pretrained(model, revision)
        loaded = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype), trust_remote_code=False, **options)
        if processor is not None:
            path, options = pretrained(*processor)
        parts = AutoProcessor.from_pretrained(path, trust_remote_code=False, **options)
        self.image_processor = parts.image_processor
        self._take(model, loaded, parts.tokenizer, device)

    def _take(self, name: str, model: Any, tokenizer: Any, device: str | None) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.plain = PlainText(self.tokenizer)
        # SigLIP learned with every text padded to its full length, on the right, and with the padding in sight: no mask.
        self.pads_fully = self.model.config.model_type.startswith("siglip")
        self.width = _width(self.model.config)
        self.length = min(self.model.config.text_config.max_position_embeddings, self.tokenizer.model_max_length)
        self.max_tokens = self.length - len(self.plain.start) - len(self.plain.end)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with."""
        return self.model.logit_scale.exp().item()

    def not_finite(self, reason: str) -> RowRefused:
        """The refusal of an item for which the model gives values that are not finite."""
        dtype = name_dtype(self.model.dtype)
        advice = "another copy of its weights" if dtype == "float32" else "float32, or another copy of its weights"
        return RowRefused(reason, f"{self.name} gives values that are not finite, in {dtype}: take {advice}")

    def prepare_image(self, image: Image.Image) -> PreparedImage:
        """Turn an RGB image into the model's input; may be called from several threads."""
        return dict(self.image_processor(images=[image], return_tensors="pt"))

    @torch.inference_mode()
    def embed_prepared(self, images: Sequence[PreparedImage]) -> Tensor:
        """Prepared images to unit vectors (B, D): one forward pass."""
        inputs = {name: torch.cat([image[name] for image in images]).to(self.device) for name in images[0]}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return _unit(self.model.get_image_features(**inputs))

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images to unit vectors (B, D)."""
        return self.embed_prepared([self.prepare_image(image) for image in images])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, all of them, without those that the tokenizer adds. Special tokens in it are plain text."""
        return self.plain.bodies(texts)

    @torch.inference_mode()
    def embed_tokens(self, rows: Sequence[list[int]]) -> Tensor:
        """Texts as tokens, of each at most `max_tokens`, to unit vectors (B, D)."""
        parts = [self._embed_rows(rows[start : start + MAX_TEXTS]) for start in range(0, len(rows), MAX_TEXTS)]
        return torch.cat(parts)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, D); of a long one the first `max_tokens` tokens are seen."""
        return self.embed_tokens([tokens[: self.max_tokens] for tokens in self.tokenize(texts)])

    def score_tokens(self, image_embeds: Tensor, captions: Sequence[list[int]], long_captions: LongCaptions = "cut") -> Tensor:
        """100 times the cosine of each image (B, D) and its caption, given as all its tokens: (B,). One forward pass."""
        parts = [self._parts(tokens, long_captions) for tokens in captions]
        caption_of = torch.tensor([index for index, own in enumerate(parts) for _ in own])
        cosines = (image_embeds[caption_of] * self.embed_tokens([part for own in parts for part in own])).sum(-1)
        sums = torch.zeros(len(captions)).index_add_(0, caption_of, cosines)
        return 100 * sums / torch.tensor([len(own) for own in parts])

    def _parts(self, tokens: list[int], long_captions: LongCaptions) -> list[list[int]]:
        """The parts of a caption that the model sees."""
        if long_captions == "cut":
            return [tokens[: self.max_tokens]]
        count = max(1, -(-len(tokens) // self.max_tokens))
        edges = [index * len(tokens) // count for index in range(count + 1)]
        return [tokens[start:end] for start, end in pairwise(edges)]

    def _embed_rows(self, rows: Sequence[list[int]]) -> Tensor:
        whole = [[*self.plain.start, *row, *self.plain.end] for row in rows]
        width = self.length if self.pads_fully else max(map(len, whole))
        ids = torch.full((len(whole), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(whole):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        inputs = {"input_ids": ids.to(self.device)}
        if not self.pads_fully:
            inputs["attention_mask"] = mask.to(self.device)
        return _unit(self.model.get_text_features(**inputs))


def _unit(features: object) -> Tensor:
    """Tensors as transformers 4 returned them, or the output object of transformers 5."""
    pooled = features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]
    return F.normalize(pooled.float(), dim=-1).cpu()
