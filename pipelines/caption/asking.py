"""Asks a VLM any questions about pictures, by each of the captioners' engines, inside an actor of another stage."""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.rows import Outcome, Question


class Asker(Protocol):
    """A VLM that answers questions about pictures."""

    def ask(self, questions: list[Question]) -> list[Outcome]:
        """An answer or a refusal for each question, in order. Raises StageError if the engine cannot continue."""
        ...


def make_asker(config: CaptionerConfig) -> Asker:
    """Load the VLM, or connect to the server, that `config` names. Its prompt and its checks of captions are not used."""
    if config.engine == "vllm":
        from pipelines.caption.vllm_asker import VllmAsker

        return VllmAsker(config)
    if config.engine == "http":
        return HttpAsker(config)
    return TransformersAsker(config)


class TransformersAsker:
    """Asks a VLM of transformers, `batch_size` questions at a time."""

    def __init__(self, config: CaptionerConfig):
        from pipelines.caption.transformers_engine import TransformersCaptioner

        self.captioner = TransformersCaptioner(config)

    def ask(self, questions: list[Question]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while left := questions[len(outcomes) :]:
            outcomes += self.captioner.answer(left[: self.captioner.batch_size])
        return outcomes


class HttpAsker:
    """Asks an OpenAI-compatible server, `http.concurrency` questions at a time."""

    def __init__(self, config: CaptionerConfig):
        from pipelines.caption.http_engine import HttpCaptioner

        self.captioner = HttpCaptioner(config)
        self.concurrency = config.http.concurrency

    def ask(self, questions: list[Question]) -> list[Outcome]:
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask")
        try:
            return list(pool.map(self.captioner.answer, questions))
        finally:
            pool.shutdown(cancel_futures=True)
