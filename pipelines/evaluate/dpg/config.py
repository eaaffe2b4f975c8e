"""Configuration of DPG-Bench."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.caption.config import CaptionerConfig, VllmConfig
from pipelines.evaluate.vlm_config import VlmMetricConfig

PUBLISHED_JUDGE = "damo/mplug_visual-question-answering_coco_large_en"
"""The judge of the published results, of modelscope. No engine here runs it: serve it, and set engine=http and this name."""
QUESTION = "{question}"
QUESTIONS_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"


@dataclass(frozen=True, kw_only=True)
class DpgConfig(VlmMetricConfig):
    """DPG-Bench: questions about each picture, answered by a VLM; a question counts only if those that it depends on do.

    Figures of different judges cannot be compared. The published results are those of PUBLISHED_JUDGE.

    Args:
        engine: "transformers" runs anywhere, "vllm" is for GPUs, "http" asks an OpenAI-compatible server.
        questions: the published dpg_bench.csv, a path or URI.
        prompt: what the judge is asked; {question} stands for the question.
        question_batch_size: questions in one call of a transformers model; changes no value.
        vllm: settings of this engine.
    """

    NO_VALUE: ClassVar = (*VlmMetricConfig.NO_VALUE, "questions", "question_batch_size")

    engine: Literal["transformers", "vllm", "http"] = "transformers"
    questions: str = "dpg_bench.csv"
    prompt: str = "{question} Answer with yes or no only."
    question_batch_size: int = 16
    vllm: VllmConfig = field(default_factory=VllmConfig)
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if QUESTION not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has no {QUESTION} in it")

    @property
    def judge(self) -> CaptionerConfig:
        return self.as_captioner(engine=self.engine, batch_size=self.question_batch_size, vllm=self.vllm)
