"""The `vllm` engine inside an actor of another stage: questions about pictures."""

import os
from typing import Any

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.rows import Answer, Outcome, Question, data_uri, message, refusal_of
from pipelines.caption.vllm_engine import INSTALL
from pipelines.tables.chance import row_seed
from pipelines.tables.errors import StageError
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
        try:
            outputs = self.engine.chat(
                talks, params, use_tqdm=False, chat_template_content_format=self.config.vllm.content_format
            )
        except ValueError as error:  # a prompt that is too long ends the whole call
            if len(questions) == 1:
                return [refusal_of(str(error))]
            return [outcome for question in questions for outcome in self.ask([question])]
        told = [output.outputs[0] for output in outputs]
        return [Answer(answer.text, len(answer.token_ids), answer.finish_reason or "stop") for answer in told]
