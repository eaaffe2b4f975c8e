"""Tokenizes texts of strangers: special tokens that a text spells out ("</s>", "<pad>", "<|endoftext|>") are plain text in it.

A text that spells none gets exactly the ids that the tokenizer itself gives it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

UNKNOWN_LETTER = "\U000f1234"  # of the private planes of Unicode: in no vocabulary


class PlainText:
    """A tokenizer, and what it puts before and after every text.

    start, end: ids that it adds to every text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer: Any = tokenizer
        added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # The unknown token stands for ordinary text, unless the vocabulary has bytes: then it may be the end token, as in CLIP.
        ordinary = self._ids([UNKNOWN_LETTER], add_special_tokens=False)[0]
        self._special: set[int] = {*added, *tokenizer.all_special_ids} - set(ordinary)
        self._spelled: dict[int, list[int]] = {}
        self.start, self.end = self._affixes()

    def bodies(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, all of them, without those that the tokenizer adds."""
        rows = self._ids(texts, add_special_tokens=False, split_special_tokens=True)
        # A vocabulary may hold the special token as a word too (T5's and SigLIP's do): spell it letter by letter.
        return [self._spell(row) if self._special.intersection(row) else row for row in rows]

    def rows(self, texts: Sequence[str], *, instruction: str = "", max_length: int | None = None) -> list[list[int]]:
        """The ids of instruction and text together, with those that the tokenizer adds.

        Args:
            instruction: comes before each text. It is ours: special tokens in it are meant.
            max_length: ids that are kept of a row; None: all.
        """
        options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
        rows = self._ids([instruction + text for text in texts], **options)
        usual = self._count(self._ids([instruction], **options)[0])
        odd = [index for index, row in enumerate(rows) if self._count(row) > usual]
        for index, row in zip(odd, self._odd_rows([texts[index] for index in odd], instruction), strict=True):
            room = len(row) if max_length is None else max(max_length - len(self.end), 0)
            rows[index] = row[:room] + self.end
        return rows

    def _odd_rows(self, texts: Sequence[str], instruction: str) -> list[list[int]]:
        """As `rows`, for texts with special tokens in them: untruncated, and without what is added at the end."""
        if not texts:
            return []
        alone = self._ids([instruction], add_special_tokens=False)[0] if instruction else []
        if self._count(alone):  # they are meant, so instruction and text are tokenized apart
            return [self.start + alone + body for body in self.bodies(texts)]
        return [self.start + body for body in self.bodies([instruction + text for text in texts])]

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        return self.tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"]

    def _count(self, row: Sequence[int]) -> int:
        return sum(id in self._special for id in row)

    def _spell(self, row: Sequence[int]) -> list[int]:
        spelled: list[int] = []
        for id in row:
            spelled += self._letters(id) if id in self._special else [id]
        return spelled

    def _letters(self, id: int) -> list[int]:
        """The ids of a special token's letters."""
        if id not in self._spelled:
            text = " ".join(self.tokenizer.convert_ids_to_tokens(id))
            ids = self._ids([text], add_special_tokens=False, split_special_tokens=True)[0]
            self._spelled[id] = [letter for letter in ids if letter not in self._special]
        return self._spelled[id]

    def _affixes(self) -> tuple[list[int], list[int]]:
        bare, whole = (self._ids(["a"], add_special_tokens=added)[0] for added in (False, True))
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]
