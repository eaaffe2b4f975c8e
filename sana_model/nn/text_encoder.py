"""A frozen decoder-only language model that turns captions into `caption_embeds` and `caption_mask`.

The instruction before every caption is the same, so its keys and values are computed once. Captions are sorted into batches of
nearly equal length, so little padding is computed. The result equals that of the published code, which computes all captions in
one padded batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from sana_model.nn.config import DEFAULT_TEXT_ENCODER, NVLABS_PROMPTS, NullCaption, TextEncoderConfig
from sana_model.nn.plain_text import PlainText

MAX_PADDING = 1 / 8  # largest share of pad tokens in a batch
MAX_FORWARD_TOKENS = 16_384  # tokens computed in one forward, padding included
MAX_FORWARD_KEYS = 65_536  # tokens attended to in one forward: each row's instruction counts too


class TextEncoder(nn.Module):
    """Turns captions into the last hidden states of a frozen language model, at the positions that Sana uses.

    Kept of the tokens of `instruction + caption`: the first one, and all from the instruction's last one on, `max_tokens` at
    most. Without an instruction: the first `max_tokens`. Padded positions are zeros.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TextEncoderConfig = NVLABS_PROMPTS
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.config = config
        self._plain = PlainText(tokenizer)
        self.instruction_ids: list[int] = tokenizer.encode(config.instruction) if config.instruction else []
        self._prefix: _Prefix | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = DEFAULT_TEXT_ENCODER,
        *,
        config: TextEncoderConfig = NVLABS_PROMPTS,
        dtype: torch.dtype | None = None,
        tokenizer_path: str | Path | None = None,
        attn_implementation: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> "TextEncoder":
        """Load a decoder-only transformers model with its tokenizer: see `files.models.load_text_encoder`."""
        from sana_model.files.models import load_text_encoder

        return load_text_encoder(
            path,
            config=config,
            dtype=dtype,
            tokenizer_path=tokenizer_path,
            attn_implementation=attn_implementation,
            variant=variant,
            revision=revision,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the language model and its tokenizer into one folder: see `files.models.save_text_encoder`."""
        from sana_model.files.models import save_text_encoder

        save_text_encoder(self, path)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def embed_dim(self) -> int:
        """Width D of the embeddings."""
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when a parent module trains: the model is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: list[str], *, use_instruction: bool = True) -> tuple[Tensor, Tensor]:
        """Return caption_embeds (B, L, D) and caption_mask (B, L) bool; L is the longest caption's length, at most max_tokens.

        Raises TypeError unless `captions` is a list of str, ValueError if it is empty.
        """
        rows = self._tokenize(captions, use_instruction, truncate=True)
        first_kept = self._first_kept(use_instruction)
        lengths = [_count_kept(row, first_kept) for row in rows]
        reused = [0] * len(rows)
        if use_instruction:  # its end may merge with a caption's first word, so each row has its own common prefix
            reused = [min(_count_common(row, self.instruction_ids), first_kept, len(row) - 1) for row in rows]

        embeds = torch.zeros(len(rows), max(lengths), self.embed_dim, device=self.device, dtype=self.dtype)
        with torch.autocast(self.device.type, enabled=False):  # a caller's autocast would leak into the kept prefix
            for batch in _plan_batches([len(row) for row in rows], reused):
                num_reused = reused[batch[0]]
                hidden = self._forward([rows[index] for index in batch], num_reused)  # (b, width, D)
                embeds[batch, 0] = self._get_prefix().first_hidden if num_reused else hidden[:, 0]
                kept = hidden[:, first_kept - num_reused :]
                for index, states in zip(batch, kept, strict=True):
                    embeds[index, 1 : lengths[index]] = states[: lengths[index] - 1]
        positions = torch.arange(max(lengths), device=self.device)
        return embeds, positions < torch.tensor(lengths, device=self.device)[:, None]

    def null(self) -> tuple[Tensor, Tensor]:
        """Encode the published null caption, "" without instruction: caption_embeds (1, L, D), caption_mask (1, L)."""
        return self.encode([""], use_instruction=False)

    @torch.no_grad()
    def encode_padded(self, caption: str, num_tokens: int) -> Tensor:
        """Encode a caption, without instruction, as exactly `num_tokens` tokens: (num_tokens, D). It is cut, or padded.

        Padding sees the caption and not itself, as NVlabs' code computes it: its states are not zeros.
        """
        (row,) = self._tokenize([caption], use_instruction=False, truncate=True)
        row = row[:num_tokens]
        num_pads = num_tokens - len(row)
        ids = torch.tensor([row + [self.tokenizer.pad_token_id or 0] * num_pads], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * num_pads], device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0]

    def encode_null(self, caption_mask: Tensor, kind: NullCaption, caption: str = "") -> tuple[Tensor, Tensor]:
        """Encode what guidance leads away from: caption_embeds (B or 1, L, D) and caption_mask (B or 1, L).

        Args:
            caption_mask: (B, L) of the captions that are guided to, as `encode` returns it.
            kind: what the transformer's weights were trained to see, `SanaConfig.null_caption`.
            caption: text to guide away from; "" is the published null caption.
        """
        if kind == "own_mask":
            return self.encode([caption], use_instruction=False)
        padded = self.encode_padded(caption, caption_mask.shape[1])
        return padded.expand(len(caption_mask), -1, -1), caption_mask

    def count_tokens(self, captions: list[str], *, use_instruction: bool = True) -> list[int]:
        """Count the tokens that each caption would keep if none were cut; `encode` cuts captions to `max_tokens`."""
        first_kept = self._first_kept(use_instruction)
        return [_count_kept(row, first_kept) for row in self._tokenize(captions, use_instruction, truncate=False)]

    def _first_kept(self, use_instruction: bool) -> int:
        """The position from which every token is kept. The token at 0 is kept too."""
        return len(self.instruction_ids) - 1 if use_instruction and self.instruction_ids else 1

    def _tokenize(self, captions: list[str], use_instruction: bool, truncate: bool) -> list[list[int]]:
        _check_captions(captions)
        instruction = self.config.instruction if use_instruction else ""
        prompts = [caption.lower() if self.config.lowercase else caption for caption in captions]
        rows = self._plain.rows(
            [prompt.strip() for prompt in prompts],
            instruction=instruction,
            max_length=self._first_kept(use_instruction) + self.config.max_tokens - 1 if truncate else None,
        )
        # A tokenizer without BOS makes no token from "": take the pad token, which the published code has at position 0.
        return [row or [self.tokenizer.pad_token_id or 0] for row in rows]

    def _forward(self, rows: list[list[int]], num_reused: int) -> Tensor:
        """Compute the last hidden states of each row after its first `num_reused` tokens, right-padded: (rows, width, D)."""
        longest = max(map(len, rows))
        # Attention is causal, so no real token sees the padding after it: padding may have any id and needs no mask.
        ids = [row[num_reused:] + [0] * (longest - len(row)) for row in rows]
        cache = self._get_prefix().as_cache(num_reused) if num_reused else None
        input_ids = torch.tensor(ids, device=self.device)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def _get_prefix(self) -> "_Prefix":
        """The computed instruction, without its last token, which is always kept and may merge with the caption.

        Computed once, and again when the weights have moved or changed. A write through `.data` cannot be noticed: make a new
        TextEncoder then.
        """
        place = (self.device, self.dtype, *map(_identity, self.model.parameters()))
        if self._prefix is None or self._prefix.place != place:
            cache = DynamicCache()  # without config=: its sliding-window layers would drop tokens outside their window
            ids = torch.tensor([self.instruction_ids[:-1]], device=self.device)
            hidden = self.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            self._prefix = _Prefix(place, hidden[0, 0].clone(), [(keys, values) for keys, values, _ in cache])
        return self._prefix

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Forget the computed instruction when the module moves or changes dtype."""
        self._prefix = None
        return super()._apply(*args, **kwargs)


@dataclass(frozen=True)
class _Prefix:
    """The keys and values of an instruction of P tokens."""

    place: tuple[object, ...]  # where the weights that computed it are, and how often they had been written to
    first_hidden: Tensor  # (D,), last hidden state of token 0
    layers: list[tuple[Tensor, Tensor]]  # keys and values, (1, heads, P, head_dim)

    def as_cache(self, num_tokens: int) -> Cache:
        return Cache(layers=[_PrefixLayer(k[:, :, :num_tokens], v[:, :, :num_tokens]) for k, v in self.layers])


class _PrefixLayer(DynamicLayer):
    """A cache layer that puts the same keys and values before those of every row of a batch, and stores no new ones.

    Sliding-window layers get the whole prefix too: their attention mask cuts the window.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(shape), key_states], dim=2)
        return keys, torch.cat([self.values.expand(shape), value_states], dim=2)


def _identity(weight: Tensor) -> tuple[int, int]:
    """Where a weight is, and how often it was written to."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _plan_batches(lengths: list[int], reused: list[int]) -> Iterator[list[int]]:
    """Group the indices of rows with the same `reused`, longest first, within the limits on padding and on size."""
    batch: list[int] = []
    num_real = 0
    for index in sorted(range(len(lengths)), key=lambda i: (reused[i], lengths[i]), reverse=True):
        num_new = lengths[index] - reused[index]
        first, num_rows = (batch or [index])[0], len(batch) + 1
        num_computed = num_rows * (lengths[first] - reused[first])
        if batch and (
            reused[index] != reused[first]
            or num_real + num_new < (1 - MAX_PADDING) * num_computed
            or num_computed > MAX_FORWARD_TOKENS
            or num_rows * lengths[first] > MAX_FORWARD_KEYS
        ):
            yield batch
            batch, num_real = [], 0
        batch.append(index)
        num_real += num_new
    yield batch


def _count_kept(row: list[int], first_kept: int) -> int:
    return 1 + max(0, len(row) - first_kept)


def _count_common(row: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(row, other, strict=False)))


def _check_captions(captions: list[str]) -> None:
    if not isinstance(captions, list):
        raise TypeError(f"captions={captions!r} must be a list of str: give [caption] for one caption")
    if not captions:
        raise ValueError("captions=[] is empty: give at least one caption ([''] is the empty one)")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions[{index}]={caption!r} is a {type(caption).__name__}: give a str ('' for none)")
