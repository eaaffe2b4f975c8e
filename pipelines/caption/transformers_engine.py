"""The `transformers` engine: any AutoModelForImageTextToText, in batches. Runs anywhere."""

import logging
import os
from typing import Any

import pyarrow as pa
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.rows import (
    Answer,
    CaptionJudge,
    Outcome,
    Question,
    ScoredAnswer,
    make_question,
    source_rows,
)
from pipelines.stages.contract import ShardOutput
from pipelines.tables.chance import row_seed
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused
from pipelines.workers.halving import OUT_OF_MEMORY, refuse_out_of_memory, run_halving
from pipelines.workers.models import pick_device, pretrained
from pipelines.workers.prepare import prepare_ahead

# What processors and models raise for one row: a placeholder too many in its prompt, an image that they cannot cut up.
ROW_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, StopIteration)
FAILURES = (OUT_OF_MEMORY, "caption_failed")
MANY_ROWS = 8
"""If this many rows of a shard fail and none is captioned, the rows are not at fault."""

logger = logging.getLogger(__name__)


class TransformersCaptioner:
    """Ray Data actor: images -> captions, by a transformers VLM."""

    def __init__(self, config: CaptionerConfig):
        self.config = config
        path, pinned = pretrained(config.model, config.revision)
        trusted, options = config.trust_remote_code, dict[str, Any](pinned)
        self.device = pick_device(config.device)
        dtype = getattr(torch, config.dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, trust_remote_code=trusted, **options)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=trusted, **options)
        self.processor.tokenizer.padding_side = "left"  # all captions of a batch begin at the same place
        self.batch_size = config.batch_size
        self.context_length = config.context_length or _context_length(self.model.config)
        self.judge = CaptionJudge(config)

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of captions for each image, or a reject. Raises StageError if the model fails with all of them."""
        source = source_rows(table)
        outcomes: list[Outcome | None] = [None] * len(source)
        places: list[int] = []
        questions: list[Question] = []
        ahead = prepare_ahead(
            table.to_pylist(),
            lambda row: make_question(row, self.config),
            num_ahead=2 * self.config.batch_size,
            num_threads=min(8, os.cpu_count() or 1),
        )
        for place, (_, question) in enumerate(ahead):
            if isinstance(question, RowRefused):
                outcomes[place] = question
            else:
                places.append(place)
                questions.append(question)
            if len(questions) >= self.batch_size or (questions and place == len(source) - 1):
                for answered, outcome in zip(places, self.answer(questions), strict=True):
                    outcomes[answered] = outcome
                places, questions = [], []
        return self.judge.judge(source, _all_told(outcomes, self.config.model))

    def answer(self, questions: list[Question]) -> list[Outcome]:
        """An outcome for each question. A batch that fails is halved: only a row that fails alone is lost."""
        return run_halving(self._answer_together, questions, refuse=self._refuse)

    def _refuse(self, error: Exception, size: int) -> RowRefused | None:
        """The refusal of a row that fails alone with this error; None if the row is not at fault.

        What does not fit into memory makes all later batches smaller as well.
        """
        refused = refuse_out_of_memory(error, size)
        if refused is not None:
            if 1 <= size // 2 < self.batch_size:
                self.batch_size = size // 2
                logger.warning(
                    "%s: %d images do not fit into memory; batches have %d from now on", self.config.name, size, size // 2
                )
            return refused
        if isinstance(error, torch.AcceleratorError) or not isinstance(error, ROW_ERRORS):
            return None  # this process has lost its device, or the program is wrong: no smaller batch fares better
        return RowRefused("caption_failed", f"{type(error).__name__}: {_first_line(error)}")

    @torch.inference_mode()
    def _answer_together(self, questions: list[Question]) -> list[Outcome]:
        prompts = [self._chat(question.prompt) for question in questions]
        images = [[question.image] for question in questions]
        inputs = self.processor(text=prompts, images=images, return_tensors="pt", padding=True)
        limit, wanted = self.context_length, self.config.sampling.max_new_tokens
        rooms = [wanted if limit is None else limit - length for length in inputs["attention_mask"].sum(1).tolist()]
        if min(rooms) < wanted and len(questions) > 1:  # those with less room go alone, so that they shorten no other's caption
            return self._answer_apart(questions, [room < wanted for room in rooms])
        if rooms[0] < 1:
            return [RowRefused("prompt_too_long", f"{limit - rooms[0]} tokens, and the context has {limit}")]  # type: ignore[operator]
        inputs = inputs.to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(
            **inputs,
            generation_config=self._generation_config(min(wanted, rooms[0])),
            logits_processor=self._drawing(questions),
            return_dict_in_generate=True,
            output_logits=any(question.num_first_tokens for question in questions),
        )
        answers = [self._read_answer(answer) for answer in output.sequences[:, inputs["input_ids"].shape[1] :]]
        return [
            self._add_first_tokens(answer, output.logits[0][row], question.num_first_tokens)
            if question.num_first_tokens
            else answer
            for row, (answer, question) in enumerate(zip(answers, questions, strict=True))
        ]

    def _add_first_tokens(self, answer: Answer, logits: torch.Tensor, count: int) -> ScoredAnswer:
        """Add the likeliest first tokens from the logits at the answer's begin, (vocabulary,)."""
        found = logits.float().log_softmax(-1).topk(min(count, len(logits)))
        texts = [self.processor.tokenizer.decode([token]) for token in found.indices.tolist()]
        pairs = zip(reversed(texts), reversed(found.values.tolist()), strict=True)  # of equal texts the likeliest stays
        return ScoredAnswer(**vars(answer), first_tokens=dict(pairs))

    def _answer_apart(self, questions: list[Question], alone: list[bool]) -> list[Outcome]:
        together = [question for question, apart in zip(questions, alone, strict=True) if not apart]
        answers = iter(self.answer(together) if together else [])
        return [
            self.answer([question])[0] if apart else next(answers) for question, apart in zip(questions, alone, strict=True)
        ]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _read_answer(self, answer: torch.Tensor) -> Answer:
        stops = torch.tensor(self._stops(), device=answer.device)
        ended = torch.isin(answer, stops).nonzero()
        num_tokens = int(ended[0]) if len(ended) else len(answer)
        caption = self.processor.tokenizer.decode(answer[:num_tokens], skip_special_tokens=True)
        return Answer(caption, num_tokens, "stop" if len(ended) else "length")

    def _stops(self) -> list[int]:
        known = self.model.generation_config.eos_token_id
        known = self.processor.tokenizer.eos_token_id if known is None else known
        return known if isinstance(known, list) else [known]

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        pad = self.model.generation_config.pad_token_id
        pad = self.processor.tokenizer.pad_token_id if pad is None else pad
        return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=self._stops(), pad_token_id=pad, do_sample=False)

    def _drawing(self, questions: list[Question]) -> LogitsProcessorList:
        sampling = self.config.sampling
        if sampling.temperature == 0:
            return LogitsProcessorList()
        seeds = [row_seed(sampling.seed, question.row_id) for question in questions]
        return LogitsProcessorList(
            [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p), Gumbel(seeds, self.device)]
        )


class Gumbel(LogitsProcessor):
    """Makes the greedy choice a draw from softmax(scores), with a generator of its own for each row of the batch.

    argmax(scores + Gumbel noise) is distributed as softmax(scores) says, so what is drawn for a row depends on no other row.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawn = scores.float()
        for row, generator in enumerate(self.generators):
            drawn[row] -= torch.empty_like(drawn[row]).exponential_(generator=generator).log()
        return drawn  # type: ignore[return-value]


def _context_length(config: Any) -> int | None:
    """The number of positions of the language model, from the model's configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _all_told(outcomes: list[Outcome | None], model: str) -> list[Outcome]:
    told = [outcome for outcome in outcomes if outcome is not None]
    assert len(told) == len(outcomes)
    failed = [outcome for outcome in told if isinstance(outcome, RowRefused) and outcome.reason in FAILURES]
    if len(failed) >= MANY_ROWS and not any(isinstance(outcome, Answer) for outcome in told):
        raise StageError(f"{model} failed with each of {len(failed)} images alone, at last by {failed[-1].detail}")
    return told


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
