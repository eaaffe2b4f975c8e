"""The `vllm` engine inside an actor of another stage: questions about pictures."""

import os
from typing import Any

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.rows import Answer, Outcome, Question, data_uri, message, refusal_of
from pipelines.caption.vllm_engine import INSTALL
from pipelines.tables.chance import row_seed
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused
from pipelines.workers.halving import run_halving
from pipelines.workers.models import pretrained


class VllmAsker:
    """Asks vLLM in this process; it batches by itself, and reads a picture that several questions are about once."""

    def __init__(self, config: CaptionerConfig):
        os.environ.update(config.vllm.env)  # of this actor's own process, before vLLM reads them
        try:
            from vllm import LLM
        except ImportError as error:
            raise StageError(f"engine=vllm needs vLLM on the nodes of the cluster: {INSTALL}") from error
        path, pinned = pretrained(config.model, config.revision)
        self.config = config
        self.engine: Any = LLM(
            model=path,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            tensor_parallel_size=config.vllm.tensor_parallel_size,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            enable_prefix_caching=config.vllm.prefix_caching,
            limit_mm_per_prompt={"image": 1},
            **({"max_model_len": config.context_length} if config.context_length else {}),
            **pinned,
            **config.vllm.engine_args,
        )

    def ask(self, questions: list[Question]) -> list[Outcome]:
        return run_halving(self._ask_together, questions, refuse=_refuse)

    def _ask_together(self, questions: list[Question]) -> list[Answer]:
        from vllm import SamplingParams

        sampling = self.config.sampling
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=row_seed(sampling.seed, question.row_id) if sampling.temperature > 0 else None,
            )
            for question in questions
        ]
        talks = [[message(question.prompt, data_uri(question.image, "png"))] for question in questions]
        format_of = self.config.vllm.content_format
        outputs = self.engine.chat(talks, params, use_tqdm=False, chat_template_content_format=format_of)
        told = [output.outputs[0] for output in outputs]
        return [Answer(answer.text, len(answer.token_ids), answer.finish_reason or "stop") for answer in told]


def _refuse(error: Exception, size: int) -> RowRefused | None:
    """The refusal of a question that vLLM takes for wrong, such as one that is too long; it ends the call of all questions."""
    from vllm.exceptions import VLLMClientError

    return refusal_of(str(error)) if isinstance(error, (ValueError, VLLMClientError)) else None
