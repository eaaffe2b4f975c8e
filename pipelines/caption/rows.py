"""The work on a row before and after the VLM, the same for all engines: make its question, judge its answer."""

import base64
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import pyarrow as pa
from PIL import Image

from pipelines.caption.config import ORIGINAL, CaptionerConfig, QualityConfig
from pipelines.caption.faults import find_faults, find_same_captions, strip_boilerplate
from pipelines.stages.contract import ShardOutput
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row
from pipelines.tables.text import clean
from pipelines.workers.images import decode
from pipelines.workers.models import pretrained

SQUARE = (
    "INST|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|"
    r"THINK|TRANSCRIBE|PREFIX|MIDDLE|SUFFIX|control_\d+|CLS|SEP|PAD|MASK|UNK|BOS|EOS|gMASK|sMASK"
)
"""Special tokens in square brackets: Mistral's, BERT's, GLM's. Other words in brackets are common in captions ("[OC]")."""
TAG = re.compile(rf"[<＜](?=[^<>＜＞\s][^<>＜＞]{{0,60}}[>＞])|\[(?=/?(?:{SQUARE})\])")
"""The opening bracket of what may be a special token of some model: <image>, </s>, <|im_end|>, [IMG], [/INST]."""
TOO_LONG = re.compile(r"context length|maximum (model|context)|max_model_len|too (long|many tokens)|longer than", re.IGNORECASE)
"""Messages of vLLM and OpenAI-compatible servers about a prompt that is too long."""
ENGINE_DIED = "engine_died"
"""Prefix of the error of a row that killed its engine."""


@dataclass(frozen=True)
class Question:
    """An RGB image and the prompt about it; `row_id` is the image's id.

    `num_first_tokens`: if not 0, the answer is a `ScoredAnswer` with so many.
    """

    row_id: str
    image: Image.Image
    prompt: str
    num_first_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A caption. `num_tokens`: without the end token; `finish_reason`: "stop", or "length" if it was cut."""

    caption: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ScoredAnswer(Answer):
    """An answer with the likeliest tokens that it could have begun with: their log-probabilities, by their texts."""

    first_tokens: Mapping[str, float]


Outcome = Answer | RowRefused


def make_question(row: Row, config: CaptionerConfig) -> Question:
    """The question about a row of `images`. Raises RowRefused."""
    image = decode(row["image_bytes"])
    image.thumbnail((config.max_image_size,) * 2)
    return Question(row["id"], image, fill_prompt(config.prompt, row))


def fill_prompt(prompt: str, row: Row) -> str:
    """Put the image's own caption into the prompt."""
    return prompt.replace(ORIGINAL, as_text(row.get("caption") or ""))


def as_text(words: str) -> str:
    """Put a space into each tag, so that it stays text: a model would take "<image>" or "</s>" for its special tokens."""
    return TAG.sub(lambda bracket: f"{bracket[0]} ", words)


def data_uri(image: Image.Image, image_format: Literal["png", "jpeg"]) -> str:
    buffer = BytesIO()
    options = {"compress_level": 1} if image_format == "png" else {"quality": 95}
    image.save(buffer, image_format, **options)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(text: str, image_uri: str) -> Row:
    """A user's message in OpenAI's chat form."""
    image = {"type": "image_url", "image_url": {"url": image_uri}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


class CaptionJudge:
    """Turns the answers about a shard's images into rows of the captions table, rejects and figures."""

    def __init__(self, config: CaptionerConfig):
        self.config = config
        self.quality: QualityConfig = config.quality
        self.count_tokens: Callable[[str], int] | None = None
        if self.quality.budget_tokenizer:
            from transformers import AutoTokenizer

            from sana_model.nn.plain_text import PlainText

            path, options = pretrained(self.quality.budget_tokenizer)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
            plain = PlainText(tokenizer)
            self.count_tokens = lambda text: len(plain.rows([text])[0])

    def judge(self, source: Sequence[Row], outcomes: Sequence[Outcome]) -> ShardOutput:
        """An outcome for each row of `source` (id, source_uri, and caption where the prompt asks for it)."""
        answers = [self._clean(outcome) for outcome in outcomes]
        repeated = find_same_captions([answer.caption for answer in answers if isinstance(answer, Answer)], self.quality)
        rows: list[Row] = []
        rejects: list[Row] = []
        for row, answer in zip(source, answers, strict=True):
            if isinstance(answer, RowRefused):
                rejects.append(reject(row, answer))
                continue
            flags, refusal = self._faults(row, answer, repeated)
            if refusal is not None:
                rejects.append(reject(row, refusal))
                continue
            rows.append({"id": row["id"], **vars(answer), "flags": flags})
        return ShardOutput(rows, rejects, self._figures(rows))

    def _clean(self, outcome: Outcome) -> Outcome:
        if isinstance(outcome, RowRefused):
            return outcome
        caption = clean(outcome.caption) or ""  # a server may send half a character of UTF-16
        if self.quality.boilerplate == "strip":
            caption = strip_boilerplate(caption)
        if not caption:
            return RowRefused("empty_caption", f"{self.config.model} answered with nothing")
        return Answer(caption, outcome.num_tokens, outcome.finish_reason)

    def _faults(self, row: Row, answer: Answer, repeated: Mapping[str, int]) -> tuple[list[str], RowRefused | None]:
        """The flags, or the refusal for the first fault whose policy is to reject."""
        policies = self.quality.policies()
        budgeted = answer.num_tokens if self.count_tokens is None else self.count_tokens(answer.caption)
        faults = {
            fault.name: fault.detail
            for fault in find_faults(
                answer.caption,
                finish_reason=answer.finish_reason,
                num_tokens=budgeted,
                prompt=fill_prompt(self.config.prompt, row),
                config=self.quality,
            )
        }
        if answer.caption in repeated:
            faults["same_caption"] = f"stands on {repeated[answer.caption]} images of the shard"
        flags = []
        for name, policy in policies.items():
            if name not in faults:
                continue
            if policy == "reject":
                return [], RowRefused(name, f"{faults[name]}: {answer.caption[:200]!r}")
            flags.append(name)
        return flags, None

    def _figures(self, rows: Sequence[Row]) -> dict[str, float]:
        """The share of the shard's captions with each flag."""
        if not rows:
            return {}
        times = Counter(flag for row in rows for flag in row["flags"])
        names = [name for name, policy in self.quality.policies().items() if policy != "reject"]
        return {f"flagged.{name}": times[name] / len(rows) for name in names}


def source_rows(table: pa.Table) -> list[Row]:
    """The rows of `images` without the image bytes, kept while the images are captioned."""
    return table.drop_columns(["image_bytes"]).to_pylist()


def refusal_of(error: str) -> RowRefused:
    """The refusal of a row from an engine's or a server's error message."""
    if error.startswith(ENGINE_DIED):
        return RowRefused(ENGINE_DIED, error.removeprefix(f"{ENGINE_DIED}: "))
    return RowRefused("prompt_too_long" if TOO_LONG.search(error) else "caption_failed", error[:500])
